"""What both versions of the objective take: checked, flattened to tokens, free of gradients but the student's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from types import EllipsisType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbake.chip import chip
from jaxbake.errors import JaxbakeError, did_you_mean
from jaxbake.mesh import AnyMesh, in_context, mesh_of

DIVERGENCES = ("forward", "reverse", "jsd", "cross_entropy")
IMPLEMENTATIONS = ("auto", "xla", "pallas", "pallas_recompute")


@dataclass(frozen=True)
class Divergence:
    """The static settings of an objective: hashable, fixed at trace time."""

    name: str
    temperature: float
    softcap: float | None
    teacher_softcap: float | None
    beta: float
    chunk_size: int
    implementation: str = "auto"
    mesh: AnyMesh | None = None
    axes: tuple[str, ...] = ()
    """The mesh axes over which the logits at hand are a part of the vocabulary."""


class TopK(NamedTuple):
    """A teacher's distribution over k + 1 outcomes: its k most likely tokens, and all others together.

    ids: int32 [..., k]. log_probs: [..., k]. log_tail: [...], the log of the others' mass; as little as there is, and
    far below any rounding (`sums.ABSENT`) where there are no others (k = V).
    """

    ids: jax.Array
    log_probs: jax.Array
    log_tail: jax.Array


class Tokens(NamedTuple):
    """Rows of tokens; those of weight 0 hold zeros. Of the teacher there is one: hidden states, its top k, or, for
    cross-entropy, targets."""

    hidden_ND: jax.Array
    teacher_hidden_NE: jax.Array | None
    targets_N: jax.Array | None
    top: TopK | None = None


class Heads(NamedTuple):
    """Unembedding matrices; the teacher's is None where it is the student's, so that one copy is held.

    Of a part of the vocabulary: first is its first token's id, valid how many of its first rows are real (None: all).
    """

    student_VD: jax.Array
    teacher_VE: jax.Array | None
    first: jax.Array | None = None
    valid: jax.Array | None = None

    @property
    def real_V(self) -> jax.Array:
        """Which rows of a part are real."""
        return jnp.arange(self.student_VD.shape[0]) < self.valid


def default_chunk_size(vocab_size: int) -> int:
    """Tokens per chunk. On a TPU or GPU 512: fewer take no less time, which goes into reading the unembedding.

    On a CPU the power of two whose float32 logits take 32 to 64 MiB, at most 512: every chunk lays the unembedding out
    anew for its products, and every fresh page is paid for. For small vocabularies 256, whose logits stay in the cache.
    Two such arrays, the student's and the teacher's, and one or two of that size beside them are alive at a time.
    """
    if chip().platform != "cpu":
        return 512
    most = 512 if vocab_size >= 2**14 else 256
    return min(most, 2 ** max(0, int(math.log2(64 * 2**20 / (4 * vocab_size)))))


def prepare(
    student_hidden_ND: jax.Array,
    student_unembed_VD: jax.Array,
    teacher_hidden_ND: jax.Array | None,
    teacher_unembed_VD: jax.Array | None,
    weights_N: jax.Array,
    *,
    targets_N: jax.Array | None = None,
    divergence: str = "forward",
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None | EllipsisType = ...,
    beta: float = 0.5,
    chunk_size: int | None = None,
    implementation: str = "auto",
    teacher_top: TopK | None = None,
) -> tuple[Divergence, Tokens, Heads, jax.Array]:
    """Checks the arguments of `fused_kl` and gives (settings, tokens, heads, weights [N] in the dtype of the loss).

    Only the student's hidden states and the weights stay differentiable. Rows of weight 0 are replaced by zeros, so
    that whatever padding holds, NaN included, reaches neither the value nor a gradient.

    Raises:
      JaxbakeError: unknown divergence, setting out of range, missing argument, or shapes that do not fit.
    """
    if divergence not in DIVERGENCES:
        raise JaxbakeError(f"divergence '{divergence}' is unknown; {did_you_mean(str(divergence), DIVERGENCES)}")
    if teacher_softcap is ...:
        teacher_softcap = softcap
    _check_positive("temperature", temperature)
    for name, cap in (("softcap", softcap), ("teacher_softcap", teacher_softcap)):
        if cap is not None:
            _check_positive(name, cap)
    if divergence == "jsd" and not (isinstance(beta, Real) and 0 < beta < 1):
        raise JaxbakeError(
            f"beta is {beta!r}; the Jensen-Shannon divergence needs a number between 0 and 1, both excluded, where it "
            "vanishes (its limits, divided by beta and by 1 - beta, are divergence 'forward' and 'reverse')"
        )
    if chunk_size is not None and not (isinstance(chunk_size, Integral) and chunk_size > 0):
        raise JaxbakeError(f"chunk_size is {chunk_size!r}; it must be a positive number of tokens, or None")

    if implementation not in IMPLEMENTATIONS:
        known = did_you_mean(str(implementation), IMPLEMENTATIONS)
        raise JaxbakeError(f"implementation '{implementation}' is unknown; {known}")

    student_hidden_ND, student_unembed_VD = jnp.asarray(student_hidden_ND), jnp.asarray(student_unembed_VD)
    lead = _check_head("student", student_hidden_ND, student_unembed_VD)
    if divergence == "cross_entropy":
        teacher_hidden_ND = teacher_unembed_VD = teacher_top = None
        if targets_N is None:
            raise JaxbakeError("targets_N is missing: divergence 'cross_entropy' needs token ids")
        targets_N = jnp.asarray(targets_N)
        if not jnp.issubdtype(targets_N.dtype, jnp.integer):
            raise JaxbakeError(f"targets_N is {targets_N.dtype}; token ids must be integers")
        _check_lead("targets_N", targets_N.shape, lead)
    else:
        targets_N = None
        if teacher_hidden_ND is None and teacher_top is None:
            raise JaxbakeError(f"teacher_hidden_ND is missing: divergence '{divergence}' needs a teacher")
    if teacher_top is not None:
        if teacher_hidden_ND is not None or teacher_unembed_VD is not None:
            raise JaxbakeError("teacher_top is given beside the teacher's hidden states or unembedding; give one")
        teacher_top = _checked_top(teacher_top, lead, student_unembed_VD.shape[0])
    elif divergence != "cross_entropy":
        teacher_hidden_ND = jnp.asarray(teacher_hidden_ND)
        teacher_unembed_VD = None if teacher_unembed_VD is None else jnp.asarray(teacher_unembed_VD)
        head_VE = student_unembed_VD if teacher_unembed_VD is None else teacher_unembed_VD
        _check_lead("teacher_hidden_ND", _check_head("teacher", teacher_hidden_ND, head_VE), lead)
        if head_VE.shape[0] != student_unembed_VD.shape[0]:
            raise JaxbakeError(
                f"teacher_unembed_VD has a vocabulary of {head_VE.shape[0]}, the student's has "
                f"{student_unembed_VD.shape[0]}; distributions over different vocabularies cannot be compared"
            )
    weights_N = jnp.asarray(weights_N)
    _check_lead("weights_N", weights_N.shape, lead)

    operands = jax.tree.leaves((student_hidden_ND, student_unembed_VD, teacher_hidden_ND, teacher_unembed_VD))
    if implementation.startswith("pallas") and (teacher_top is not None or not has_kernel(operands)):
        teacher = " of a teacher's top k" if teacher_top is not None else ""
        raise JaxbakeError(
            f"implementation '{implementation}' has kernels for hidden states in bfloat16 and float32 only; here it is "
            f"'{divergence}'{teacher} in {', '.join(sorted({str(x.dtype) for x in operands}))}: take 'auto' or 'xla'"
        )
    weights_N = weights_N.reshape(-1).astype(jnp.result_type(jnp.float32, *operands))
    counted_N = weights_N != 0

    def rows(x: jax.Array | None, trailing: int) -> jax.Array | None:
        if x is None:
            return None
        x = x.reshape(-1, *x.shape[x.ndim - trailing :])
        return jnp.where(counted_N.reshape(-1, *[1] * trailing), x, 0)

    mesh = mesh_of(student_unembed_VD)
    with in_context(mesh):
        chunk_size = default_chunk_size(student_unembed_VD.shape[0]) if chunk_size is None else int(chunk_size)
    settings = Divergence(
        divergence,
        float(temperature),
        None if softcap is None else float(softcap),
        None if teacher_softcap is None else float(teacher_softcap),
        float(beta),
        chunk_size,
        implementation,
        mesh,
    )
    if teacher_top is not None:
        ids, log_probs, log_tail = teacher_top
        teacher_top = lax.stop_gradient(TopK(rows(ids, 1), rows(log_probs, 1), rows(log_tail, 0)))
    teacher_hidden_NE = lax.stop_gradient(rows(teacher_hidden_ND, 1))
    tokens = Tokens(rows(student_hidden_ND, 1), teacher_hidden_NE, rows(targets_N, 0), teacher_top)
    return settings, tokens, lax.stop_gradient(Heads(student_unembed_VD, teacher_unembed_VD)), weights_N


def has_kernel(operands: list[jax.Array]) -> bool:
    """Whether the kernels can."""
    return all(x.dtype in (jnp.bfloat16, jnp.float32) for x in operands)


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


def _check_positive(name: str, value: float) -> None:
    if not (isinstance(value, Real) and 0 < value < math.inf):
        raise JaxbakeError(f"{name} is {value!r}; it must be a positive number")


def _check_head(who: str, hidden: jax.Array, unembed: jax.Array) -> tuple[int, ...]:
    """The leading shape of the hidden states, once their width is known to fit the unembedding."""
    for name, x in ((f"{who}_hidden_ND", hidden), (f"{who}_unembed_VD", unembed)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise JaxbakeError(f"{name} is {x.dtype}; it must be of a floating point type")
    if hidden.ndim < 1 or unembed.ndim != 2 or hidden.shape[-1] != unembed.shape[1]:
        raise JaxbakeError(
            f"{who}_hidden_ND is {hidden.shape} and its unembedding {unembed.shape}; they must be [..., width] and "
            "[vocabulary, width]"
        )
    return hidden.shape[:-1]


def _checked_top(top: TopK, lead: tuple[int, ...], vocabulary: int) -> TopK:
    """The top k as arrays, once they are known to fit each other, the tokens and the vocabulary."""
    top = TopK(*map(jnp.asarray, top))
    if top.ids.ndim < 1 or top.ids.shape != top.log_probs.shape or not jnp.issubdtype(top.ids.dtype, jnp.integer):
        raise JaxbakeError(
            f"teacher_top: ids are {top.ids.dtype} {top.ids.shape} and log_probs {top.log_probs.shape}; they must be "
            "whole numbers and as many probabilities [..., k]"
        )
    if not 1 <= top.ids.shape[-1] <= vocabulary:
        raise JaxbakeError(f"teacher_top: k is {top.ids.shape[-1]}; it must be from 1 to the vocabulary's {vocabulary}")
    for name, x in (("log_probs", top.log_probs), ("log_tail", top.log_tail)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise JaxbakeError(f"teacher_top.{name} is {x.dtype}; it must be of a floating point type")
    _check_lead("teacher_top.ids", top.ids.shape[:-1], lead)
    _check_lead("teacher_top.log_tail", top.log_tail.shape, lead)
    return top


def _check_lead(name: str, shape: tuple[int, ...], lead: tuple[int, ...]) -> None:
    if shape != lead:
        raise JaxbakeError(f"{name} is given for tokens of shape {shape}; the student's are {lead}")
