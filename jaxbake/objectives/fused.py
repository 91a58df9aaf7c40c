"""The divergences straight from hidden states, a chunk of tokens at a time: never all tokens' logits at once.

p is the teacher's distribution at a token, q the student's. Differentiated, a chunk yields its gradient with respect to
the student's hidden states while its logits are at hand (as Liger-Kernel does), and the backward pass only scales it;
not differentiated, it yields the value alone. The unembeddings and the teacher are constants and get no gradient. How
a chunk's loss and gradient are best computed differs by chip and by what is known of the teacher: here is the plain
way, `kernel`, `kernel_gpu`, `kernel_cpu` and `moments` have the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import EllipsisType

import jax
import jax.numpy as jnp
from jax import lax

from jaxbake.chip import chip
from jaxbake.errors import JaxbakeError
from jaxbake.objectives import kernel_cpu, moments
from jaxbake.objectives.chunks import map_tokens
from jaxbake.objectives.coarse import coarse_logits, spread_gradient
from jaxbake.objectives.inputs import Divergence, Heads, Moments, SoftTargets, Tokens, TopK, has_kernel, prepare
from jaxbake.objectives.logits import dot_settings, student_logits, teacher_logits
from jaxbake.objectives.sums import ABSENT, Axes, normaliser, vocab_sum


def fused_kl(
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
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum over tokens of the divergence between teacher and student, and the sum of the weights.

    `forward` is KL(p || q), `reverse` KL(q || p), `jsd` the generalised Jensen-Shannon divergence of GKD (arXiv
    2306.13649), `beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q`, whose limits for beta -> 0
    and 1 are beta times forward and (1 - beta) times reverse; `cross_entropy` is -log q(target). All in nats, with
    logits softened as `softcap * tanh(logits / softcap) / temperature` (and no factor of temperature squared).

    Differentiable in `student_hidden_ND` and `weights_N` only. Tokens of weight 0 add exactly nothing to value and
    gradient, whatever they hold. The result does not depend on `chunk_size` beyond rounding. The arithmetic is float32
    (float64 if an input is); bfloat16 operands are multiplied as such and accumulated in float32.

    Args:
      student_hidden_ND: [..., D] final hidden states (after the final norm). The dots stand for the same in all.
      student_unembed_VD: [V, D].
      teacher: [..., E], the teacher's final hidden states, of the student's width or another; None for cross-entropy.
        Or its k most likely tokens (`top_k_of`): the divergence is then that over k + 1 outcomes, these tokens and all
        others together: at most the full one, and equal for k = V. Or its `Moments` (`moments_of`), for `forward`
        without soft cap in float32: the same value for two products with the unembedding in place of three; its
        absolute error is the rounding of logits, however small it is. Both are of p at `temperature` already.
      teacher_unembed_VD: [V, E]; None if it is the student's.
      weights_N: [...], 0 for tokens that do not count.
      targets_N: [...] token ids, for cross-entropy; one outside the vocabulary gives NaN.
      divergence: "forward", "reverse", "jsd" or "cross_entropy".
      temperature: divides the logits of both sides.
      softcap: the student's logit soft cap (Gemma 2).
      teacher_softcap: the teacher's; by default the student's.
      beta: the teacher's share of the mixture of `jsd`, between 0 and 1.
      chunk_size: the most tokens whose logits exist at a time; see `default_chunk_size`. On accelerators some hundred
        are needed for the products to be bound by arithmetic. From moments, where only a tile of the vocabulary's
        exist, it is at least `moments.MOST_TOKENS`.
      implementation: "xla", chunks of tokens; "tiled", these a tile of the vocabulary at a time, which keeps a chunk's
        two arrays of logits and nothing more of that size; "pallas", kernels for a divergence and its gradient that do
        the same; "pallas_recompute", which keeps none at 3/2 to 7/3 of the products. Where there is no TPU or GPU they
        are interpreted. "auto" is "pallas" on a TPU and "tiled" on a CPU where they can (a teacher's hidden states,
        bfloat16 or float32), else "xla". Undifferentiated values are always "xla".

    Returns:
      (sum, count), scalars of float32 (float64 if an input is).

    Raises:
      JaxbakeError: unknown divergence, setting out of range, missing argument, or shapes that do not fit.
    """
    how, tokens, heads, weights_N = prepare(
        student_hidden_ND, student_unembed_VD, teacher, teacher_unembed_VD, weights_N, targets_N=targets_N,
        divergence=divergence, temperature=temperature, softcap=softcap, teacher_softcap=teacher_softcap, beta=beta,
        chunk_size=chunk_size, implementation=implementation,
    )  # fmt: skip
    return jnp.sum(weights_N * _token_losses(how, tokens, heads)), jnp.sum(weights_N)


def fused_metrics(
    student_hidden_ND: jax.Array,
    student_unembed_VD: jax.Array,
    teacher: jax.Array | TopK,
    teacher_unembed_VD: jax.Array | None,
    weights_N: jax.Array,
    **settings,
) -> dict[str, jax.Array]:
    """Weighted sums for held-out evaluation from one pass over the logits; shapes and settings as in `fused_kl`.

    Returns:
      `kl` and `reverse_kl` (nats), `agreement` (1 where the two most probable tokens are the same), `student_entropy`
      and `teacher_entropy` (nats), each summed over tokens times weights, and `count`, the sum of the weights. With a
      `TopK` as teacher, divergences and entropies are those over its k + 1 outcomes.

    Raises:
      JaxbakeError: as `fused_kl`, and for a teacher's moments.
    """
    if isinstance(teacher, Moments):
        raise JaxbakeError(
            "teacher: its moments do not determine all that is measured; give the hidden states they are of"
        )
    args = student_hidden_ND, student_unembed_VD, teacher, teacher_unembed_VD, weights_N
    how, tokens, heads, weights_N = prepare(*args, **{**settings, "divergence": "forward"})

    def measure(how: Divergence, tokens: Tokens, heads: Heads) -> tuple[dict[str, jax.Array], None]:
        s_CV, axes = student_logits(how, tokens, heads), how.axes
        most_likely_C = _argmax(s_CV, axes, heads.first)
        if not isinstance(tokens.teacher, TopK):
            t_CV = teacher_logits(how, tokens, heads)
            same_C = most_likely_C == _argmax(t_CV, axes, heads.first)
        else:
            same_C = most_likely_C == tokens.teacher.ids[:, 0]
            s_CV, t_CV, axes = coarse_logits(s_CV, tokens.teacher.ids, heads, axes)[0], _top_logits(tokens.teacher), ()
        log_q_CV, log_p_CV, log_ratio_CV = _log_softmaxes(s_CV, t_CV, axes)
        q_CV, p_CV = jnp.exp(log_q_CV), jnp.exp(log_p_CV)
        return {
            "kl": vocab_sum(_kl_terms(p_CV, q_CV, log_ratio_CV), axes),
            "reverse_kl": vocab_sum(_kl_terms(q_CV, p_CV, -log_ratio_CV), axes),
            "agreement": same_C.astype(s_CV.dtype),
            "student_entropy": -vocab_sum(q_CV * log_q_CV, axes),
            "teacher_entropy": -vocab_sum(p_CV * log_p_CV, axes),
        }, None

    per_token = lax.stop_gradient(map_tokens(measure, how, tokens, heads)[0])
    return {name: jnp.sum(weights_N * x_N) for name, x_N in per_token.items()} | {"count": jnp.sum(weights_N)}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(how: Divergence, tokens: Tokens, heads: Heads) -> jax.Array:
    """The divergence at each token [N]."""
    if isinstance(tokens.teacher, Moments):
        return moments.losses_and_grads(how, tokens, heads)[0]
    return map_tokens(lambda *chunk: (_chunk_loss(*chunk)[0], None), how, tokens, heads)[0]


def _token_losses_fwd(how: Divergence, tokens: Tokens, heads: Heads) -> tuple[jax.Array, jax.Array]:
    if isinstance(tokens.teacher, Moments):
        return moments.losses_and_grads(how, tokens, heads)

    def loss_and_grad(how: Divergence, chunk: Tokens, heads: Heads) -> tuple[jax.Array, jax.Array]:
        if (kernel := _kernel(how, chunk, heads)) is not None:
            return kernel(how, chunk, heads, valid=heads.valid, axes=how.axes)
        loss_C, dlogits_CV = _chunk_loss(how, chunk, heads)
        unembed_VD = heads.student_VD
        if unembed_VD.dtype == jnp.bfloat16:  # its exponents hold the smallest probabilities; float16's would not
            dlogits_CV = dlogits_CV.astype(jnp.bfloat16)
        # No loss, no gradient. The select also keeps the arithmetic before it out of the product: XLA's CPU compiler
        # was seen to fuse all of `_below_mean` into it and to take far longer.
        dlogits_CV = jnp.where(jnp.isnan(loss_C)[:, None], jnp.nan, dlogits_CV)
        grad_CD = jnp.einsum("cv,vd->cd", dlogits_CV, unembed_VD, **dot_settings(dlogits_CV, unembed_VD))
        return loss_C, grad_CD / how.temperature

    return map_tokens(loss_and_grad, how, tokens, heads)


def _kernel(how: Divergence, tokens: Tokens, heads: Heads) -> Callable | None:
    """The kernel for a chunk's loss and gradient on the chip at hand, or None; `fused_kl` has the rule."""
    here = chip()
    if isinstance(tokens.teacher, TopK):
        return None
    implementation = how.implementation
    if implementation == "auto":
        operands = [x for x in (*tokens[:2], *heads[:2]) if x is not None]
        possible = here.alone and has_kernel(operands)
        implementation = {"cpu": "tiled", "tpu": "pallas"}.get(here.platform, "xla") if possible else "xla"
    if implementation == "xla":
        return None
    if implementation == "tiled":
        return kernel_cpu.loss_and_grad
    if here.platform == "gpu":
        from jaxbake.objectives.kernel_gpu import loss_and_grad  # Pallas takes its time to import

        return loss_and_grad
    from jaxbake.objectives.kernel import loss_and_grad

    recompute = implementation == "pallas_recompute"
    return partial(loss_and_grad, recompute=recompute, kind=here.kind, interpret=here.platform != "tpu")


def _token_losses_bwd(how: Divergence, grad_ND: jax.Array, cotangent_N: jax.Array) -> tuple[Tokens, None]:
    return Tokens((cotangent_N[:, None] * grad_ND).astype(grad_ND.dtype), None, None), None


_token_losses.defvjp(_token_losses_fwd, _token_losses_bwd)


def _chunk_loss(how: Divergence, tokens: Tokens, heads: Heads) -> tuple[jax.Array, jax.Array]:
    """The divergence at a chunk's tokens [C], and temperature times its derivative by the uncapped logits [C, V]."""
    s_CV = student_logits(how, tokens, heads)
    if how.name == "cross_entropy":
        loss_C, dlogits_CV = _cross_entropy(s_CV, tokens.targets_N, how.axes, heads)
    elif not isinstance(tokens.teacher, TopK):
        loss_C, dlogits_CV = _divergence(how, s_CV, teacher_logits(how, tokens, heads), how.axes)
    else:
        ids_CK = tokens.teacher.ids
        coarse_CK, shares_CV = coarse_logits(s_CV, ids_CK, heads, how.axes)
        loss_C, dcoarse_CK = _divergence(how, coarse_CK, _top_logits(tokens.teacher), ())
        dlogits_CV = spread_gradient(dcoarse_CK, shares_CV, ids_CK, heads)
    if how.softcap is not None:
        capped_CV = s_CV if heads.valid is None else jnp.where(heads.real_V, s_CV, 0)
        dlogits_CV *= 1 - jnp.square(capped_CV * (how.temperature / how.softcap))
    return loss_C, dlogits_CV


def _divergence(how: Divergence, s_CV: jax.Array, t_CV: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """The divergence [C] between softmaxes of logits, and its derivative by the student's."""
    match how.name:
        case "forward":
            return _forward(s_CV, t_CV, axes)
        case "reverse":
            return _reverse(s_CV, t_CV, axes)
        case "jsd":
            return _jensen_shannon(s_CV, t_CV, how.beta, axes)
    raise ValueError(f"unknown divergence {how.name}")


def _top_logits(top: TopK) -> jax.Array:
    """The teacher's logits of k + 1 outcomes, the others' last."""
    return jnp.concatenate([top.log_probs, jnp.maximum(top.log_tail, ABSENT)[:, None]], axis=-1)


def _forward(s_CV: jax.Array, t_CV: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """KL(p || q) [C] and its derivative by the student's logits, q - p."""
    log_q_CV, log_p_CV, log_ratio_CV = _log_softmaxes(s_CV, t_CV, axes)
    loss_C = vocab_sum(_kl_terms(jnp.exp(log_p_CV), jnp.exp(log_q_CV), log_ratio_CV), axes)
    # Both exponentials anew: a CPU is quicker to compute them than to write them out and read them again.
    loss_C, log_q_CV, log_p_CV = lax.optimization_barrier((loss_C, log_q_CV, log_p_CV))
    return loss_C, jnp.exp(log_q_CV) - jnp.exp(log_p_CV)


def _reverse(s_CV: jax.Array, t_CV: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """KL(q || p) [C] and its derivative, q (log q/p - its mean under q)."""
    log_q_CV, log_p_CV, log_ratio_CV = _log_softmaxes(s_CV, t_CV, axes)
    q_CV = jnp.exp(log_q_CV)
    loss_C = vocab_sum(_kl_terms(q_CV, jnp.exp(log_p_CV), -log_ratio_CV), axes)
    return loss_C, q_CV * _below_mean(log_ratio_CV, q_CV, axes)


def _jensen_shannon(s_CV: jax.Array, t_CV: jax.Array, beta: float, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """The generalised Jensen-Shannon divergence [C] and its derivative, (1 - beta) q (log q/m - its mean under q)."""
    log_q_CV, log_p_CV, log_ratio_CV = _log_softmaxes(s_CV, t_CV, axes)
    q_CV, p_CV = jnp.exp(log_q_CV), jnp.exp(log_p_CV)
    m_CV = beta * p_CV + (1 - beta) * q_CV
    # m/q = (1 - beta)(1 + exp(x)) and m/p = beta (1 + exp(-x)): no overflow whichever of p and q underflows. In the
    # derivative the constant drops out, so that it keeps its digits where p and q are disjoint and m/q hardly varies.
    x_CV = log_ratio_CV + math.log(beta / (1 - beta))
    softplus_CV = jnp.maximum(x_CV, 0) + jnp.log1p(jnp.exp(-jnp.abs(x_CV)))
    to_p_CV = _kl_terms(p_CV, m_CV, x_CV - softplus_CV - math.log(beta))
    to_q_CV = _kl_terms(q_CV, m_CV, -softplus_CV - math.log1p(-beta))
    loss_C = vocab_sum(beta * to_p_CV + (1 - beta) * to_q_CV, axes)
    return loss_C, (1 - beta) * q_CV * _below_mean(softplus_CV, q_CV, axes)


def _cross_entropy(s_CV: jax.Array, targets_C: jax.Array, axes: Axes, heads: Heads) -> tuple[jax.Array, jax.Array]:
    """-log q(target) [C] and its derivative, q - onehot(target)."""
    max_C1, log_sum_C1 = normaliser(s_CV, axes)
    ids_V = jnp.arange(s_CV.shape[-1]) + (0 if heads.first is None else heads.first)
    hit_CV = ids_V == targets_C[:, None]
    if heads.valid is not None:
        hit_CV &= heads.real_V
    target_C = vocab_sum(jnp.where(hit_CV, s_CV, 0), axes)
    known_C = vocab_sum(hit_CV.astype(s_CV.dtype), axes) > 0
    loss_C = jnp.where(known_C, (max_C1[:, 0] - target_C) + log_sum_C1[:, 0], jnp.nan)
    return loss_C, jnp.exp((s_CV - max_C1) - log_sum_C1) - hit_CV


def _below_mean(x_CV: jax.Array, q_CV: jax.Array, axes: Axes) -> jax.Array:
    """How far x lies below its mean under q.

    The mean is taken in two steps. Where one token has nearly all of q, its distance from the mean is far smaller than
    the mean's rounding, and every row's q sums to 1 up to rounding only; centred, neither does harm.
    """
    centred_CV = x_CV - vocab_sum(q_CV * x_CV, axes)[:, None]
    return vocab_sum(q_CV * centred_CV, axes)[:, None] - centred_CV


def _kl_terms(a_CV: jax.Array, b_CV: jax.Array, log_ratio_CV: jax.Array) -> jax.Array:
    """Terms that sum to KL(a || b), each of them >= 0: a phi(r) with r = log a/b and phi(r) = exp(-r) - 1 + r.

    Beside a r they hold b - a, which sums to nothing. Terms of one sign do not cancel, and an error in the normalisers,
    common to a row's r, counts only to second order: a small divergence keeps its digits. Where a and b are close, phi
    is taken from its series, since the subtraction would lose what is left.
    """
    near = 0.3 if a_CV.dtype == jnp.float32 else 0.01  # the first term left out stays below the rounding
    r = log_ratio_CV
    series = r * r * (1 / 2 + r * (-1 / 6 + r * (1 / 24 + r * (-1 / 120 + r * (1 / 720 - r / 5040)))))
    return jnp.where(jnp.abs(r) < near, a_CV * series, (b_CV - a_CV) + a_CV * r)


def _log_softmaxes(s_CV: jax.Array, t_CV: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log q, log p and log p/q, the last from the difference of the logits, which is exact where they are close."""
    s_max_C1, s_log_sum_C1 = normaliser(s_CV, axes)
    t_max_C1, t_log_sum_C1 = normaliser(t_CV, axes)
    shift_C1 = (t_max_C1 - s_max_C1) + (t_log_sum_C1 - s_log_sum_C1)
    return (s_CV - s_max_C1) - s_log_sum_C1, (t_CV - t_max_C1) - t_log_sum_C1, (t_CV - s_CV) - shift_C1


def _argmax(x_CV: jax.Array, axes: Axes, first: jax.Array | None) -> jax.Array:
    """The id of the largest logit [C], the lowest of equal ones; `first`: the id of the first one here."""
    at_C = jnp.argmax(x_CV, axis=-1)
    if not axes:
        return at_C
    max_C = jnp.max(x_CV, axis=-1)
    here_C = max_C == lax.pmax(max_C, axes)
    return lax.pmin(jnp.where(here_C, at_C + first, jnp.iinfo(at_C.dtype).max), axes)
