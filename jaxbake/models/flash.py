"""Flash attention on TPU (Pallas) over several blocks of keys, some of them shared by all rows.

FlashAttention-2 (arXiv 2307.08691) with what jax's splash attention does not take: a mask from per-query bounds on the
keys' positions (a prefix seen in part, a window that is traced because layers are scanned), and a backward pass that
starts from the log-sum-exp over all blocks. Scores lie as [keys, queries], so that the softmax reduces over sublanes
and its statistics are rows; the query heads of a group share each tile of keys and its mask.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxbake.models.flash_kernels import Settings, backward_kernel, forward_kernel
from jaxbake.models.flash_tiles import TILES, TILES_ELSEWHERE, Bounds, bounds_of, pad, plan_tiles, tile_size

if TYPE_CHECKING:
    from jaxbake.models.attention import Keys


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
        x = pad(x if x.ndim == 4 else x[None], 3, 128)
        return x.reshape(*x.shape[:2], -1)

    keys = [(columns(block.k), columns(block.v)) for block in blocks]
    bounds = [bounds_of(block.seen) for block in blocks]
    out = _attend(how, blocks[0].k.shape[-2], columns(q_BTNH), keys, bounds)
    return out if h % 128 == 0 else out.reshape(b, t, n, -1)[..., :h].reshape(b, t, n * h)


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
    bq = tile_size(how.tiles[0], t)
    q = pad(q_BTX, 1, bq)
    starts, plans, operands, specs = [0], [], [], []
    for (k, v), bound in zip(keys, bounds, strict=True):
        bk = tile_size(how.tiles[1], k.shape[1])
        k, v = pad(k, 1, bk), pad(v, 1, bk)
        plan, of_queries, of_keys = plan_tiles(bound, bq, bk)
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
        partial(forward_kernel, how=how, starts=starts, groups=groups),
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

    bq, bk = tile_size(how.tiles[2], t), tile_size(how.tiles[3], s)
    q, grad, out = (pad(x, 1, bq) for x in (q_BTX, grad_BTX, out_BTX))
    k, v, lse = pad(k_BSX, 1, bk), pad(v_BSX, 1, bk), pad(lse_BKGT, 3, bq)
    plan, of_queries, of_keys = plan_tiles(bounds, bq, bk)
    tq, tk = q.shape[1] // bq, k.shape[1] // bk
    tile_of_queries = pl.BlockSpec((1, bq, groups * h), lambda b, n, j, i, _: (b, i, n))
    tile_of_keys = pl.BlockSpec((1, bk, h), lambda b, n, j, i, _: (b, j, n))
    dq, dk, dv = pl.pallas_call(
        partial(backward_kernel, how=how),
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
