"""The divergences and their gradients on GPU (Pallas, Triton), a tile of tokens and vocabulary at a time.

As `objectives.kernel`, except that the last product, slopes @ W, is XLA's: a GPU has no memory beside its units that
holds the gradients of a tile of tokens. The first kernel multiplies and reduces each tile of logits while it has it;
the second makes the divergence's terms and slopes from them in one pass. A mean between the two is XLA's as well. Never
run on a GPU so far: interpreted, and lowered to Triton.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxbake.chip import chip
from jaxbake.objectives.inputs import Divergence, Heads, Tokens
from jaxbake.objectives.logits import dot_settings
from jaxbake.objectives.sums import ABSENT, vocab_sum
from jaxbake.objectives.terms import MEANS, Known, Sums, above_centre, find_targets, join, terms

TOKENS, VOCAB, WIDTH = 64, 128, 64  # of a tile, and the step along the width; powers of two


class _Side(NamedTuple):
    """What makes the student's or the teacher's logits."""

    hidden: Any
    table: Any


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
    grid = (pl.cdiv(count, TOKENS), pl.cdiv(vocab, VOCAB))
    padded = (grid[0] * TOKENS, grid[1] * VOCAB)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    of_both = pl.BlockSpec((TOKENS, VOCAB), lambda i, j: (i, j))
    of_tile = pl.BlockSpec((1, TOKENS), lambda i, j: (j, i))
    of_tokens = pl.BlockSpec((TOKENS,), lambda i, j: (i,))
    whole = jax.ShapeDtypeStruct(padded, jnp.float32)
    per_tile = jax.ShapeDtypeStruct((grid[1], padded[0]), jnp.float32)
    call = partial(pl.pallas_call, grid=grid, interpret=interpret)

    sides = [_Side(tokens.hidden_ND, heads.student_VD)]
    if (teacher := tokens.teacher) is not None:
        sides.append(_Side(teacher, heads.student_VD if heads.teacher_VE is None else heads.teacher_VE))
    sums = Sums(*[per_tile] * 2 * len(sides), gap=per_tile if how.name in MEANS else None)
    logits, sums = call(
        partial(_logits_kernel, how=how, count=count),
        in_specs=[anywhere, jax.tree.map(lambda _: anywhere, sides)],
        out_specs=([of_both] * len(sides), jax.tree.map(lambda _: of_tile, sums)),
        out_shape=([whole] * len(sides), sums),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        name="kl_logits",
    )(valid, sides)
    known, found_C1 = join(how, jax.tree.map(jnp.transpose, sums), axes), None
    if how.name == "cross_entropy":
        targets_C = jnp.pad(tokens.targets_N, (0, padded[0] - count))
        target_C1, found_C1 = find_targets(targets_C, heads.first, valid[0], axes)
        known = known._replace(target=target_C1)
    if how.name in MEANS:
        above = jnp.where(jnp.arange(padded[1]) < valid, above_centre(how, *logits, known), 0)
        known = known._replace(mean=vocab_sum(above, axes)[:, None])
    slopes, losses = call(
        partial(_terms_kernel, how=how),
        in_specs=[anywhere, [of_both] * len(sides), jax.tree.map(lambda _: of_tokens, known)],
        out_specs=(of_both, of_tile),
        out_shape=(jax.ShapeDtypeStruct(padded, heads.student_VD.dtype), per_tile),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        name="kl_terms",
    )(valid, logits, jax.tree.map(lambda x: x[:, 0], known))
    slopes_CV, loss_C = slopes[:count, :vocab], vocab_sum(losses.T, axes)[:count]
    grad_CD = jnp.einsum("cv,vd->cd", slopes_CV, heads.student_VD, **dot_settings(slopes_CV, heads.student_VD))
    if found_C1 is not None:  # no such token: no loss and no gradient
        found_C1 = found_C1[:count]
        loss_C, grad_CD = jnp.where(found_C1[:, 0], loss_C, jnp.nan), jnp.where(found_C1, grad_CD, jnp.nan)
    return loss_C, grad_CD / how.temperature


def _logits_kernel(valid_ref, sides: list[_Side], logits: list, sums: Sums, *, how: Divergence, count: int):
    i, j = pl.program_id(0), pl.program_id(1)
    real = j * VOCAB + jnp.arange(VOCAB) < valid_ref[0]
    made, peaks = [], []
    for n, (hidden_ref, table_ref) in enumerate(sides):
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
        softcap = (how.softcap, how.teacher_softcap)[n]
        if softcap is not None:
            x = softcap * jnp.tanh(x / softcap)
        x = jnp.where(real[None], x / how.temperature, ABSENT)
        peak = jnp.max(x, axis=1)
        logits[n][...] = x
        sums[2 * n][0, :] = peak
        sums[2 * n + 1][0, :] = jnp.sum(jnp.where(real[None], jnp.exp(x - peak[:, None]), 0.0), axis=1)
        made.append(x)
        peaks.append(peak)
    if sums.gap is not None:
        s, t = made
        sums.gap[0, :] = jnp.max(jnp.where(s == peaks[0][:, None], t - s, -jnp.inf), axis=1)


def _terms_kernel(valid_ref, logits: list, known: Known, slope_ref, loss_ref, *, how: Divergence):
    columns = pl.program_id(1) * VOCAB + jnp.arange(VOCAB)[None]
    s, t = logits[0][...], logits[1][...] if len(logits) > 1 else None
    term, slope = terms(how, s, t, jax.tree.map(lambda ref: ref[...][:, None], known), columns)
    real = columns < valid_ref[0]
    slope_ref[...] = jnp.where(real, slope, 0.0).astype(slope_ref.dtype)
    loss_ref[0, :] = jnp.sum(jnp.where(real, term, 0.0), axis=1)
