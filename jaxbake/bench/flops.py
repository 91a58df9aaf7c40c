"""Matrix-product FLOPs that a computation asks for, counted from its jaxpr."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.interpreters import partial_eval


def matmul_flops(f: Callable, *args, **kwargs) -> float:
    """FLOPs (a multiply-add is 2) of all matrix products that the result needs, loops multiplied out.

    Results nobody uses are left out, as the compiler leaves them out. A `while` loop counts as one turn, a `cond` as
    its dearest branch.
    """
    closed = jax.make_jaxpr(lambda args, kwargs: f(*args, **kwargs))(args, kwargs)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _count(jaxpr)


def _count(jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (over, _), _ = eqn.params["dimension_numbers"]
            operand, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            total += 2.0 * math.prod(out) * math.prod(operand[i] for i in over)
        elif eqn.primitive.name == "cond":
            total += max(_count(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            inner = sum(_count(sub) for value in eqn.params.values() for sub in _jaxprs(value))
            total += inner * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else inner
    return total


def _jaxprs(value) -> list:
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr"):
        return [value.jaxpr]
    return [sub for item in value for sub in _jaxprs(item)] if isinstance(value, (tuple, list)) else []
