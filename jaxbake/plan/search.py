"""Plans: compiles what is asked for, and where it does not fit, few others that may."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

from jaxbake.errors import JaxbakeError
from jaxbake.plan.chips import parse_topology
from jaxbake.plan.figures import Case, Plan
from jaxbake.plan.request import Request, check_compiler

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # with the TPU compiler installed, jax would look for a TPU
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "JAX_ENABLE_COMPILATION_CACHE": "0",  # a program from the cache has no text, and took no time
}
TRIES = 4
"""Cases compiled at most after the one asked for."""

Say = Callable[[str], None]


def make_plan(request: Request, *, tries: int = TRIES, say: Say = lambda text: None) -> Plan:
    """Compiles the programs of a request, and where they do not fit, up to `tries` other cases until one does.

    `say` gets a line before each compilation. Raises JaxbakeError without the compiler, and for a model, mesh or
    topology that cannot be.
    """
    parse_topology(request.topology, request.slices)
    check_compiler()
    say(f"compiling {' + '.join(request.programs)} for {request.topology}, mesh {request.mesh}")
    asked, parameters = compile_elsewhere(request)
    tried = []
    if not asked.fits:
        worst = max(asked.figures, key=lambda f: f.memory.over).program
        for other in others(request, asked):
            if len(tried) == tries:
                break
            probe = replace(other, programs=(worst,))
            say(f"{missing(asked if not tried else tried[-1])}; trying {said(other)}")
            try:
                case, _ = compile_elsewhere(probe)
                if case.fits and len(request.programs) > 1:
                    case, _ = compile_elsewhere(other)
            except JaxbakeError as error:  # a tp that does not divide the model's heads, say
                say(str(error))
                continue
            tried.append(case)
            if case.fits:
                break
    return Plan(request, parameters, asked, tuple(tried))


def others(request: Request, asked: Case) -> Iterator[Request]:
    """Cases to try, the likeliest first: recomputation, then fewer rows at a time on the same mesh, then more tp."""
    sizes = dict(part.split("=") for part in asked.mesh.split(",")) if "=" in asked.mesh else {}
    sizes = {axis: int(size) for axis, size in sizes.items()}
    request = replace(request, mesh=asked.mesh if sizes else request.mesh)
    if not asked.remat:
        request = request.with_remat()
        yield request
    worst = max(asked.figures, key=lambda f: f.memory.over).memory
    while True:
        fixed = worst.weights + worst.state + worst.inputs
        rows = request.sizes.rows // (sizes.get("replica", 1) * sizes.get("fsdp", 1))
        counts = [k for k in range(asked.micro_batches + 1, rows + 1) if rows % k == 0]
        enough = [k for k in counts if fixed + (worst.peak - fixed) * asked.micro_batches / k <= 0.9 * worst.hbm]
        for count in dict.fromkeys([*enough[:1], *counts[-1:]]):
            yield request.with_micro_batches(count)
        fsdp = sizes.get("fsdp", 1)
        if fsdp % 2:
            return
        sizes |= {"fsdp": fsdp // 2, "tp": 2 * sizes.get("tp", 1)}
        request = replace(request, mesh=",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1))
        yield request


def said(request: Request) -> str:
    """A case in words."""
    count = request.bake.optimizer.accumulate
    return f"mesh {request.mesh}, {count} micro-batch{'es' if count > 1 else ''}"


def missing(case: Case) -> str:
    """By how much a case misses."""
    worst = max(case.figures, key=lambda f: f.memory.over)
    return f"{worst.program} misses by {worst.memory.over / 2**30:.2f} GiB a chip"


def compile_elsewhere(request: Request) -> tuple[Case, int]:
    """`compiling.compile_case` in a process of its own. Raises JaxbakeError as it does, and where the process died."""
    command = [sys.executable, "-m", "jaxbake.plan.compiling"]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(
        command, input=json.dumps(request.to_dict()), env=environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        cause = "is there enough memory?" if done.returncode < 0 else last
        raise JaxbakeError(f"plan: the compiler's process ended with {done.returncode}: {cause}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise JaxbakeError(answer["error"])
    return read_case(answer["case"]), answer["parameters"]


def read_case(data: dict) -> Case:
    """A case from what `dataclasses.asdict` makes of it."""
    from pydantic import TypeAdapter

    return TypeAdapter(Case).validate_python(data)
