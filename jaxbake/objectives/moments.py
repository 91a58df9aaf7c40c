"""The forward divergence from the moments of a teacher's distributions: its logits are never computed again.

The student's logits at a token are s = W h / T. With q = softmax(s) and Z = sum exp(s),

    KL(p || q) = log Z - sum_v p(v) s(v) - H(p) = log Z - h . E_p[W] / T - H(p),
    its derivative by h = (E_q[W] - E_p[W]) / T

so that of p only the mean row E_p[W], as wide as a hidden state, and the entropy are needed. W is multiplied twice, for
s and for E_q[W], where the teacher's logits would be a third product. (Such a softmax is an exponential family, and
this its divergence in Bregman's form: Wainwright and Jordan 2008, section 5.2.2.) What it costs: the divergence is a
difference of numbers of the size of logits, and their rounding stays in it.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from jaxbake.errors import JaxbakeError
from jaxbake.objectives.chunks import map_tokens
from jaxbake.objectives.inputs import Divergence, Heads, Moments, Tokens, prepare
from jaxbake.objectives.logits import dot_settings, soft_logits
from jaxbake.objectives.sums import ABSENT
from jaxbake.objectives.tiles import Tile, sweep

MOST_TOKENS = 1024
"""Tokens at a time: all that is held of the vocabulary is a tile."""


def moments_of(hidden_ND: jax.Array, unembed_VD: jax.Array, *, temperature: float = 1.0) -> Moments:
    """The moments of the next-token distributions softmax(W h / temperature), a tile of the vocabulary at a time.

    Args:
      hidden_ND: [..., D] final hidden states, float32 (or float64).
      unembed_VD: [V, D].
      temperature: as in `fused_kl`.

    Raises JaxbakeError for hidden states in low precision, whose moments would not be precise enough.
    """
    if jnp.finfo(hidden_ND.dtype).bits < 32:
        raise JaxbakeError(f"hidden_ND is {hidden_ND.dtype}; moments need float32: keep the hidden states as they are")
    how, tokens, heads, _ = prepare(
        hidden_ND, unembed_VD, hidden_ND, None, jnp.ones(hidden_ND.shape[:-1]), temperature=temperature,
    )  # fmt: skip
    log_z_N, mean_ND = _map_means(how, tokens, heads)
    entropy_N = log_z_N - _product(how, tokens.hidden_ND, mean_ND)
    return lax.stop_gradient(Moments(mean_ND.reshape(hidden_ND.shape), entropy_N.reshape(hidden_ND.shape[:-1])))


def losses_and_grads(how: Divergence, tokens: Tokens, heads: Heads) -> tuple[jax.Array, jax.Array]:
    """KL(p || q) at each token [N], and its derivative by the student's hidden states [N, D]."""
    log_z_N, mean_ND = _map_means(how, tokens, heads)
    return _divergence(how, tokens, log_z_N), (mean_ND - tokens.teacher.mean) / how.temperature


def _divergence(how: Divergence, tokens: Tokens, log_z_N: jax.Array) -> jax.Array:
    return (log_z_N - _product(how, tokens.hidden_ND, tokens.teacher.mean)) - tokens.teacher.entropy


def _product(how: Divergence, hidden_ND: jax.Array, mean_ND: jax.Array) -> jax.Array:
    """The mean of the logits [N] under the distributions whose mean rows these are."""
    return jnp.sum(hidden_ND * mean_ND, axis=-1) / how.temperature


def _map_means(how: Divergence, tokens: Tokens, heads: Heads) -> tuple[jax.Array, jax.Array]:
    """log Z [N] and E_q[W] [N, D]."""
    how = replace(how, chunk_size=max(how.chunk_size, MOST_TOKENS))
    return map_tokens(_partition_and_mean, how, tokens._replace(teacher=None), heads)


def _partition_and_mean(how: Divergence, tokens: Tokens, heads: Heads) -> tuple[jax.Array, jax.Array]:
    """log Z [C] and E_q[W] [C, D], the latter this device's share of a sum, a tile of the vocabulary at a time.

    What was summed so far shrinks as a larger logit comes (Milakov and Gimelshein, arXiv 1805.02867).
    """
    dtype = jnp.promote_types(tokens.hidden_ND.dtype, jnp.float32)

    def add(carry: tuple[jax.Array, ...], tile: Tile) -> tuple[tuple[jax.Array, ...], None]:
        peak_C1, total_C1, sum_CD = carry
        s_CV = tile.masked(soft_logits(tokens.hidden_ND, tile.student_VD, how.softcap, how.temperature))
        higher_C1 = jnp.maximum(peak_C1, jnp.max(s_CV, axis=1, keepdims=True))
        share_C1 = jnp.exp(peak_C1 - higher_C1)
        exp_CV = lax.optimization_barrier(jnp.exp(s_CV - higher_C1))
        more_CD = jnp.einsum("cv,vd->cd", exp_CV, tile.student_VD, **dot_settings(exp_CV, tile.student_VD))
        total_C1 = share_C1 * total_C1 + jnp.sum(exp_CV, axis=1, keepdims=True)
        return (higher_C1, total_C1, share_C1 * sum_CD + more_CD), None

    zero_C1 = jnp.zeros((tokens.hidden_ND.shape[0], 1), dtype)
    carry = zero_C1 + ABSENT, zero_C1, jnp.zeros_like(tokens.hidden_ND, dtype)
    peak_C1, total_C1, sum_CD = sweep(add, carry, heads)[0]
    if how.axes:
        highest_C1 = lax.pmax(peak_C1, how.axes)
        share_C1 = jnp.exp(peak_C1 - highest_C1)
        peak_C1, total_C1, sum_CD = highest_C1, lax.psum(share_C1 * total_C1, how.axes), share_C1 * sum_CD
    return (peak_C1 + jnp.log(total_C1))[:, 0], sum_CD / total_C1
