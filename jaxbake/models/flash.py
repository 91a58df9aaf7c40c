"""Flash attention on TPU (Pallas) over several blocks of keys, some of them shared by all rows.

FlashAttention-2 (arXiv 2307.08691) with what jax's splash attention does not take: a mask from per-query bounds on the
keys' positions (a prefix seen in part, a window that is traced because layers are scanned), and a backward pass that
starts from the log-sum-exp over all blocks. Scores lie as [keys, queries], so that the softmax reduces over sublanes
and its statistics are rows; the query heads of a group share each tile of keys and its mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

if TYPE_CHECKING:
    from jaxbake.models.attention import Keys, Seen

MASKED = -1e30
_FAR = jnp.iinfo(jnp.int32).max
_LOG2E = math.log2(math.e)
_SKIP, _PART, _WHOLE = 0, 1, 2  # what a tile of scores needs: nothing, the mask, no mask


TILES = {
    "TPU v5 lite": (512, 512, 512, 512),
    "TPU v5": (512, 512, 512, 512),
    "TPU v6 lite": (512, 1024, 512, 512),
}
"""Queries and keys of a tile, forward and backward, by chip. By the compiler's schedules (4 heads of size 128 a key
head, bfloat16), cycles per 1,000 scores, forward: v5e 5.3 at 256 x 512, 5.2 at 512 x 512, 5.8 at 256 x 1024; v6e 3.6 at
512 x 512, 3.2 at 512 x 1024. Backward: v5e 10.1 at 256 x 256, 9.4 at 256 x 512, 9.0 at 512 x 512; v6e 4.6 there."""
TILES_ELSEWHERE = (512, 512, 512, 512)


class Bounds(NamedTuple):
    """Which keys each query sees: positions first <= p <= last and the same segment. All int32.

    first, last, segments: [B, T]; key_positions, key_segments: [B, S], or [1, S] where all rows share the keys.
    """

    first: jax.Array
    last: jax.Array
    segments: jax.Array
    key_positions: jax.Array
    key_segments: jax.Array


@dataclass(frozen=True)
class Settings:
    """Static: tile sizes in queries (of each head of a group) and keys, forward and backward, and how to run."""

    scale: float
    softcap: float | None
    tiles: tuple[int, int, int, int]
    interpret: bool


def attend(
    q_BTNH: jax.Array,
    blocks: list[Keys],
    *,
    scale: float,
    softcap: float | None = None,
    kind: str = "",
    interpret: bool = False,
    tiles: tuple[int, int, int, int] | None = None,
) -> jax.Array:
    """`attention.attend` by these kernels; returns [B, T, N * H], differentiable in queries, keys and values.

    Heads are read where they lie, as columns, so nothing is transposed; their size is padded to whole lanes (128).

    kind: the chip's `device_kind`, which the tile sizes depend on; tiles: sizes to take instead.
    """
    b, t, n, h = q_BTNH.shape
    tiles = tiles or TILES.get(kind, TILES_ELSEWHERE)
    how = Settings(float(scale), None if softcap is None else float(softcap), tiles, interpret)

    def columns(x: jax.Array) -> jax.Array:
        x = _pad(x if x.ndim == 4 else x[None], 3, 128)
        return x.reshape(*x.shape[:2], -1)

    keys = [(columns(block.k), columns(block.v)) for block in blocks]
    bounds = [_bounds(block.seen) for block in blocks]
    out = _attend(how, blocks[0].k.shape[-2], columns(q_BTNH), keys, bounds)
    return out if h % 128 == 0 else out.reshape(b, t, n, -1)[..., :h].reshape(b, t, n * h)


def _bounds(seen: Seen) -> Bounds:
    last = jnp.asarray(seen.last, jnp.int32)
    first = jnp.full_like(last, -_FAR) if seen.first is None else jnp.asarray(seen.first, jnp.int32)
    positions = jnp.asarray(seen.positions, jnp.int32).reshape(-1, seen.positions.shape[-1])
    if seen.segments is None:
        return Bounds(first, last, jnp.zeros_like(last), positions, jnp.zeros_like(positions))
    own, theirs = jnp.asarray(seen.segments, jnp.int32), jnp.asarray(seen.key_segments, jnp.int32)
    return Bounds(first, last, own, positions, theirs)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(how: Settings, kv_heads: int, q_BTX: jax.Array, keys: list, bounds: list[Bounds]) -> jax.Array:
    """The queries' heads in columns [B, T, N * H], keys and values likewise [B or 1, S, K * H]."""
    return flash_forward(how, kv_heads, q_BTX, keys, bounds)[0]


def _attend_fwd(how, kv_heads, q, keys, bounds):
    out, lse = flash_forward(how, kv_heads, q, keys, bounds)
    return out, (q, keys, bounds, out, lse)


def _attend_bwd(how, kv_heads, saved, grad):
    q, keys, bounds, out, lse = saved
    b, t, columns = q.shape
    dtype = q.dtype if len(keys) == 1 else jnp.float32
    dq, dkeys = None, []
    for (k, v), bound in zip(keys, bounds, strict=True):
        of_queries = q, grad, out, lse, bound
        if k.shape[0] < b:  # shared keys: all rows' queries as one row
            wide = (x.reshape(1, b * t, columns) for x in (q, grad, out))
            lse_wide = lse.transpose(1, 2, 0, 3).reshape(1, *lse.shape[1:3], b * t)
            of_queries = *wide, lse_wide, Bounds(*(x.reshape(1, b * t) for x in bound[:3]), *bound[3:])
        one, dk, dv = flash_backward(how, kv_heads, k, v, *of_queries, dtype)
        dq = one.reshape(q.shape) if dq is None else dq + one.reshape(q.shape)
        dkeys.append((dk.astype(k.dtype), dv.astype(v.dtype)))
    return dq.astype(q.dtype), dkeys, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def flash_forward(
    how: Settings, kv_heads: int, q_BTX: jax.Array, keys: list, bounds: list[Bounds]
) -> tuple[jax.Array, jax.Array]:
    """Attention over all blocks of keys, one after another: (out [B, T, N * H], log-sum-exp [B, K, G, T], float32).

    Queries that see no key give zeros and `MASKED`.
    """
    b, t, _ = q_BTX.shape
    h = keys[0][0].shape[2] // kv_heads
    groups = q_BTX.shape[2] // (kv_heads * h)
    bq = _tile(how.tiles[0], t)
    q = _pad(q_BTX, 1, bq)
    starts, plans, operands, specs = [0], [], [], []
    for (k, v), bound in zip(keys, bounds, strict=True):
        bk = _tile(how.tiles[1], k.shape[1])
        k, v = _pad(k, 1, bk), _pad(v, 1, bk)
        plan, of_queries, of_keys = _plan(bound, bq, bk)
        start, count, own = starts[-1], k.shape[1] // bk, k.shape[0] == b

        def at(b, j, start=start, count=count, own=own):
            return (b if own else 0), jnp.clip(j - start, 0, count - 1)

        def at_columns(b, n, i, j, _, at=at):
            return (*at(b, j), n)

        def at_rows(b, n, i, j, _, at=at):
            return (*at(b, j), 0)

        operands += [k, v, of_queries, of_keys]
        specs += [pl.BlockSpec((1, bk, h), at_columns)] * 2
        specs += [pl.BlockSpec((1, 3, bq), lambda b, n, i, j, _: (b, 0, i)), pl.BlockSpec((1, bk, 2), at_rows)]
        plans.append(plan)
        starts.append(start + count)
    tile_of_queries = pl.BlockSpec((1, bq, groups * h), lambda b, n, i, j, _: (b, i, n))
    out, lse = pl.pallas_call(
        partial(_forward_kernel, how=how, starts=starts, groups=groups),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, kv_heads, q.shape[1] // bq, starts[-1]),
            in_specs=[tile_of_queries, *specs],
            out_specs=[tile_of_queries, pl.BlockSpec((1, 1, groups, bq), lambda b, n, i, j, _: (b, n, 0, i))],
            scratch_shapes=[
                pltpu.VMEM((groups, h, bq), jnp.float32),
                pltpu.VMEM((groups, 1, bq), jnp.float32),
                pltpu.VMEM((groups, 1, bq), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((b, kv_heads, groups, q.shape[1]), jnp.float32),
        ],
        compiler_params=_compiler_params("parallel", "parallel", "parallel", "arbitrary"),
        cost_estimate=_cost(4, q, sum(k.shape[1] for k, _ in keys), h),
        interpret=how.interpret,
        name="flash_forward",
    )(jnp.concatenate(plans, 2), q, *operands)
    return out[:, :t], lse[..., :t]


def flash_backward(
    how: Settings,
    kv_heads: int,
    k_BSX: jax.Array,
    v_BSX: jax.Array,
    q_BTX: jax.Array,
    grad_BTX: jax.Array,
    out_BTX: jax.Array,
    lse_BKGT: jax.Array,
    bounds: Bounds,
    dtype=jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients by q, k and v through one block of keys of a softmax over perhaps several; the first in `dtype`.

    grad, out: gradient by, and value of, the attention over all blocks; lse: its log-sum-exp. The queries' gradient is
    held in VMEM for a whole row, so very long rows are taken in pieces.
    """
    b, t, _ = q_BTX.shape
    h, s = k_BSX.shape[2] // kv_heads, k_BSX.shape[1]
    groups = q_BTX.shape[2] // (kv_heads * h)
    most = _longest_row(groups * h)
    if t > most:
        dq, dk, dv = [], 0.0, 0.0
        for i in range(0, t, most):
            part = slice(i, i + most)
            near = Bounds(*(x[:, part] for x in bounds[:3]), *bounds[3:])
            of_queries = *(x[:, part] for x in (q_BTX, grad_BTX, out_BTX)), lse_BKGT[..., part], near
            one, dk_part, dv_part = flash_backward(how, kv_heads, k_BSX, v_BSX, *of_queries, dtype)
            dq, dk, dv = [*dq, one], dk + dk_part.astype(jnp.float32), dv + dv_part.astype(jnp.float32)
        return jnp.concatenate(dq, 1), dk, dv

    bq, bk = _tile(how.tiles[2], t), _tile(how.tiles[3], s)
    q, grad, out = (_pad(x, 1, bq) for x in (q_BTX, grad_BTX, out_BTX))
    k, v, lse = _pad(k_BSX, 1, bk), _pad(v_BSX, 1, bk), _pad(lse_BKGT, 3, bq)
    plan, of_queries, of_keys = _plan(bounds, bq, bk)
    tq, tk = q.shape[1] // bq, k.shape[1] // bk
    tile_of_queries = pl.BlockSpec((1, bq, groups * h), lambda b, n, j, i, _: (b, i, n))
    tile_of_keys = pl.BlockSpec((1, bk, h), lambda b, n, j, i, _: (b, j, n))
    dq, dk, dv = pl.pallas_call(
        partial(_backward_kernel, how=how),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, kv_heads, tk, tq),
            in_specs=[
                tile_of_queries,
                tile_of_keys,
                tile_of_keys,
                tile_of_queries,
                tile_of_queries,
                pl.BlockSpec((1, 1, groups, bq), lambda b, n, j, i, _: (b, n, 0, i)),
                pl.BlockSpec((1, 3, bq), lambda b, n, j, i, _: (b, 0, i)),
                pl.BlockSpec((1, bk, 2), lambda b, n, j, i, _: (b, j, 0)),
            ],
            out_specs=[  # the queries' gradient leaves with the last tile of keys
                pl.BlockSpec((1, bq, groups * h), lambda b, n, j, i, _: (b, jnp.where(j == tk - 1, i, 0), n)),
                tile_of_keys,
                tile_of_keys,
            ],
            scratch_shapes=[
                pltpu.VMEM((tq, groups, h, bq), jnp.float32),
                pltpu.VMEM((tq, groups, 8, bq), jnp.float32),
                pltpu.VMEM((bk, h), jnp.float32),
                pltpu.VMEM((bk, h), jnp.float32),
                pltpu.VMEM((h, bk), k.dtype),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        compiler_params=_compiler_params("parallel", "parallel", "arbitrary", "arbitrary"),
        cost_estimate=_cost(10, q, s, h),
        interpret=how.interpret,
        name="flash_backward",
    )(plan, q, k, v, grad, out, lse, of_queries, of_keys)
    return dq[:, :t], dk[:, :s], dv[:, :s]


def _forward_kernel(plan_ref, q_ref, *refs, how: Settings, starts: list[int], groups: int):
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
        pl.when(here & (what == _PART))(partial(accumulate, *block, masked=True))
        pl.when(here & (what == _WHOLE))(partial(accumulate, *block, masked=False))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        for g in range(groups):
            total = total_ref[g]
            none = total == 0
            out_ref[0, :, g * h : (g + 1) * h] = (sum_ref[g] / jnp.where(none, 1.0, total)).T.astype(out_ref.dtype)
            lse = (peak_ref[g] + jnp.log2(jnp.where(none, 1.0, total))) / _LOG2E
            lse_ref[0, 0, g, :] = jnp.where(none, MASKED, lse)[0]


def _backward_kernel(
    plan_ref, q_ref, k_ref, v_ref, grad_ref, out_ref, lse_ref, of_queries_ref, of_keys_ref, dq_ref, dk_ref, dv_ref,
    dq_sum, mean_ref, dk_sum, dv_sum, kt_ref, *, how: Settings,
):  # fmt: skip
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    groups, h = dq_sum.shape[1:3]
    heads = [slice(g * h, (g + 1) * h) for g in range(groups)]

    @pl.when(j == 0)
    def _():
        dq_sum[i] = jnp.zeros_like(dq_sum[i])
        for g, head in enumerate(
            heads
        ):  # the mean under the softmax of what a key's weight gains; as a row, by a product
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
    pl.when(what == _PART)(partial(accumulate, masked=True))
    pl.when(what == _WHOLE)(partial(accumulate, masked=False))

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


def _plan(bounds: Bounds, bq: int, bk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What each tile needs [B, T / bq, S / bk], and the bounds as the kernels read them, [B, 3, T] and [B, S, 2].

    Judged from each tile's smallest and largest bounds; queries and keys added as padding see and show nothing.
    """
    first, last, own = (_pad(x, 1, bq, fill) for x, fill in zip(bounds[:3], (_FAR, -1, 0), strict=True))
    position, segment = (_pad(x, 1, bk, fill) for x, fill in zip(bounds[3:], (_FAR, 0), strict=True))

    def ends(x, size, axis):
        x = x.reshape(x.shape[0], -1, size)
        return jnp.expand_dims(x.min(-1), axis), jnp.expand_dims(x.max(-1), axis)

    (first_min, first_max), (last_min, last_max), (own_min, own_max) = (ends(x, bq, 2) for x in (first, last, own))
    (low, high), (segment_min, segment_max) = (ends(x, bk, 1) for x in (position, segment))
    none = (low > last_max) | (high < first_min) | (segment_min > own_max) | (segment_max < own_min)
    one = (segment_min == segment_max) & (own_min == own_max) & (segment_min == own_min)
    whole = (high <= last_min) & (low >= first_max) & one
    plan = jnp.where(none, _SKIP, jnp.where(whole, _WHOLE, _PART)).astype(jnp.int32)
    return plan, jnp.stack([first, last, own], 1), jnp.stack([position, segment], 2)


def _tile(wanted: int, length: int) -> int:
    """The tile size: at most what is wanted, in whole lanes (128) where that is, with little padding."""
    lanes = min(wanted, 128)
    tiles = -(-length // wanted)
    return -(-length // (tiles * lanes)) * lanes


def _pad(x: jax.Array, axis: int, multiple: int, fill: int = 0) -> jax.Array:
    more = -x.shape[axis] % multiple
    if not more:
        return x
    return jnp.pad(x, [(0, more if n == axis else 0) for n in range(x.ndim)], constant_values=fill)


def _longest_row(columns: int) -> int:
    """Queries whose float32 gradient takes at most 16 MiB of VMEM, a multiple of 1024."""
    return max(1, 2**22 // columns // 1024) * 1024


def _compiler_params(*semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=96 * 2**20)


def _cost(products: int, q: jax.Array, keys: int, head: int) -> pl.CostEstimate:
    """For XLA's scheduler, as if every tile were needed; a matrix product counts as 2."""
    scores = q.shape[0] * q.shape[1] * q.shape[2] // head * keys
    return pl.CostEstimate(
        flops=products * scores * head, transcendentals=scores, bytes_accessed=3 * q.size * q.dtype.itemsize
    )
