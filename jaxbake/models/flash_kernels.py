"""Flash attention's Pallas kernels for TPU: one tile of queries and keys at a time, all heads of a group with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxbake.models.flash_tiles import PART, WHOLE

MASKED = -1e30
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Settings:
    """Static: tile sizes in queries (of each head of a group) and keys, forward and backward, and how to run."""

    scale: float
    softcap: float | None
    tiles: tuple[int, int, int, int]
    interpret: bool


def forward_kernel(plan_ref, q_ref, *refs, how: Settings, starts: list[int], groups: int):
    *of_blocks, out_ref, lse_ref, sum_ref, peak_ref, total_ref = refs
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    h = sum_ref.shape[1]

    @pl.when(j == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        peak_ref[...] = jnp.full_like(peak_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)

    def accumulate(k_ref, v_ref, of_queries_ref, of_keys_ref, masked: bool):
        k, vt = k_ref[0], v_ref[0].T
        seen = _seen(of_queries_ref, of_keys_ref) if masked else None
        for g in range(groups):
            score, _ = _scores(how, k, q_ref[0, :, g * h : (g + 1) * h])
            if masked:
                score = jnp.where(seen, score, MASKED)
            before = peak_ref[g]
            peak = jnp.maximum(before, jnp.max(score, axis=0, keepdims=True))
            weight = jnp.exp2(score - peak)
            if masked:  # where a query has seen no key yet, the peak is MASKED too
                weight = jnp.where(seen, weight, 0.0)
            shrink = jnp.exp2(before - peak)
            total_ref[g] = total_ref[g] * shrink + jnp.sum(weight, axis=0, keepdims=True)
            sum_ref[g] = sum_ref[g] * shrink + _dot(vt, weight.astype(vt.dtype), 1, 0)
            peak_ref[g] = peak

    what = plan_ref[b, i, j]
    for n, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        block, here = of_blocks[4 * n : 4 * n + 4], (j >= start) & (j < end)
        pl.when(here & (what == PART))(partial(accumulate, *block, masked=True))
        pl.when(here & (what == WHOLE))(partial(accumulate, *block, masked=False))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        for g in range(groups):
            total = total_ref[g]
            none = total == 0
            out_ref[0, :, g * h : (g + 1) * h] = (sum_ref[g] / jnp.where(none, 1.0, total)).T.astype(out_ref.dtype)
            lse = (peak_ref[g] + jnp.log2(jnp.where(none, 1.0, total))) / _LOG2E
            lse_ref[0, 0, g, :] = jnp.where(none, MASKED, lse)[0]


def backward_kernel(
    plan_ref, q_ref, k_ref, v_ref, grad_ref, out_ref, lse_ref, of_queries_ref, of_keys_ref, dq_ref, dk_ref, dv_ref,
    dq_sum, mean_ref, dk_sum, dv_sum, kt_ref, *, how: Settings,
):  # fmt: skip
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    groups, h = dq_sum.shape[1:3]
    heads = [slice(g * h, (g + 1) * h) for g in range(groups)]

    @pl.when(j == 0)
    def _():
        dq_sum[i] = jnp.zeros_like(dq_sum[i])
        for g, head in enumerate(heads):  # mean, under the softmax, of what a key's weight gains: a row, by a product
            gain = grad_ref[0, :, head].astype(jnp.float32) * out_ref[0, :, head].astype(jnp.float32)
            mean_ref[i, g] = _dot(jnp.ones((8, h), jnp.float32), gain, 1, 1)

    @pl.when(i == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)
        kt_ref[...] = k_ref[0].T

    def accumulate(masked: bool):
        k, kt, v = k_ref[0], kt_ref[...], v_ref[0]
        seen = _seen(of_queries_ref, of_keys_ref) if masked else None
        for g, head in enumerate(heads):
            q, grad = q_ref[0, :, head], grad_ref[0, :, head]
            score, slope = _scores(how, k, q)
            weight = jnp.exp2(score - lse_ref[0, 0, g, :][None] * _LOG2E)
            if masked:
                weight = jnp.where(seen, weight, 0.0)
            dv_sum[...] += _dot(weight.astype(grad.dtype), grad, 1, 0)
            dscore = weight * (_dot(v, grad, 1, 1) - mean_ref[i, g, 0:1])
            if slope is not None:
                dscore = dscore * slope
            dscore = dscore.astype(q.dtype)
            dk_sum[...] += _dot(dscore, q, 1, 0)
            dq_sum[i, g] += _dot(kt, dscore, 1, 0)

    what = plan_ref[b, i, j]
    pl.when(what == PART)(partial(accumulate, masked=True))
    pl.when(what == WHOLE)(partial(accumulate, masked=False))

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        dk_ref[0] = (dk_sum[...] * how.scale).astype(dk_ref.dtype)
        dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        for g, head in enumerate(heads):
            dq_ref[0, :, head] = (dq_sum[i, g] * how.scale).T.astype(dq_ref.dtype)


def _scores(how: Settings, k: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scores [keys, queries] in units of log 2, and the slope of the soft cap if there is one."""
    score = _dot(k, q, 1, 1)
    if how.softcap is None:
        return score * (how.scale * _LOG2E), None
    bent = jnp.tanh(score * (how.scale / how.softcap))
    return bent * (how.softcap * _LOG2E), 1 - bent * bent


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _seen(of_queries_ref, of_keys_ref) -> jax.Array:
    """The mask [keys, queries] of a tile."""
    position, segment = of_keys_ref[0, :, 0:1], of_keys_ref[0, :, 1:2]
    first, last, own = (of_queries_ref[0, n, :][None] for n in range(3))
    return (position >= first) & (position <= last) & (segment == own)
