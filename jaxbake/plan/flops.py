"""Floating-point operations of the matrix products a program asks for, from its jaxpr: of all chips together."""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core


def matmul_flops(jaxpr: Any) -> int:
    """2 x the multiplications of every product in a (closed) jaxpr, loops multiplied out, recomputation included.

    A `while` loop whose length is not known counts once, of a `cond` the dearest branch. Hand-written kernels count
    what they say of themselves (`cost_estimate`), else their products times their grid, skipped blocks included.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return dot_flops(eqn.invars[0].aval.shape, eqn.invars[1].aval.shape, params["dimension_numbers"])
    if name == "pallas_call" and (said := params.get("cost_estimate")) is not None:
        return said.flops
    inner = [matmul_flops(j) for j in _jaxprs(params)]
    if not inner:
        return 0
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(inner)
    if name == "shard_map":  # what is inside is of one part
        axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
        return math.prod(params["mesh"].shape[axis] for axis in axes) * sum(inner)
    return sum(inner)


def dot_flops(left: tuple[int, ...], right: tuple[int, ...], dimension_numbers: Any) -> int:
    """Of one `dot_general` of these shapes."""
    (_, contract), (_, batch) = dimension_numbers
    free = math.prod(size for i, size in enumerate(right) if i not in (*contract, *batch))
    return 2 * math.prod(left) * free


def _jaxprs(value: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
        return [value]
    if isinstance(value, dict):
        return [j for item in value.values() for j in _jaxprs(item)]
    return [j for item in value for j in _jaxprs(item)] if isinstance(value, (tuple, list)) else []
