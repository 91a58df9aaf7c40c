"""The divergences and their gradients on a CPU, a tile of the vocabulary at a time (XLA).

As `objectives.kernel`, but that the logits of a chunk of tokens are made at once: a product cannot write its tile
into an array of all, it would be copied there. The first sweep reduces them; the last one has the divergence's terms
and slopes, and adds slopes @ W up, a tile's rows at a time: over the whole vocabulary at once XLA's product is slower.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxbake.objectives.inputs import Divergence, Heads, Tokens
from jaxbake.objectives.logits import dot_settings, student_logits, teacher_logits
from jaxbake.objectives.sums import vocab_sum
from jaxbake.objectives.terms import MEANS, Sums, above_centre, find_targets, join, terms
from jaxbake.objectives.tiles import Tile, sweep


def loss_and_grad(
    how: Divergence,
    tokens: Tokens,
    heads: Heads,
    *,
    valid: jax.Array | None = None,
    axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """As `objectives.kernel.loss_and_grad`."""
    count, vocab = tokens.hidden_ND.shape[0], heads.student_VD.shape[0]
    heads = heads._replace(valid=None)  # what is not real is masked a tile at a time
    s_CV = student_logits(how, tokens, heads)
    t_CV = None if tokens.teacher is None else teacher_logits(how, tokens, heads)
    s_CV, t_CV = lax.optimization_barrier((s_CV, t_CV))
    heads = heads._replace(valid=valid)

    def of(tile: Tile) -> tuple[jax.Array, jax.Array | None]:
        return tile.of(s_CV), None if t_CV is None else tile.of(t_CV)

    def normalise(_: None, tile: Tile) -> tuple[None, Sums]:
        s, t = of(tile)
        peak, total = _softmax(s)
        if t is None:
            return None, Sums(peak, total)
        gap = jnp.max(jnp.where(s == peak[:, None], t - s, -jnp.inf), axis=1) if how.name in MEANS else None
        return None, Sums(peak, total, *_softmax(t), gap)

    _, sums = sweep(normalise, None, heads)
    known, found_C1 = join(how, jax.tree.map(jnp.transpose, sums), axes), None
    if how.name == "cross_entropy":
        target_C1, found_C1 = find_targets(tokens.targets_N, heads.first, vocab if valid is None else valid, axes)
        known = known._replace(target=target_C1)
    if how.name in MEANS:

        def above(total_C: jax.Array, tile: Tile) -> tuple[jax.Array, None]:
            return total_C + jnp.sum(_real(tile, above_centre(how, *of(tile), known)), axis=1), None

        mean_C, _ = sweep(above, jnp.zeros(count, known.s_log.dtype), heads)
        known = known._replace(mean=vocab_sum(mean_C[:, None], axes)[:, None])

    def weigh(carry: tuple[jax.Array, jax.Array], tile: Tile) -> tuple[tuple[jax.Array, jax.Array], None]:
        loss_C, grad_CD = carry
        term, slope = (_real(tile, x) for x in terms(how, *of(tile), known, tile.columns))
        slope = lax.optimization_barrier(slope.astype(jnp.promote_types(tile.student_VD.dtype, jnp.bfloat16)))
        grad = jnp.einsum("cv,vd->cd", slope, tile.student_VD, **dot_settings(slope, tile.student_VD))
        return (loss_C + jnp.sum(term, axis=1), grad_CD + grad), None

    zero = jnp.zeros(count, known.s_log.dtype), jnp.zeros((count, heads.student_VD.shape[1]), known.s_log.dtype)
    (loss_C, grad_CD), _ = sweep(weigh, zero, heads)
    loss_C = vocab_sum(loss_C[:, None], axes)
    if found_C1 is not None:  # no such token: no loss and no gradient
        loss_C, grad_CD = jnp.where(found_C1[:, 0], loss_C, jnp.nan), jnp.where(found_C1, grad_CD, jnp.nan)
    return loss_C, grad_CD / how.temperature


def _softmax(x_CV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest logit, and the sum of exp(logit - largest)."""
    peak_C = jnp.max(x_CV, axis=1)
    return peak_C, jnp.sum(jnp.exp(x_CV - peak_C[:, None]), axis=1)


def _real(tile: Tile, x_CV: jax.Array) -> jax.Array:
    return x_CV if tile.real is None else jnp.where(tile.real, x_CV, 0)
