"""The divergences as they are defined, over the logits of all tokens at once: what the fused version is tested against.

p is the teacher's distribution at a token, q the student's, both over the vocabulary.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxbake.errors import JaxbakeError
from jaxbake.objectives.inputs import Moments, TopK, prepare
from jaxbake.objectives.logits import student_logits, teacher_logits


def reference_kl(
    student_hidden_ND, student_unembed_VD, teacher, teacher_unembed_VD, weights_N, **settings
) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted divergences, sum of weights): `fused_kl`'s arguments and meaning, in plain memory-hungry JAX.

    Any float dtype; float64 (under `jax.enable_x64`) for a value to measure others by. `chunk_size` changes nothing.
    """
    args = student_hidden_ND, student_unembed_VD, teacher, teacher_unembed_VD, weights_N
    how, tokens, heads, weights_N = prepare(*args, **settings)
    log_q_NV = jax.nn.log_softmax(student_logits(how, tokens, heads))
    if how.name == "cross_entropy":
        return jnp.sum(weights_N * cross_entropy(log_q_NV, tokens.targets_N)), jnp.sum(weights_N)
    if isinstance(tokens.teacher, Moments):
        raise JaxbakeError("teacher: moments are not a distribution; give the hidden states they are of")
    if isinstance(tokens.teacher, TopK):
        log_p_NV, log_q_NV = over_outcomes(tokens.teacher, log_q_NV)
    else:
        log_p_NV = jax.nn.log_softmax(teacher_logits(how, tokens, heads))
    match how.name:
        case "forward":
            loss_N = kl(log_p_NV, log_q_NV)
        case "reverse":
            loss_N = kl(log_q_NV, log_p_NV)
        case "jsd":
            loss_N = jensen_shannon(log_p_NV, log_q_NV, how.beta)
    return jnp.sum(weights_N * loss_N), jnp.sum(weights_N)


def over_outcomes(top: TopK, log_q_NV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p and log q over the teacher's k tokens and, where there are others, all those together [N, k + 1]."""
    rows_N1 = jnp.arange(log_q_NV.shape[0])[:, None]
    log_p_NK, log_q_NK = top.log_probs, log_q_NV[rows_N1, top.ids]
    if top.ids.shape[1] < log_q_NV.shape[1]:
        log_tail_N = jax.nn.logsumexp(log_q_NV.at[rows_N1, top.ids].set(-jnp.inf), axis=-1)
        log_p_NK = jnp.concatenate([log_p_NK, top.log_tail[:, None]], axis=-1)
        log_q_NK = jnp.concatenate([log_q_NK, log_tail_N[:, None]], axis=-1)
    return log_p_NK, log_q_NK


def kl(log_p_NV: jax.Array, log_q_NV: jax.Array) -> jax.Array:
    """KL(p || q) [N], in nats."""
    return jnp.sum(jnp.exp(log_p_NV) * (log_p_NV - log_q_NV), axis=-1)


def jensen_shannon(log_p_NV: jax.Array, log_q_NV: jax.Array, beta: float) -> jax.Array:
    """beta KL(p || m) + (1 - beta) KL(q || m) [N] with m = beta p + (1 - beta) q: GKD, arXiv 2306.13649, section 2."""
    log_m_NV = jnp.logaddexp(math.log(beta) + log_p_NV, math.log1p(-beta) + log_q_NV)
    return beta * kl(log_p_NV, log_m_NV) + (1 - beta) * kl(log_q_NV, log_m_NV)


def cross_entropy(log_q_NV: jax.Array, targets_N: jax.Array) -> jax.Array:
    """-log q(target) [N]; NaN, and its gradient too, where the target is not in the vocabulary."""
    known_N = (targets_N >= 0) & (targets_N < log_q_NV.shape[-1])
    log_q_N = jnp.take_along_axis(log_q_NV, jnp.where(known_N, targets_N, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(known_N, -1.0, jnp.nan) * log_q_N
