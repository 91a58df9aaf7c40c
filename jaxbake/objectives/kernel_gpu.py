"""Forward KL and its gradient on GPU (Pallas, Triton), a tile of tokens and vocabulary at a time.

As `objectives.kernel`, except that the last product, (q - p) @ W, is XLA's: a GPU has no memory beside its units that
holds the gradients of a tile of tokens. The first kernel multiplies and reduces each tile of logits while it has it;
the second makes the divergence's terms and q - p from them in one pass. Never run on a GPU so far: interpreted, and
lowered to Triton.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxbake.chip import chip
from jaxbake.objectives.inputs import Divergence, Heads, Tokens, dot_settings
from jaxbake.objectives.kernel import ABSENT, kl_term

TOKENS, VOCAB, WIDTH = 64, 128, 64  # of a tile, and the step along the width; powers of two


def loss_and_grad(
    how: Divergence,
    tokens: Tokens,
    heads: Heads,
    *,
    valid: jax.Array | None = None,
    axes: tuple[str, ...] = (),
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `objectives.kernel.loss_and_grad`; interpreted by default where there is no GPU."""
    interpret = chip().platform != "gpu" if interpret is None else interpret
    count, vocab = tokens.hidden_ND.shape[0], heads.student_VD.shape[0]
    valid = jnp.full((1,), vocab, jnp.int32) if valid is None else jnp.asarray(valid, jnp.int32).reshape(1)
    tables = heads.student_VD, heads.student_VD if heads.teacher_VE is None else heads.teacher_VE
    states = tokens.hidden_ND, tokens.teacher_hidden_NE
    grid = (pl.cdiv(count, TOKENS), pl.cdiv(vocab, VOCAB))
    padded = (grid[0] * TOKENS, grid[1] * VOCAB)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    tile = pl.BlockSpec((TOKENS, VOCAB), lambda i, j: (i, j))
    row = pl.BlockSpec((1, TOKENS), lambda i, j: (j, i))
    logits = jax.ShapeDtypeStruct(padded, jnp.float32)
    per_tile = jax.ShapeDtypeStruct((grid[1], padded[0]), jnp.float32)
    call = partial(pl.pallas_call, grid=grid, interpret=interpret)
    s, t, *sums = call(
        partial(_logits_kernel, how=how, count=count),
        in_specs=[anywhere] * 5,
        out_specs=[tile, tile, row, row, row, row],
        out_shape=[logits, logits] + [per_tile] * 4,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        name="kl_logits",
    )(valid, *states, *tables)
    statistics = [x for pair in (sums[:2], sums[2:]) for x in _join(*pair, axes)]
    slopes, terms = call(
        partial(_terms_kernel, how=how),
        in_specs=[anywhere, tile, tile] + [pl.BlockSpec((TOKENS,), lambda i, j: (i,))] * 4,
        out_specs=[tile, row],
        out_shape=[jax.ShapeDtypeStruct(padded, heads.student_VD.dtype), per_tile],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        name="kl_terms",
    )(valid, s, t, *statistics)
    slopes = slopes[:count, :vocab]
    grad = jnp.einsum("cv,vd->cd", slopes, heads.student_VD, **dot_settings(slopes, heads.student_VD))
    loss = jnp.sum(terms, axis=0)[:count]
    return lax.psum(loss, axes) if axes else loss, grad / how.temperature


def _join(peak_JC: jax.Array, total_JC: jax.Array, axes: tuple[str, ...]) -> list[jax.Array]:
    """Maximum and log of the sum of exp(logit - maximum) [C], over tiles and devices."""
    peak_C = jnp.max(peak_JC, axis=0)
    peak_C = lax.pmax(peak_C, axes) if axes else peak_C
    total_C = jnp.sum(total_JC * jnp.exp(peak_JC - peak_C), axis=0)
    return [peak_C, jnp.log(lax.psum(total_C, axes) if axes else total_C)]


def _logits_kernel(
    valid_ref, student_ref, teacher_ref, head_ref, teacher_head_ref, s_ref, t_ref, *sums, how: Divergence, count: int
):
    i, j = pl.program_id(0), pl.program_id(1)
    real = j * VOCAB + jnp.arange(VOCAB) < valid_ref[0]
    sides = (
        (student_ref, head_ref, how.softcap, s_ref, *sums[:2]),
        (teacher_ref, teacher_head_ref, how.teacher_softcap, t_ref, *sums[2:]),
    )
    for hidden_ref, table_ref, softcap, out_ref, peak_ref, total_ref in sides:
        width = hidden_ref.shape[1]
        dtype = jnp.promote_types(hidden_ref.dtype, table_ref.dtype)

        def add(at, x, hidden_ref=hidden_ref, table_ref=table_ref, width=width, dtype=dtype):
            inside = at * WIDTH + jnp.arange(WIDTH) < width

            def load(ref, start, size, length):
                rows = start + jnp.arange(size) < length
                part = ref.at[pl.ds(start, size), pl.ds(at * WIDTH, WIDTH)]
                return plgpu.load(part, mask=rows[:, None] & inside[None], other=0.0).astype(dtype)

            hidden = load(hidden_ref, i * TOKENS, TOKENS, count)
            table = load(table_ref, j * VOCAB, VOCAB, table_ref.shape[0])
            precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
            return x + plgpu.dot(hidden, table, trans_b=True, precision=precision)

        x = lax.fori_loop(0, pl.cdiv(width, WIDTH), add, jnp.zeros((TOKENS, VOCAB), jnp.float32))
        if softcap is not None:
            x = softcap * jnp.tanh(x / softcap)
        x = jnp.where(real[None], x / how.temperature, ABSENT)
        peak = jnp.max(x, axis=1)
        out_ref[...] = x
        peak_ref[0, :] = peak
        total_ref[0, :] = jnp.sum(jnp.where(real[None], jnp.exp(x - peak[:, None]), 0.0), axis=1)


def _terms_kernel(
    valid_ref, s_ref, t_ref, s_peak_ref, s_log_ref, t_peak_ref, t_log_ref, slope_ref, term_ref, *, how: Divergence
):
    real = pl.program_id(1) * VOCAB + jnp.arange(VOCAB) < valid_ref[0]
    s, t = s_ref[...], t_ref[...]
    s_peak, s_log, t_peak, t_log = (ref[...][:, None] for ref in (s_peak_ref, s_log_ref, t_peak_ref, t_log_ref))
    q, p = jnp.exp((s - s_peak) - s_log), jnp.exp((t - t_peak) - t_log)
    term = kl_term(p, q, (t - s) - ((t_peak - s_peak) + (t_log - s_log)))
    slope = q - p
    if how.softcap is not None:
        slope *= 1 - jnp.square(s * (how.temperature / how.softcap))
    slope_ref[...] = jnp.where(real[None], slope, 0.0).astype(slope_ref.dtype)
    term_ref[0, :] = jnp.sum(jnp.where(real[None], term, 0.0), axis=1)
