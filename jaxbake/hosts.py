"""Several processes as one bake: how they start, agree, tell each other, and leave together.

One process or many, the program is the same (single program, multiple data). Each process runs the same command:

    jaxbake bake RECIPE --pod --preemptible --output gs://bucket/run        # Cloud TPU, Slurm: all is detected
    jaxbake bake RECIPE --coordinator HOST:PORT --processes N --process I   # anywhere else

The output folder must be one that all processes see (a shared file system, or gs://). Process 0 alone writes files for
people (metrics, card, PEFT, summary, plot, trajectories) and shows progress; the parameters are read by every process
for its own devices only, and Orbax checkpoints are written by all.

SIGTERM to any process (what clouds send before they take a machine) makes all of them save after the same step and
leave. Exit codes of `jaxbake bake`, on which scripts may rely:

| code | | what to do |
|---|---|---|
| 0 | the bake is finished, or was already | fetch the results |
| 2 | something given is wrong; one line says what | mend it; running it again gives the same |
| 75 | preempted; everything is saved (EX_TEMPFAIL) | run the same command again |
| 69 | another process is gone, or cannot be reached (EX_UNAVAILABLE) | start all again |
| 130 | interrupted from the keyboard | run the same command again |
| 134, 137, ... | killed: by the runtime for a lost peer (SIGABRT), or from outside | start all again |

A peer that dies, or falls silent for `peer_timeout` seconds, ends all others with 69 or 134: nothing waits forever.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxbake.errors import JaxbakeError, PeerLost

T = TypeVar("T")

PEER_TIMEOUT = 100
"""Seconds without a sign of life after which a process is taken for dead."""

_WAIT_MS = 7 * 24 * 3600 * 1000  # the heartbeats bound how long a wait for a lost peer can be, not this
_terminated = threading.Event()
_numbers = itertools.count()


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    pod: bool = False,
    preemptible: bool = False,
    peer_timeout: int = PEER_TIMEOUT,
) -> None:
    """Joins this process to the others, or starts the only one; SIGTERM then makes a bake save and leave.

    To be called before anything is computed, once. On CPU the processes talk over Gloo.

    Args:
      coordinator, processes, process: "host:port" of process 0, how many there are, and which this one is.
      pod: detect those of these three that are not given (Cloud TPU, GKE, Slurm, Open MPI).
      preemptible: refuse to start where SIGTERM could not be handled.
      peer_timeout: seconds without a sign of life after which a process is lost, and all others end.

    Raises JaxbakeError for an incomplete or impossible combination, and where `preemptible` cannot be kept.
    """
    given = (coordinator, processes, process)
    if not pod and any(value is None for value in given) and any(value is not None for value in given):
        raise JaxbakeError("--coordinator HOST:PORT, --processes N and --process I go together; give all three")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise JaxbakeError(f"--process: {process} is not one of the {processes} processes, 0 to {processes - 1}")
    distributed = pod or coordinator is not None
    if distributed:
        if preemptible and not jax.config.jax_enable_preemption_service:
            raise JaxbakeError(
                "--preemptible: the JAX preemption service is off, so a SIGTERM would lose the work since the last "
                "checkpoint; unset JAX_ENABLE_PREEMPTION_SERVICE=0, or leave out --preemptible"
            )
        # Its heartbeats find lost peers; the time to say goodbye is bounded in the same way.
        times = {"heartbeat_timeout_seconds": peer_timeout, "shutdown_timeout_seconds": peer_timeout}
        try:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(coordinator, processes, process, **times)
        except (RuntimeError, ValueError) as error:
            what = "--pod: no pod was detected here" if pod else f"--coordinator {coordinator}: could not join"
            raise JaxbakeError(f"{what} ({_line(error)})") from error
        # Gloo wants all processes at the first collective within half a minute: so now, not after compiling.
        multihost_utils.sync_global_devices("jaxbake")
    elif threading.current_thread() is threading.main_thread():
        _terminated.clear()
        signal.signal(signal.SIGTERM, _on_sigterm)
    elif preemptible:
        raise JaxbakeError("--preemptible: SIGTERM can only be handled in the main thread; start from there")


def _on_sigterm(number: int, frame: Any) -> None:
    _terminated.set()
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def is_first() -> bool:
    """Whether this process is the one that writes files for people and shows progress."""
    return jax.process_index() == 0


def stop_asked() -> bool:
    """Whether all processes are to save and leave here, because one of them got SIGTERM.

    Every process must call it at the same places in the same order: the answer is the same for all, because those that
    are behind first catch up (jax.experimental.multihost_utils.reached_preemption_sync_point).
    """
    number = next(_numbers)
    if not jax.distributed.is_initialized():
        return _terminated.is_set()
    if not jax.config.jax_enable_preemption_service:
        return False
    return multihost_utils.reached_preemption_sync_point(number)


def first(action: Callable[[], T]) -> T:
    """Runs the action in process 0 alone, while the others wait, and gives its result (JSON) in all of them.

    What it raises there is raised everywhere, a JaxbakeError as such. So no process goes on, or waits, by itself.
    """
    if jax.process_count() == 1:
        return action()
    key = f"jaxbake/first/{next(_firsts)}"
    client = _client()
    if not is_first():
        told = json.loads(_told(client, key))
        if "error" in told:
            raise JaxbakeError(told["error"])
        return told["value"]
    try:
        value = action()
    except BaseException as error:
        client.key_value_set(key, json.dumps({"error": str(error) or type(error).__name__}))
        raise
    client.key_value_set(key, json.dumps({"value": value}))
    return value


_firsts = itertools.count()


@contextmanager
def led(manager: AbstractContextManager[os.PathLike]) -> Iterator[str]:
    """Enters and leaves a context in process 0 alone; its path goes to all, and so do its errors."""
    path = first(lambda: os.fspath(manager.__enter__()))
    try:
        yield path
    except BaseException as error:
        if is_first():
            manager.__exit__(type(error), error, error.__traceback__)
        raise
    first(lambda: manager.__exit__(None, None, None) and None)


def gather(value: Any) -> list[Any]:
    """What every process gives (JSON), in their order, in all of them."""
    count = jax.process_count()
    if count == 1:
        return [value]
    client, key = _client(), f"jaxbake/gather/{next(_gathers)}"
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    return [json.loads(_told(client, f"{key}/{i}")) for i in range(count)]


_gathers = itertools.count()


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that are this process's to work on: every n-th."""
    return items[jax.process_index() :: jax.process_count()]


def _told(client: Any, key: str) -> str:
    """What another process has said, once it has."""
    try:
        return client.blocking_key_value_get(key, _WAIT_MS)
    except jax.errors.JaxRuntimeError as error:
        raise PeerLost(f"no answer from another process ({_line(error)})") from error


def lost(error: BaseException) -> bool:
    """Whether an error is what a process sees of a peer that is gone."""
    if isinstance(error, PeerLost):
        return True
    if not (isinstance(error, jax.errors.JaxRuntimeError) and jax.distributed.is_initialized()):
        return False
    signs = ("gloo", "unavailable", "deadline", "connection", "socket", "heartbeat", "coordination")
    return any(sign in str(error).lower() for sign in signs)


def _client() -> Any:
    """jax's client of the coordination service, which waits without occupying the devices; there is no public name."""
    from jax._src.distributed import global_state

    return global_state.client


def fetch(tree: Any) -> Any:
    """The tree with numpy arrays, whole in every process; all processes must call it."""
    return jax.tree.map(_fetch, tree)


def _fetch(x: Any) -> np.ndarray:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    if not x.is_fully_replicated:
        x = _replicated(x)
    return np.asarray(x.addressable_data(0))


def _replicated(x: jax.Array) -> jax.Array:
    everywhere = jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
    return jax.jit(lambda x: x, out_shardings=everywhere)(x)


def environment(mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
    """What decides whether two runs of one program agree bit by bit: versions, devices, processes and mesh.

    cpus: how many threads the CPU backend divides its work between; not looked at on other platforms.
    """
    import jaxlib

    import jaxbake

    device = jax.devices()[0]
    found = {
        "jaxbake": jaxbake.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape) if mesh is not None else None,
    }
    return found | ({"cpus": _cpus()} if device.platform == "cpu" else {})


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
