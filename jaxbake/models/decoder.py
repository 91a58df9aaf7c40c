"""The decoder: one pure, scanned forward pass for every dense family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake.chip import chip
from jaxbake.mesh import AnyMesh, constrain, in_context, mesh_of
from jaxbake.models import apart, rope
from jaxbake.models.attention import Keys, Seen
from jaxbake.models.cache import PREFIX_AXES, Cache, Prefix, take_slots
from jaxbake.models.layer import mlp, project_qkv, rms_norm, take
from jaxbake.models.linear import LINEAR, einsum, linear
from jaxbake.models.spec import ModelConfig
from jaxbake.models.spread import attend_on, lookup, recompute_gathers, stationary, whole_layer

NO_WINDOW = np.iinfo(np.int32).max


def _kept(block, remat: bool, mesh: AnyMesh | None):
    """The block, with what it keeps for the backward pass: nothing (`remat`), or on a CPU the linear layers' results,
    or else everything; but weights gathered on a mesh are gathered again, or a copy of the model would be kept.

    A CPU is short of memory bandwidth and pays for every fresh page: there the rest is computed again.
    """
    if remat:
        policy = None
    elif chip().platform == "cpu":
        policy = jax.checkpoint_policies.save_only_these_names(LINEAR)
    elif mesh is not None:
        policy = recompute_gathers
    else:
        return block
    return jax.checkpoint(block, policy=policy, prevent_cse=False)  # needless under scan


def _asked(seen: Seen, at_BK: jax.Array | None) -> Seen:
    """What the queries of these positions see."""
    return seen._replace(
        last=take(seen.last, at_BK), segments=None if seen.segments is None else take(seen.segments, at_BK)
    )


def _scan_to(at_BK: jax.Array, block: Callable, kept: Callable, x: jax.Array, layers: tuple) -> tuple[jax.Array, dict]:
    """As `jax.lax.scan` of a block over (parameters, factors, details, memory), the last one at these positions."""
    params, factors, details, memory = layers
    last = details["window"].shape[0] - 1

    def layer(i):  # one by one out of the whole: the others as an array of their own would be a copy
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (params, details, memory))

    def before(x, xs):
        params, details, memory = layer(xs[0])
        return block(x, (params, xs[1], details, memory))

    def end(x, factors):
        params, details, memory = layer(last)
        return block(x, (params, factors, details, memory), at_BK)

    x, kv = jax.lax.scan(kept(before), x, (jnp.arange(last), jax.tree.map(lambda f: f[:-1], factors)))
    x, more = kept(end)(x, jax.tree.map(lambda f: f[-1], factors))
    return x, jax.tree.map(lambda rest, one: jnp.concatenate([rest, one[None]]), kv, more)


def segment_positions(segments_BT: jax.Array) -> jax.Array:
    """Position of every token inside its own segment, for rows packed with consecutive segments."""
    index = jnp.arange(segments_BT.shape[1])
    starts = jnp.concatenate([jnp.ones_like(segments_BT[:, :1], bool), segments_BT[:, 1:] != segments_BT[:, :-1]], 1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def forward_kv(
    params: Any,
    delta: Any,
    tokens_BT: jax.Array,
    *,
    config: ModelConfig,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    prefix: Prefix | None = None,
    prefix_visible: jax.Array | None = None,
    cache: Cache | None = None,
    remat: bool = False,
    final_norm: bool = True,
    at: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `forward`, and the keys and values of all these tokens: {"k", "v"} [L, B, T, K, H].

    With a cache (and no `at`), the tokens also see the cached tokens of their own row and segment; `append` stores the
    new ones. Without `final_norm`, the first are what the last layer leaves. Layers, prefix and cache may lie apart
    (`models.apart`): then the second are the cache's, the new ones written.
    """
    b, t = tokens_BT.shape
    segments = jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids
    if positions is None:
        positions = segment_positions(segments)
        if prefix_visible is not None:
            positions = positions + prefix_visible
    if prefix is not None and prefix_visible is None:
        raise ValueError("a prefix needs prefix_visible: how many of its tokens each token sees")
    if at is not None and cache is not None:
        raise ValueError("at: is for whole rows; with a cache, give the tokens that are wanted alone")

    in_turn = apart.is_apart(params["layers"])
    blocks = []  # what the queries see of each block of keys, in the order of `memory`, the rows' own last
    if prefix is not None:
        blocks.append(Seen(prefix_visible - 1, jnp.arange(prefix.length)))
    if cache is not None:
        slots = take_slots(cache, positions, segments) if in_turn else cache
        blocks.append(Seen(positions, slots.positions, segments, slots.segments))
    if not in_turn:
        blocks.append(Seen(positions, positions, segments, segments))

    mesh = mesh_of(params)
    still = mesh is not None and stationary(b * t, config)
    rows = None if still else "batch"  # weights that stay where they are want to see all rows
    hidden_axes = (rows, "seq", "embed" if still else None)

    x = constrain(lookup(params["embed_tokens"], tokens_BT, mesh), hidden_axes, mesh)
    if config.embed_scale != 1.0:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    cos, sin = rope.tables(config, positions)
    windows = config.windows or (0,) * config.num_layers
    per_layer = {
        "window": jnp.asarray([w or NO_WINDOW for w in windows], jnp.int32),
        "rope": jnp.asarray(config.layer_rope or (0,) * config.num_layers, jnp.int32),
    }
    scale = None if delta is None else delta.scale
    chosen = getattr(delta, "rows", None)  # which of several deltas each row takes (`deltas.many.Deltas`)
    if chosen is not None:
        scale = scale[chosen]
    memory = {}
    if prefix is not None:
        memory["prefix"] = (prefix.k, prefix.v)
    if cache is not None:
        memory["cache"] = (cache.k, cache.v)

    def block(x, xs, at=None):
        layer, factors, info, memory = xs
        if not still:
            layer, factors = whole_layer(layer, factors, config, mesh)
        if chosen is not None:
            factors = jax.tree.map(lambda f: f[chosen], factors)

        def norm(y, name):
            return rms_norm(y, layer[name], config.norm_eps, config.norm_offset)

        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        q, k, v = project_qkv(norm(x, "input_layernorm") if before else x, at, layer, factors, scale, config)
        table = (cos[0], sin[0]) if len(config.ropes) == 1 else (cos[info["rope"]], sin[info["rope"]])
        q = constrain(rope.rotate(q, *(take(angle, at) for angle in table)), ("batch", "seq", "heads", None), mesh)
        k = constrain(rope.rotate(k, *table), ("batch", "seq", "kv_heads", None), mesh)
        v = constrain(v, ("batch", "seq", "kv_heads", None), mesh)
        if in_turn:
            k, v = apart.write(*memory["cache"], k, v, cache.index)
            keys = [apart.seen(*kv) for kv in ([memory["prefix"]] if "prefix" in memory else []) + [(k, v)]]
        else:
            keys = [memory[name] for name in ("prefix", "cache") if name in memory] + [(k, v)]
        first = take(positions - info["window"] + 1, at) if any(windows) else None
        seen_keys = [Keys(*kv, _asked(seen, at)._replace(first=first)) for kv, seen in zip(keys, blocks, strict=True)]
        y = attend_on(mesh, q, seen_keys, scale=config.query_scale, softcap=config.attention_softcap)
        y = constrain(y, (rows, "seq", "heads"), mesh)
        y = linear(y, layer, "o_proj", factors, scale)
        x = take(x, at)
        x = constrain(x + (norm(y, "post_attention_layernorm") if after else y), hidden_axes, mesh)
        mlp_norm = {"pre": "post_attention_layernorm", "sandwich": "pre_feedforward_layernorm"}
        y = mlp(norm(x, mlp_norm[config.norm_placement]) if before else x, layer, factors, scale, config, mesh, rows)
        x = constrain(x + (norm(y, "post_feedforward_layernorm") if after else y), hidden_axes, mesh)
        return x, {"k": k, "v": v}

    layers = params["layers"], None if delta is None else delta.factors, per_layer, memory
    with in_context(mesh):
        if in_turn:
            x, kv = apart.scan(block, x, layers)
        elif at is None:
            x, kv = jax.lax.scan(_kept(block, remat, mesh), x, layers)
        else:
            x, kv = _scan_to(at, block, lambda f: _kept(f, remat, mesh), x, layers)
    return rms_norm(x, params["norm"], config.norm_eps, config.norm_offset) if final_norm else x, kv


def forward(params: Any, delta: Any, tokens_BT: jax.Array, *, config: ModelConfig, **options) -> jax.Array:
    """Final hidden states [B, T, D] (after the last norm) of a batch of token rows, in the parameters' dtype.

    Args:
      params: the base, a tree as `models.spec.param_specs` describes.
      delta: a `deltas.lora.Delta`, or None for the base alone; a `deltas.many.Deltas` for a delta of its own a row.
      tokens_BT: int32 [B, T].
      positions: int32 [B, T]; by default counted inside each segment, after the visible prefix.
      segment_ids: int32 [B, T]; tokens see only their own segment; 0 marks padding. By default one segment a row.
      prefix, prefix_visible: a shared `Prefix`, and how many of its tokens each token sees, int32 [B, T].
      remat: recompute each block in the backward pass.
      at: int32 [B, K], the positions in the rows that are wanted: the result is [B, K, D], and the last layer, which is
        compiled by itself then, does nothing for the others but their keys and values.
    """
    return forward_kv(params, delta, tokens_BT, config=config, **options)[0]


def prefix_from(params: Any, delta: Any, tokens_P: jax.Array, *, config: ModelConfig) -> Prefix:
    """Keys and values of a prompt's tokens, int32 [P], computed once to be shared by all rows."""
    _, kv = forward_kv(params, delta, tokens_P[None], config=config)
    mesh = mesh_of(params)
    return Prefix(*(constrain(kv[name][:, 0], PREFIX_AXES, mesh) for name in ("k", "v")))


def unembedding(params: Any) -> jax.Array:
    """The output embedding [V, D]: the input embedding where they are tied."""
    return params.get("lm_head", params["embed_tokens"])


def logits_from(params: Any, hidden: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Next-token logits [..., V] in float32 from hidden states [..., D], soft-capped where the model does."""
    flat, mesh = hidden.reshape(-1, hidden.shape[-1]), mesh_of(params)
    still = mesh is not None and stationary(flat.shape[0], config)
    flat = constrain(flat, (None, "embed"), mesh) if still else flat
    out = einsum("td,vd->tv", flat, unembedding(params).astype(flat.dtype))
    out = constrain(out, (None, "vocab"), mesh) if still else out
    out = constrain(out, ("batch", None), mesh)
    out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
    if config.logit_softcap is not None:
        out = config.logit_softcap * jnp.tanh(out / config.logit_softcap)
    return out.reshape(*hidden.shape[:-1], -1)
