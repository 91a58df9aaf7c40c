"""A teacher's most likely tokens and all others together: what is kept of it where its hidden states are of no use."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbake.errors import JaxbakeError
from jaxbake.objectives.chunks import map_tokens
from jaxbake.objectives.coarse import coarse_logits
from jaxbake.objectives.inputs import Divergence, Heads, Tokens, TopK, prepare
from jaxbake.objectives.logits import student_logits


def top_k_of(
    hidden_ND: jax.Array,
    unembed_VD: jax.Array,
    k: int,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> TopK:
    """The k most likely next tokens, and the log of what the others have together, a chunk of tokens at a time.

    Args:
      hidden_ND: [..., D] final hidden states.
      unembed_VD: [V, D].
      k: from 1 to the size of the vocabulary.
      softcap, temperature: of the logits, as in `fused_kl`.
      chunk_size: as in `fused_kl`.

    Returns a `TopK` of float32 (float64 if an input is), most likely tokens first.

    Raises JaxbakeError for a k out of range.
    """
    size = unembed_VD.shape[0]
    if not 1 <= k <= size:
        raise JaxbakeError(f"top_k: {k} of a vocabulary of {size} tokens; take 1 to {size}, usual are 20 to 100")
    how, tokens, heads, _ = prepare(
        hidden_ND, unembed_VD, hidden_ND, None, jnp.ones(hidden_ND.shape[:-1]), softcap=softcap,
        temperature=temperature, chunk_size=chunk_size,
    )  # fmt: skip

    def chunk(how: Divergence, tokens: Tokens, heads: Heads) -> tuple[TopK, Any]:
        s_CV, first = student_logits(how, tokens, heads), 0 if heads.first is None else heads.first
        logits_CK, ids_CK = lax.top_k(s_CV, min(k, s_CV.shape[-1]))
        ids_CK += first
        if how.axes:  # every part's most likely ones, and of them the most likely
            logits_CK, ids_CK = (lax.all_gather(x, how.axes, axis=1, tiled=True) for x in (logits_CK, ids_CK))
            at_CK = lax.top_k(logits_CK, k)[1]
            ids_CK = jnp.take_along_axis(ids_CK, at_CK, axis=1)
        log_p_CK = jax.nn.log_softmax(coarse_logits(s_CV, ids_CK, heads, how.axes)[0])
        return TopK(ids_CK.astype(jnp.int32), log_p_CK[:, :-1], log_p_CK[:, -1]), None

    top = lax.stop_gradient(map_tokens(chunk, how, tokens._replace(teacher=None), heads)[0])
    return jax.tree.map(lambda x: x.reshape(*hidden_ND.shape[:-1], *x.shape[1:]), top)
