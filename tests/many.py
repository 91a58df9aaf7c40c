"""Processes that bake together, through the command line: forked from one that has imported everything, which is quick.

As a script this is that one: it reads requests as JSON lines and answers so.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class Nursery:
    """Starts groups of processes."""

    def __init__(self):
        root = Path(__file__).parents[1]
        env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "PYTHONWARNINGS": "ignore", "XLA_FLAGS": ""}
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen([sys.executable, __file__], env=env, **pipe)
        self._count = 0

    def _ask(self, request: dict):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, processes: int, *arguments: str, log: Path, **settings) -> Group:
        """`jaxbake ARGUMENTS` in so many processes; settings as for `_child`."""
        self._count += 1
        logs = [str(log / f"{self._count}-{i}.log") for i in range(processes)]
        where = []
        if processes > 1:
            where = [f"--coordinator=localhost:{free_port()}", f"--processes={processes}"]
        requests = [
            {"arguments": [*arguments, *where, *([f"--process={i}"] if where else [])], "log": logs[i], **settings}
            for i in range(processes)
        ]
        return Group(self, [self._ask(request) for request in requests], [Path(path) for path in logs])

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()


class Group:
    """Some processes of one bake."""

    def __init__(self, nursery: Nursery, pids: list[int], logs: list[Path]):
        self._nursery, self.pids, self.logs = nursery, pids, logs

    def until(self, text: str, seconds: float = 600) -> None:
        """Returns once process 0 has said it."""
        deadline = time.monotonic() + seconds
        while text not in self.logs[0].read_text():
            assert time.monotonic() < deadline, f"never said {text!r}: {self.said()}"
            time.sleep(0.01)

    def codes(self, seconds: float = 600) -> list[int]:
        """Exit codes, minus the signal's number for a killed one; -99 for one that did not end in time."""
        return self._nursery._ask({"wait": self.pids, "seconds": seconds})

    def said(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.logs)


def _wait(pids: list[int], seconds: float) -> list[int]:
    deadline, codes = time.monotonic() + seconds, {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, 9)
                os.waitpid(pid, 0)
                codes[pid] = -99
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _child(
    arguments: list[str],
    log: str,
    pause: float = 0.0,
    steps: int = 60,
    peer_timeout: int = 20,
    model: str = "",
    recipes: bool = False,
) -> None:
    """One process of the command line, whose recipe is a bake of the tiny model and its exports (of `bake-many`, the
    bakes of test_many).

    Process 0 says where it is, and what that has cost. pause: seconds after each step. model: a folder that has
    the tiny model, which is then read from there and also exported merged. recipes: do what they say, instead.
    """  # fmt: skip
    import faulthandler
    import signal

    import jax
    import tiny_base as tiny
    from jax._src import cache_key

    import jaxbake as jb
    from jaxbake import run
    from jaxbake.cli import app, show
    from jaxbake.errors import TrainingDiverged

    faulthandler.register(signal.SIGUSR1)  # `kill -USR1` shows where a process stands
    jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / f"jaxbake-tests-{os.getuid()}"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # One process compiles for all, or has kept it: they share a core. On CPU the topology's fingerprint differs between
    # processes, by which the others would never find in the cache what process 0 has put there.
    jax.config.update("jax_share_binary_between_hosts", True)
    cache_key._hash_accelerator_config = cache_key._hash_devices

    def say(self, stage, done, total, info):
        print(stage, done, f"({time.process_time():.1f} s)", flush=True)
        time.sleep(pause if stage == "bake" else 0)

    def run_recipe(recipe, root, output, progress):
        mesh = jb.mesh(f"fsdp={jax.device_count()}") if jax.process_count() > 1 else None
        output = Path(output)
        base = _read(model, mesh) if model else tiny.spread(tiny.tiny_base(), mesh)
        config = tiny.with_train(steps=steps, checkpoint_every=10, eval_every=30)
        result = tiny.tiny_bake(output, config, base=base, progress=progress)
        jb.save_peft(result.delta, base, output / "peft", card=result.card)
        if model:
            jb.save_merged(base, result.delta, output / "merged", card=result.card)
        return result

    def run_recipes(recipes, output, progress):
        from test_many import STEADY

        base = tiny.spread(tiny.tiny_base(), jb.mesh(f"fsdp={jax.device_count()}"))
        try:
            return jb.bake_many(base, STEADY, output, progress=progress)
        except TrainingDiverged as error:
            print("diverged:", error, sorted(error.deltas), flush=True)
            return []

    show.Bars.__call__ = say
    show.print_json = lambda value: print("done", flush=True)
    if not recipes:
        run.run_recipe, run.run_recipes = run_recipe, run_recipes
        jb.BakeResult.to_dict = lambda self: {}
    os.environ["JAXBAKE_PEER_TIMEOUT"] = str(peer_timeout)
    app([*arguments, "--json"])


def _read(model: str, mesh):
    """The tiny model from its folder, and how many bytes of it this process has read."""
    from dataclasses import replace

    import numpy as np
    import tiny_base as tiny

    from jaxbake.models import checkpoint

    base, opened, read = tiny.tiny_base(), checkpoint._opened, []

    class Counted:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            """It is let go with the file."""

        def get_slice(self, name):
            part = self._file.get_slice(name)

            class Part:
                def __getitem__(self, index):
                    found = part[index]
                    read.append(found.nbytes)
                    return found

            return Part()

    def counted(path):
        return Counted(opened(path))

    tensors = checkpoint.stored_tensors(Path(model))
    checkpoint._opened, checkpoint.stored_tensors = counted, lambda folder: tensors
    params = checkpoint.read_params(Path(model), base.config, np.float32, mesh)
    checkpoint._opened = opened
    print(f"read {sum(read)} bytes of {checkpoint.digest(Path(model), base.config)}", flush=True)
    return replace(base, params=params, mesh=mesh, folder=Path(model))


def _serve() -> None:
    import gc
    import signal

    import tiny_base
    from orbax.checkpoint import v1  # noqa: F401

    import jaxbake.bake.loop  # noqa: F401  (and all the others: what is imported here is there in every child)
    import jaxbake.run  # noqa: F401

    tiny_base.tokenizer()
    gc.freeze()
    out = os.dup(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], request["seconds"])
        elif not (answer := os.fork()):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.close(0)
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(out)
            _child(**request)
        else:
            open(request["log"], "a").close()
        os.write(out, f"{json.dumps(answer)}\n".encode())


if __name__ == "__main__":
    _serve()
