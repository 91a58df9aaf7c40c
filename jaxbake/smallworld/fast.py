"""The forward pass that crumb is trained with: `models.decoder.forward` of a plain Llama, arranged for CPUs.

Layers are unrolled, attention is recomputed in the backward pass, and products contract their last and first axes only
(XLA's CPU products of transposed operands are several times slower than a transpose and a plain product).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxbake.models import rope
from jaxbake.models.decoder import segment_positions
from jaxbake.models.layer import rms_norm
from jaxbake.models.spec import ModelConfig


def _dot(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    """Product over one axis of each, the leading axis of three shared; accumulated in float32."""
    batch = (0,) if a.ndim == 3 else ()
    return jax.lax.dot_general(a, b, (((over_a,), (over_b,)), (batch, batch)), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _linear(x: jax.Array, w: jax.Array) -> jax.Array:
    return _dot(x, w, 1, 0).astype(x.dtype)


def _linear_fwd(x, w):
    return _linear(x, w), (x, w)


def _linear_bwd(saved, grad):
    x, w = saved
    return _dot(grad, w, 1, 1).astype(x.dtype), _dot(x, grad, 0, 0).astype(w.dtype)


_linear.defvjp(_linear_fwd, _linear_bwd)


@jax.custom_vjp
def _attend(q, k, v, bias):
    return _attend_fwd(q, k, v, bias)[0]


def _attend_fwd(q, k, v, bias):
    """q, k, v [X, T, H], bias [X, T, T] float32 (0 or very negative); q is scaled already."""
    score = _dot(q, k, 2, 2) + bias
    peak = jnp.max(score, -1, keepdims=True)
    weight = jnp.exp(score - peak)
    total = jnp.sum(weight, -1, keepdims=True)
    out = (_dot(weight.astype(q.dtype), v, 2, 1) / total).astype(q.dtype)
    return out, (q, k, v, bias, out, peak + jnp.log(total))


def _attend_bwd(saved, grad):
    q, k, v, bias, out, norm = saved
    p = jnp.exp(_dot(q, k, 2, 2) + bias - norm)
    along = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    ds = (p * (_dot(grad, v, 2, 2) - along)).astype(q.dtype)
    dq, dk, dv = _dot(ds, k, 2, 1), _dot(ds, q, 1, 1), _dot(p.astype(q.dtype), grad, 1, 1)
    return dq.astype(q.dtype), dk.astype(q.dtype), dv.astype(q.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def forward(params: dict, tokens_BT: jax.Array, segments_BT: jax.Array, config: ModelConfig):
    """Final hidden states [B, T, D] in bfloat16, from float32 parameters."""
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {k: v for k, v in params.items() if k != "layers"})
    b, t = tokens_BT.shape
    n, h, d = config.num_heads, config.head_dim, config.hidden_size
    positions = segment_positions(segments_BT)
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    bias = jnp.where(same & jnp.tril(jnp.ones((t, t), bool)), 0.0, -1e30)
    bias = jnp.repeat(bias, n, 0)
    cos, sin = rope.tables(config, positions)

    def heads(y, rotary):
        y = y.reshape(b, t, -1, h)
        y = rope.rotate(y, cos[0], sin[0]) if rotary else y
        return y

    def flat(y):
        y = jnp.repeat(y, n // y.shape[2], 2) if y.shape[2] != n else y
        return jnp.swapaxes(y, 1, 2).reshape(b * n, t, h)

    x = jnp.take(low["embed_tokens"], tokens_BT.reshape(-1), axis=0)
    for i in range(config.num_layers):
        layer = {k: v[i] for k, v in params["layers"].items()}

        def linear(y, name, layer=layer):
            return _linear(y, layer[name].astype(y.dtype))

        y = rms_norm(x, layer["input_layernorm"].astype(x.dtype), config.norm_eps, 0.0)
        q, k, v = (linear(y, name) for name in ("q_proj", "k_proj", "v_proj"))
        q = heads(q, True) * jnp.asarray(config.query_scale, x.dtype)
        y = _attend(flat(q), flat(heads(k, True)), flat(heads(v, False)), bias)
        y = jnp.swapaxes(y.reshape(b, n, t, h), 1, 2).reshape(b * t, n * h)
        x = x + linear(y, "o_proj")
        y = rms_norm(x, layer["post_attention_layernorm"].astype(x.dtype), config.norm_eps, 0.0)
        x = x + linear(jax.nn.silu(linear(y, "gate_proj")) * linear(y, "up_proj"), "down_proj")
    return rms_norm(x, low["norm"], config.norm_eps, 0.0).reshape(b, t, d)
