"""Attention over several blocks of keys (shared prefix, cache, the row itself), joined by one softmax.

Which implementation runs is decided when a computation is traced, by the chip it is for and by what that chip's kernel
can express; everything else goes to XLA:

- TPU: the Pallas kernels of `models.flash`: bfloat16 or float32, at least 64 queries a row (so no decoding steps). All
  masks, windows, soft caps and gradients.
- GPU: cuDNN's flash attention: bfloat16 or float16, head size a multiple of 8 up to 128, no soft cap, at least 64
  queries a row. The gradient through several blocks is XLA's.
- CPU: XLA.

A kernel is not split by the partitioner: arrays over several devices reach it through `jax.shard_map`, else XLA runs.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxbake.chip import Chip, chip
from jaxbake.errors import JaxbakeError
from jaxbake.models import apart
from jaxbake.models.linear import LINEAR, einsum

MASKED = -1e30
IMPLEMENTATIONS = ("auto", "xla", "pallas", "cudnn")
FEWEST_QUERIES = 64
MOST_LOGITS = 2**22
"""From so many on, rows are taken in turn: a teacher's pass on two cores is quicker by 7 % at 7 million, and slower by
5 % at 1.4 million."""


class Seen(NamedTuple):
    """Which keys of a block each query sees: those of its own segment at positions first <= p <= last. All int32.

    last: [B, T]; first: likewise, or None for no bound. positions: of the keys, [B, S], or [S] for shared keys.
    segments, key_segments: [B, T] and [B, S], or both None where segments do not matter.
    """

    last: jax.Array
    positions: jax.Array
    segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    first: jax.Array | None = None

    def mask(self) -> jax.Array:
        """The same as bool [B, T, S]."""
        positions = self.positions[..., None, :]
        seen = positions <= self.last[:, :, None]
        if self.first is not None:
            seen &= positions >= self.first[:, :, None]
        if self.segments is not None:
            seen &= self.segments[:, :, None] == self.key_segments[:, None, :]
        return seen


class Keys(NamedTuple):
    """One block of keys and values.

    k, v: [B, S, K, H], or [S, K, H] when all rows share them (then they are never copied per row, and one product
    serves all rows).
    """

    k: jax.Array
    v: jax.Array
    seen: Seen


def attend(
    q_BTNH: jax.Array,
    blocks: list[Keys],
    *,
    scale: float,
    softcap: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention of the queries over all blocks together; returns [B, T, N * H] in the queries' dtype.

    Float32 softmax. Queries that see no key at all (padding) return finite values of no meaning.

    implementation: "auto" (see above), "xla", "pallas" (interpreted where there is no TPU) or "cudnn".
    """
    if implementation not in IMPLEMENTATIONS:
        raise JaxbakeError(f"attention implementation '{implementation}' is none of {', '.join(IMPLEMENTATIONS)}")
    here = chip()
    if implementation == "auto":
        implementation = choose(here, q_BTNH, softcap)
    match implementation:
        case "pallas":
            from jaxbake.models import flash  # Pallas takes its time to import

            return flash.attend(
                q_BTNH, blocks, scale=scale, softcap=softcap, kind=here.kind, interpret=here.platform != "tpu"
            )
        case "cudnn":
            return attend_jax_nn(q_BTNH, blocks, scale=scale, library="cudnn")
        case _:
            return _attend_xla(q_BTNH, blocks, scale, softcap)


def choose(here: Chip, q_BTNH: jax.Array, softcap: float | None) -> str:
    """The implementation that "auto" stands for; the module's docstring has the rules."""
    if not here.alone or q_BTNH.shape[1] < FEWEST_QUERIES:
        return "xla"
    if here.platform == "tpu" and q_BTNH.dtype in (jnp.bfloat16, jnp.float32):
        return "pallas"
    head = q_BTNH.shape[-1]
    if here.platform == "gpu" and q_BTNH.dtype in (jnp.bfloat16, jnp.float16) and softcap is None:
        return "cudnn" if head % 8 == 0 and head <= 128 else "xla"
    return "xla"


def _rows(x_BKGTX: jax.Array, shared: bool) -> jax.Array:
    """Query heads of a group and their tokens side by side, as rows of one matrix per key head [B, K, G * T, X].

    With shared keys the batch joins them [K, B * G * T, X]: few, large products, and keys are never repeated.
    """
    b, k, g, t, x = x_BKGTX.shape
    if shared:
        return x_BKGTX.transpose(1, 0, 2, 3, 4).reshape(k, b * g * t, x)
    return x_BKGTX.reshape(b, k, g * t, x)


def _by_keys(x_BKGTX: jax.Array, keys: jax.Array, spec: str) -> jax.Array:
    """Product of what each query has with keys or values, a matrix per key head ("k" in the spec) [B, K, G, T, ...]."""
    b, k, g, t, _ = x_BKGTX.shape
    shared = keys.ndim == 3
    out = einsum(spec if shared else spec.replace("k", "bk"), _rows(x_BKGTX, shared), keys.swapaxes(-3, -2))
    if shared:
        return out.reshape(k, b, g, t, -1).transpose(1, 0, 2, 3, 4)
    return out.reshape(b, k, g, t, -1)


def _for_keys(weights_BKGTS: jax.Array, x_BKGTH: jax.Array, keys: jax.Array) -> jax.Array:
    """Sums over the queries, weighted: in the shape of `keys`."""
    shared = keys.ndim == 3
    spec = "kqs,kqh->ksh" if shared else "bkqs,bkqh->bksh"
    out = einsum(spec, _rows(weights_BKGTS, shared), _rows(x_BKGTH, shared))
    return out.swapaxes(-3, -2).astype(keys.dtype)


def _scores(q_BKGTH, k, mask_BTS, scale: float, softcap: float | None) -> tuple[jax.Array, jax.Array | None]:
    """Logits in float32 (float64 if they are), masked; and their derivative by the product, where it is not 1."""
    score = _by_keys(q_BKGTH, k, "kqh,ksh->kqs")
    score = score.astype(jnp.promote_types(score.dtype, jnp.float32)) * scale
    slope = None
    if softcap is not None:
        tanh = jnp.tanh(score / softcap)
        score, slope = softcap * tanh, 1 - jnp.square(tanh)
    return jnp.where(mask_BTS[:, None, None], score, MASKED), slope


def _attend_xla(q_BTNH: jax.Array, blocks: list[Keys], scale: float, softcap: float | None) -> jax.Array:
    b, t, n, h = q_BTNH.shape
    kv_heads = blocks[0].k.shape[-2]
    q = q_BTNH.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)
    masks = [block.seen.mask() for block in blocks]
    out = _softmax_mix(scale, softcap, q, [block.k for block in blocks], [block.v for block in blocks], masks)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n * h)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax_mix(scale: float, softcap: float | None, q_BKGTH: jax.Array, keys: list, values: list, masks: list):
    """Attention of grouped queries over all blocks [B, K, G, T, H]. Its gradient keeps no weights, but their sums."""
    if _by_rows(q_BKGTH, keys):
        return _mix_rows(scale, softcap, q_BKGTH, keys, values, masks)
    return _softmax_mix_fwd(scale, softcap, q_BKGTH, keys, values, masks)[0]


def _by_rows(q_BKGTH: jax.Array, keys: list) -> bool:
    """Whether to take a row after the other, for a CPU, whose cache the logits over a prompt would not fit."""
    here, rows = chip(), q_BKGTH.shape[:-1]
    logits = math.prod(rows) * sum(k.shape[-3] for k in keys)
    shares = any(k.ndim == 3 for k in keys)
    return here.platform == "cpu" and here.alone and shares and rows[0] > 1 and logits >= MOST_LOGITS


def _mix_rows(scale, softcap, q_BKGTH, keys, values, masks):
    """The same, row by row; keys and values are turned as the products want them once for all rows."""
    turned = [(jnp.moveaxis(k, -3, -1), jnp.swapaxes(v, -3, -2)) for k, v in zip(keys, values, strict=True)]
    turned = jax.lax.optimization_barrier(turned)
    own = [None if kv[0].ndim == 3 else kv for kv in turned]

    def mix(row):
        q_KGTH, mine, masks_TS = jax.tree.map(lambda x: x[None], row)
        pairs = [apart.seen(*(kv if k is None else k)) for kv, k in zip(turned, mine, strict=True)]
        return _softmax_mix_fwd(scale, softcap, q_KGTH, *map(list, zip(*pairs, strict=True)), masks_TS)[0][0]

    return jax.lax.map(mix, (q_BKGTH, own, masks))


def _softmax_mix_fwd(scale, softcap, q, keys, values, masks):
    logits = [_scores(q, k, mask, scale, softcap)[0] for k, mask in zip(keys, masks, strict=True)]
    peak = logits[0].max(-1, keepdims=True)
    for score in logits[1:]:
        peak = jnp.maximum(peak, score.max(-1, keepdims=True))
    weights = [jnp.exp(score - peak) for score in logits]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    mixed = sum(_by_keys(w.astype(q.dtype), v, "kqs,ksh->kqh") for w, v in zip(weights, values, strict=True))
    out = checkpoint_name((mixed / total).astype(q.dtype), LINEAR)
    log_total = checkpoint_name(peak + jnp.log(total), LINEAR)
    return out, (q, keys, values, masks, out, log_total)


def _softmax_mix_bwd(scale, softcap, saved, grad):
    q, keys, values, masks, out, log_total = saved
    along = jnp.sum(grad.astype(log_total.dtype) * out.astype(log_total.dtype), -1, keepdims=True)
    grad_q, grad_keys, grad_values = 0.0, [], []
    for k, v, mask in zip(keys, values, masks, strict=True):
        score, slope = _scores(q, k, mask, scale, softcap)
        weights = jnp.exp(score - log_total)
        grad_score = scale * weights * (_by_keys(grad, v, "kqh,ksh->kqs") - along)
        grad_score = (grad_score if slope is None else grad_score * slope).astype(q.dtype)
        grad_q = grad_q + _by_keys(grad_score, k, "kqs,ksh->kqh")
        grad_keys.append(_for_keys(grad_score, q, k))
        grad_values.append(_for_keys(weights.astype(q.dtype), grad, v))
    return grad_q.astype(q.dtype), grad_keys, grad_values, None


_softmax_mix.defvjp(_softmax_mix_fwd, _softmax_mix_bwd)


def attend_jax_nn(q_BTNH: jax.Array, blocks: list[Keys], *, scale: float, library: str) -> jax.Array:
    """`attend` by `jax.nn.dot_product_attention`, "cudnn" (or "xla", to test this by where there is no GPU)."""
    if len(blocks) > 1 or blocks[0].k.ndim == 3:
        return _join_jax_nn(scale, library, q_BTNH, blocks)
    mask = blocks[0].seen.mask()[:, None]
    out = jax.nn.dot_product_attention(q_BTNH, blocks[0].k, blocks[0].v, mask=mask, scale=scale, implementation=library)
    return out.reshape(*q_BTNH.shape[:2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _join_jax_nn(scale: float, library: str, q_BTNH: jax.Array, blocks: list[Keys]) -> jax.Array:
    """Each block by itself, then joined by log-sum-exp; jax has no gradient through that, so it is `_attend_xla`'s."""
    b, t, n, h = q_BTNH.shape
    outs, peaks = [], []
    for block in blocks:
        q, k, v, mask = q_BTNH, block.k, block.v, block.seen.mask()
        if k.ndim == 3:  # one product for all rows
            q, k, v, mask = q.reshape(1, b * t, n, h), k[None], v[None], mask.reshape(1, b * t, -1)
        out, peak = jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], scale=scale, implementation=library, return_residual=True
        )
        outs.append(out.reshape(b, t, n, h))
        peaks.append(peak.reshape(b, t, n, 1).astype(jnp.float32))
    joined = jax.nn.logsumexp(jnp.stack(peaks), 0)
    out = sum(jnp.exp(peak - joined) * out.astype(jnp.float32) for peak, out in zip(peaks, outs, strict=True))
    return out.astype(q_BTNH.dtype).reshape(b, t, n * h)


def _join_jax_nn_fwd(scale, library, q_BTNH, blocks):
    return _join_jax_nn(scale, library, q_BTNH, blocks), (q_BTNH, blocks)


def _join_jax_nn_bwd(scale, library, saved, grad):
    q, blocks = saved

    def again(q, keys):
        made = [block._replace(k=k, v=v) for block, (k, v) in zip(blocks, keys, strict=True)]
        return _attend_xla(q, made, scale, None)

    dq, dkeys = jax.vjp(again, q, [(block.k, block.v) for block in blocks])[1](grad)
    return dq, [Keys(dk, dv, None) for dk, dv in dkeys]


_join_jax_nn.defvjp(_join_jax_nn_fwd, _join_jax_nn_bwd)
