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
IMPLEMENTATIONS = ("auto", "xla", "tiled", "pallas", "pallas_recompute")


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


class Moments(NamedTuple):
    """All that the forward divergence asks of a teacher p: the mean of the student's unembedding rows under p, and p's
    entropy. The student's logits being products with these rows, their mean under p is the product with `mean`.

    mean: [..., D], sum_v p(v) W_v. entropy: [...], in nats. Of p at a temperature.
    """

    mean: jax.Array
    entropy: jax.Array


SoftTargets = jax.Array | TopK | Moments
"""What is known of a teacher at tokens: its final hidden states [..., E], or what was made of its distributions."""


class Tokens(NamedTuple):
    """Rows of tokens; those of weight 0 hold zeros. teacher: None for cross-entropy, which has targets."""

    hidden_ND: jax.Array
    teacher: SoftTargets | None
    targets_N: jax.Array | None


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

    On a CPU the power of two whose float32 logits take 64 to 128 MiB, at most 512: every chunk lays the unembedding out
    anew for its products. For small vocabularies 256, whose logits stay in the cache. Two such arrays, the student's
    and the teacher's, are alive at a time.
    """
    if chip().platform != "cpu":
        return 512
    most = 512 if vocab_size >= 2**14 else 256
    return min(most, 2 ** max(0, int(math.log2(128 * 2**20 / (4 * vocab_size)))))


def prepare(
    student_hidden_ND: jax.Array,
    student_unembed_VD: jax.Array,
    teacher: SoftTargets | None,
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
    lead = _check_head("student_hidden_ND", student_hidden_ND, "student_unembed_VD", student_unembed_VD)
    if divergence == "cross_entropy":
        teacher = teacher_unembed_VD = None
        if targets_N is None:
            raise JaxbakeError("targets_N is missing: divergence 'cross_entropy' needs token ids")
        targets_N = jnp.asarray(targets_N)
        if not jnp.issubdtype(targets_N.dtype, jnp.integer):
            raise JaxbakeError(f"targets_N is {targets_N.dtype}; token ids must be integers")
        _check_lead("targets_N", targets_N.shape, lead)
    else:
        targets_N = None
        if teacher is None:
            raise JaxbakeError(f"teacher is missing: divergence '{divergence}' needs one")
    if isinstance(teacher, TopK | Moments) and teacher_unembed_VD is not None:
        raise JaxbakeError("teacher_unembed_VD is given beside what was made of the teacher's distributions; give one")
    if isinstance(teacher, TopK):
        teacher = _checked_top(teacher, lead, student_unembed_VD.shape[0])
    elif isinstance(teacher, Moments):
        if divergence != "forward" or softcap is not None:
            what = f"divergence '{divergence}'" if divergence != "forward" else "a soft cap"
            raise JaxbakeError(f"teacher: its moments do not determine {what}; give its hidden states")
        teacher = _checked_moments(teacher, lead, student_hidden_ND)
    elif divergence != "cross_entropy":
        teacher = jnp.asarray(teacher)
        teacher_unembed_VD = None if teacher_unembed_VD is None else jnp.asarray(teacher_unembed_VD)
        head_VE = student_unembed_VD if teacher_unembed_VD is None else teacher_unembed_VD
        _check_lead("teacher", _check_head("teacher", teacher, "its unembedding", head_VE), lead)
        if head_VE.shape[0] != student_unembed_VD.shape[0]:
            raise JaxbakeError(
                f"teacher_unembed_VD has a vocabulary of {head_VE.shape[0]}, the student's has "
                f"{student_unembed_VD.shape[0]}; distributions over different vocabularies cannot be compared"
            )
    weights_N = jnp.asarray(weights_N)
    _check_lead("weights_N", weights_N.shape, lead)

    made = isinstance(teacher, TopK | Moments)
    states = (student_hidden_ND, student_unembed_VD, None if made else teacher, teacher_unembed_VD)
    operands = jax.tree.leaves(states)
    if implementation not in ("auto", "xla") and (made or not has_kernel(operands)):
        of = f" of a teacher's {'top k' if isinstance(teacher, TopK) else 'moments'}" if made else ""
        raise JaxbakeError(
            f"implementation '{implementation}' has kernels for hidden states in bfloat16 and float32 only; here it is "
            f"'{divergence}'{of} in {', '.join(sorted({str(x.dtype) for x in operands}))}: take 'auto' or 'xla'"
        )
    weights_N = weights_N.reshape(-1).astype(jnp.result_type(jnp.float32, *operands))
    counted_N = weights_N != 0

    def rows(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, *x.shape[len(lead) :])
        return jnp.where(counted_N.reshape(-1, *[1] * (x.ndim - 1)), x, 0)

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
    teacher, targets_N = lax.stop_gradient(jax.tree.map(rows, (teacher, targets_N)))
    tokens = Tokens(rows(student_hidden_ND), teacher, targets_N)
    return settings, tokens, lax.stop_gradient(Heads(student_unembed_VD, teacher_unembed_VD)), weights_N


def has_kernel(operands: list[jax.Array]) -> bool:
    """Whether the kernels can."""
    return all(x.dtype in (jnp.bfloat16, jnp.float32) for x in operands)


def _check_positive(name: str, value: float) -> None:
    if not (isinstance(value, Real) and 0 < value < math.inf):
        raise JaxbakeError(f"{name} is {value!r}; it must be a positive number")


def _check_head(name: str, hidden: jax.Array, head: str, unembed: jax.Array) -> tuple[int, ...]:
    """The leading shape of the hidden states, once their width is known to fit the unembedding."""
    for what, x in ((name, hidden), (head, unembed)):
        _check_floats(what, x)
    if hidden.ndim < 1 or unembed.ndim != 2 or hidden.shape[-1] != unembed.shape[1]:
        raise JaxbakeError(
            f"{name} is {hidden.shape} and its unembedding {unembed.shape}; they must be [..., width] and "
            "[vocabulary, width]"
        )
    return hidden.shape[:-1]


def _checked_top(top: TopK, lead: tuple[int, ...], vocabulary: int) -> TopK:
    """The top k as arrays, once they are known to fit each other, the tokens and the vocabulary."""
    top = TopK(*map(jnp.asarray, top))
    if top.ids.ndim < 1 or top.ids.shape != top.log_probs.shape or not jnp.issubdtype(top.ids.dtype, jnp.integer):
        raise JaxbakeError(
            f"teacher: ids are {top.ids.dtype} {top.ids.shape} and log_probs {top.log_probs.shape}; they must be "
            "whole numbers and as many probabilities [..., k]"
        )
    if not 1 <= top.ids.shape[-1] <= vocabulary:
        raise JaxbakeError(f"teacher: k is {top.ids.shape[-1]}; it must be from 1 to the vocabulary's {vocabulary}")
    for name, x in (("log_probs", top.log_probs), ("log_tail", top.log_tail)):
        _check_floats(f"teacher.{name}", x)
    _check_lead("teacher.ids", top.ids.shape[:-1], lead)
    _check_lead("teacher.log_tail", top.log_tail.shape, lead)
    return top


def _checked_moments(moments: Moments, lead: tuple[int, ...], hidden: jax.Array) -> Moments:
    """The moments as arrays, once they are known to fit the student's hidden states."""
    moments = Moments(*map(jnp.asarray, moments))
    for name, x in zip(Moments._fields, moments, strict=True):
        _check_floats(f"teacher.{name}", x)
    if jnp.finfo(hidden.dtype).bits < 32:
        raise JaxbakeError(
            f"teacher: moments need the student in float32, since the gradient is the difference of two means that "
            f"come close to each other; its hidden states are {hidden.dtype}: give the teacher's hidden states"
        )
    if moments.mean.shape != hidden.shape:
        raise JaxbakeError(f"teacher.mean is {moments.mean.shape}; it must be {hidden.shape} as the student's states")
    _check_lead("teacher.entropy", moments.entropy.shape, lead)
    return moments


def _check_floats(name: str, x: jax.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise JaxbakeError(f"{name} is {x.dtype}; it must be of a floating point type")


def _check_lead(name: str, shape: tuple[int, ...], lead: tuple[int, ...]) -> None:
    if shape != lead:
        raise JaxbakeError(f"{name} is given for tokens of shape {shape}; the student's are {lead}")
