"""Logits from hidden states."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxbake.objectives.inputs import Divergence, Heads, Tokens
from jaxbake.objectives.sums import ABSENT


def dot_settings(*operands: jax.Array) -> dict:
    """Keyword arguments of a product over these operands: accumulated in float32, or in float64 if one is.

    A float32 operand is not rounded to fewer bits on the way (TPU and GPU do by default); bfloat16 costs the same.
    """
    out = jnp.result_type(jnp.float32, *operands)
    exact = jnp.result_type(*operands) in (jnp.float32, jnp.float64)
    return {"preferred_element_type": out, "precision": lax.Precision.HIGHEST if exact else None}


def soft_logits(hidden_ND: jax.Array, unembed_VD: jax.Array, softcap: float | None, temperature: float) -> jax.Array:
    """Logits [N, V], float32 or float64: `softcap * tanh(logits / softcap)` if capped, then over the temperature."""
    logits_NV = jnp.einsum("nd,vd->nv", hidden_ND, unembed_VD, **dot_settings(hidden_ND, unembed_VD))
    if softcap is not None:
        logits_NV = softcap * jnp.tanh(logits_NV / softcap)
    return logits_NV if temperature == 1 else logits_NV / temperature


def student_logits(how: Divergence, tokens: Tokens, heads: Heads) -> jax.Array:
    """The student's logits of a chunk's tokens over the part of the vocabulary at hand [C, V]."""
    return _real(heads, soft_logits(tokens.hidden_ND, heads.student_VD, how.softcap, how.temperature))


def teacher_logits(how: Divergence, tokens: Tokens, heads: Heads) -> jax.Array:
    """The teacher's, from its hidden states, likewise."""
    unembed_VE = heads.student_VD if heads.teacher_VE is None else heads.teacher_VE
    return _real(heads, soft_logits(tokens.teacher, unembed_VE, how.teacher_softcap, how.temperature))


def _real(heads: Heads, logits_CV: jax.Array) -> jax.Array:
    """Logits with those of rows that only fill up a part of the vocabulary made nothing of by any softmax."""
    return logits_CV if heads.valid is None else jnp.where(heads.real_V, logits_CV, ABSENT)
