"""The divergences and their gradients on a CPU, a tile of the vocabulary at a time (XLA).

As `objectives.kernel`: the first sweep makes the logits of a chunk of tokens and reduces each tile while it is in the
cache; the last one reads them back for the divergence's terms and slopes, and adds slopes @ W up, a tile's rows at a
time: over the whole vocabulary at once XLA's product is slower.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbake.objectives.inputs import Divergence, Heads, Tokens
from jaxbake.objectives.logits import dot_settings
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
    heads = heads._replace(valid=valid)
    count, vocab = tokens.hidden_ND.shape[0], heads.student_VD.shape[0]

    def normalise(_: None, tile: Tile, x: None) -> tuple[None, Any]:
        s, t = tile.logits(how, tokens)
        peak, total = _softmax(s)
        if t is None:
            return None, ((s, t), Sums(peak, total))
        gap = jnp.max(jnp.where(s == peak[:, None], t - s, -jnp.inf), axis=1) if how.name in MEANS else None
        return None, ((s, t), Sums(peak, total, *_softmax(t), gap))

    _, (logits, sums) = sweep(normalise, None, heads)
    known, found_C1 = join(how, jax.tree.map(jnp.transpose, sums), axes), None
    if how.name == "cross_entropy":
        target_C1, found_C1 = find_targets(tokens.targets_N, heads.first, vocab if valid is None else valid, axes)
        known = known._replace(target=target_C1)
    if how.name in MEANS:

        def above(total_C: jax.Array, tile: Tile, logits: Any) -> tuple[jax.Array, None]:
            return total_C + jnp.sum(_real(tile, above_centre(how, *logits, known)), axis=1), None

        mean_C, _ = sweep(above, jnp.zeros(count, known.s_log.dtype), heads, logits)
        known = known._replace(mean=vocab_sum(mean_C[:, None], axes)[:, None])

    def weigh(carry: tuple[jax.Array, jax.Array], tile: Tile, logits: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        loss_C, grad_CD = carry
        term, slope = (_real(tile, x) for x in terms(how, *logits, known, tile.columns))
        slope = lax.optimization_barrier(slope.astype(jnp.promote_types(tile.student_VD.dtype, jnp.bfloat16)))
        grad = jnp.einsum("cv,vd->cd", slope, tile.student_VD, **dot_settings(slope, tile.student_VD))
        return (loss_C + jnp.sum(term, axis=1), grad_CD + grad), None

    zero = jnp.zeros(count, known.s_log.dtype), jnp.zeros((count, heads.student_VD.shape[1]), known.s_log.dtype)
    (loss_C, grad_CD), _ = sweep(weigh, zero, heads, logits)
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
