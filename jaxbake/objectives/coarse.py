"""A vocabulary of which k tokens are kept apart and the others taken together: distributions over k + 1 outcomes.

Taken together, outcomes lose what tells them apart: a divergence over the k + 1 is at most that over the vocabulary
(data processing inequality), and never falls as k grows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxbake.objectives.inputs import Heads
from jaxbake.objectives.sums import ABSENT, Axes, normaliser


def coarse_logits(s_CV: jax.Array, ids_CK: jax.Array, heads: Heads, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Logits of the k + 1 outcomes [C, k + 1], the others' last, and the others' shares of it [C, V].

    Their softmax is that of the vocabulary, summed. The others' logit is a log-sum-exp over them alone: it is finite
    however little is left to them, and `ABSENT` where there are none (k = V).
    """
    rows_C1, at_CK = _places(s_CV, ids_CK, heads)
    here_CK = at_CK < s_CV.shape[-1]
    picked_CK = jnp.where(here_CK, jnp.take_along_axis(s_CV, jnp.where(here_CK, at_CK, 0), axis=-1), 0)
    picked_CK = lax.psum(picked_CK, axes) if axes else picked_CK
    others_CV = s_CV.at[rows_C1, at_CK].set(ABSENT, mode="drop")
    max_C1, log_sum_C1 = normaliser(others_CV, axes)
    most_C1 = jnp.maximum(max_C1, jnp.max(picked_CK, axis=-1, keepdims=True))  # so that likely outcomes keep digits
    coarse_CK = jnp.concatenate([picked_CK - most_C1, (max_C1 - most_C1) + log_sum_C1], axis=-1)
    return coarse_CK, jnp.exp((others_CV - max_C1) - log_sum_C1)


def spread_gradient(dcoarse_CK: jax.Array, shares_CV: jax.Array, ids_CK: jax.Array, heads: Heads) -> jax.Array:
    """The derivative by the vocabulary's logits [C, V] from that by the k + 1; the others have it by shares."""
    rows_C1, at_CK = _places(shares_CV, ids_CK, heads)
    return (shares_CV * dcoarse_CK[:, -1:]).at[rows_C1, at_CK].add(dcoarse_CK[:, :-1], mode="drop")


def _places(x_CV: jax.Array, ids_CK: jax.Array, heads: Heads) -> tuple[jax.Array, jax.Array]:
    """Rows, and columns in this part of the vocabulary; V for tokens of other parts."""
    size = x_CV.shape[-1]
    at_CK = ids_CK if heads.first is None else ids_CK - heads.first
    at_CK = jnp.where((at_CK >= 0) & (at_CK < (size if heads.valid is None else heads.valid)), at_CK, size)
    return jnp.arange(x_CV.shape[0])[:, None], at_CK
