"""Compiles a plan's programs for a TPU that is not there.

Run as `python -m jaxbake.plan.compiling`: one JSON request on standard input, one JSON answer on standard output. It is
a process of its own because jax must be told before it is imported, and because a compiler's memory is given back only
when its process ends.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxbake.bake.abstract import StepInputs, step_inputs
from jaxbake.bake.step import make_bake_step
from jaxbake.data.shapes import Shape
from jaxbake.errors import JaxbakeError
from jaxbake.mesh import describe, parts, sharding
from jaxbake.mesh import mesh as resolve
from jaxbake.models import families
from jaxbake.models.spec import ModelConfig, num_params
from jaxbake.plan.chips import Topology, parse_topology
from jaxbake.plan.figures import Case, Figures, Memory
from jaxbake.plan.flops import matmul_flops
from jaxbake.plan.hlo import read_costs
from jaxbake.plan.request import Request
from jaxbake.sampling import engine
from jaxbake.sampling.filters import make_filters

_UNIT = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def compile_case(request: Request) -> tuple[Case, int]:
    """The figures of the request's programs on its mesh, and the model's number of parameters.

    Raises JaxbakeError for a model, mesh or topology that cannot be.
    """
    topology = parse_topology(request.topology, request.slices)
    config = families.convert(request.model)
    mesh = resolve(request.mesh, config, request.sizes.rows, devices=_devices(topology))
    sizes, dtype = request.sizes, jnp.dtype(request.dtype)
    length = sizes.question + sizes.response
    shape = Shape(rows=sizes.rows, student=length, teacher=length, matched=sizes.response)
    inputs = step_inputs(config, request.bake, shape, sizes.prompt, mesh, dtype)
    figures = []
    for program in request.programs:
        if program == "decode":
            function, arguments, static = engine.decode, *_decoding(config, request, inputs, mesh)
            tokens = arguments[2].tokens.shape[0]
        else:
            function, static = make_bake_step(config, request.bake), {}
            told = (None, inputs.known) if program == "cached" else (inputs.prefix, None)
            arguments = (inputs.state, inputs.params, inputs.batch, *told)
            tokens = sizes.rows * sizes.response
        with jax.set_mesh(mesh):  # what is traced must take these chips' kernels, not those of this machine
            figures.append(_figures(program, function, arguments, static, inputs, topology, tokens))
    train, optimizer = request.bake.train, request.bake.optimizer
    return Case(describe(mesh), optimizer.accumulate, bool(train.remat), tuple(figures)), num_params(config)


def _devices(topology: Topology) -> list[Any]:
    from jax.experimental import topologies

    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        found = topologies.get_topology_desc(topology.text, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise JaxbakeError(f"--topology '{topology.text}': the compiler knows no such slice ({reason})") from None
    if len(found) != topology.total:
        raise JaxbakeError(f"--topology '{topology.text}': the compiler makes {len(found)} devices of {topology.total}")
    return list(found)


def _decoding(config: ModelConfig, request: Request, inputs: StepInputs, mesh: Mesh) -> tuple[tuple, dict]:
    """Arguments of the sampler's loop: its batch of rows, as many more as make every part of the mesh have the same."""
    sizes, sampling = request.sizes, request.bake.sampling
    each = parts("batch", mesh)
    rows = -(-sampling.batch_size // each) * each

    def array(shape, dtype=jnp.int32, axes=("batch",)):
        axes = (*axes, *[None] * (len(shape) - len(axes)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(axes, mesh, shape))

    asked = engine.Rows(
        tokens=array((rows, sizes.question)),
        lengths=array((rows,)),
        visible=array((rows,)),
        keys=array((rows, 2), jnp.uint32),
        temperature=array((rows,), jnp.float32),
        stop_ids=array((4,), axes=()),
    )
    filters = make_filters(sampling.top_k, sampling.top_p, sampling.min_p)
    prefill = partial(engine.prefill, config=config, max_tokens=sizes.response)
    state = jax.eval_shape(prefill, inputs.params, None, asked, inputs.prefix, filters)
    heads = inputs.prefix.k.sharding.spec[2:3] if inputs.prefix is not None else ()
    axes = ("layers", "batch", None, "kv_heads" if any(heads) else None, None)
    cache = state.cache.replace(
        k=array(state.cache.k.shape, state.cache.k.dtype, axes),
        v=array(state.cache.v.shape, state.cache.v.dtype, axes),
        positions=array(state.cache.positions.shape),
        segments=array(state.cache.segments.shape),
        index=array((), axes=()),
    )
    state = engine.State(
        cache=cache,
        tokens=array(state.tokens.shape),
        logprobs=array(state.logprobs.shape, jnp.float32),
        lengths=array((rows,)),
        finished=array((rows,), jnp.bool_),
        step=array((), axes=()),
    )
    limit = array((), axes=())
    return (inputs.params, None, asked, inputs.prefix, filters, state, limit), {"config": config}


def _figures(
    program: str, function: Any, arguments: tuple, static: dict, inputs: StepInputs, topology: Topology, tokens: int
) -> Figures:
    """Traces, lowers and compiles one program; one that misses the memory still has the figures that are known."""
    started = time.monotonic()
    traced = function.trace(*arguments, **static)
    flops = matmul_flops(traced.jaxpr)
    bound = math.ceil(flops / topology.total / topology.chip.flops_per_cycle)
    weights, state = _bytes(inputs.params), 0 if program == "decode" else _bytes(inputs.state)
    rest = _bytes(arguments) - weights - state
    common = {"weights": weights, "state": state, "inputs": rest, "hbm": topology.chip.hbm}
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        memory = Memory(**common, peak=_needed(str(error)))
        return Figures(program, memory, time.monotonic() - started, flops, bound, tokens=tokens)
    seconds = time.monotonic() - started
    account = compiled.memory_analysis()
    peak = account.argument_size_in_bytes + account.temp_size_in_bytes + account.generated_code_size_in_bytes
    peak += account.output_size_in_bytes - account.alias_size_in_bytes
    memory = Memory(
        **common, peak=peak, temporary=account.temp_size_in_bytes, code=account.generated_code_size_in_bytes
    )
    costs = read_costs(compiled.as_text())
    kernels = math.ceil(costs.kernel_flops / topology.chip.flops_per_cycle)
    return Figures(
        program, memory, seconds, flops, bound, costs.cycles + kernels,
        {kind: asdict(traffic) for kind, traffic in sorted(costs.collectives.items())},
        asdict(costs.waiting), costs.unestimated, kernels, tokens,
    )  # fmt: skip


def _bytes(tree: Any) -> int:
    """Bytes a chip of arrays with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
            size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.dtype(leaf.dtype).itemsize
            total += math.prod(shape) * size
    return total


def _needed(message: str) -> int:
    """Bytes a chip that the compiler's out-of-memory message asks for; any other failure of its is raised."""
    for pattern in (r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", r"required[^(]*\(([\d.]+)([KMGT]?)\) exceeds"):
        if found := re.search(pattern, message):
            return int(float(found[1]) * _UNIT[found[2]])
    raise JaxbakeError(f"plan: the compiler gave up: {message.strip().splitlines()[0]}")


def main() -> None:
    """Answers one request."""
    answer = os.dup(1)
    os.dup2(2, 1)  # the compiler talks on standard output too
    try:
        case, parameters = compile_case(Request.from_dict(json.load(sys.stdin)))
        result = {"case": asdict(case), "parameters": parameters}
    except JaxbakeError as error:
        result = {"error": str(error)}
    with os.fdopen(answer, "w") as out:
        json.dump(result, out)


if __name__ == "__main__":
    main()
