"""The decoder on a mesh: what is laid out how, and the two parts that are not left to the compiler's partitioner.

Weights lie split by width over fsdp. Either each layer gathers its own just before it uses them, beside activations
split by rows; or, where there are fewer tokens than the model is wide (decoding), the weights stay where they are, and
the few activations travel.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxbake.mesh import AnyMesh, constrain, gathered, parts, split_over
from jaxbake.models.attention import Keys, Seen, attend
from jaxbake.models.quantised import Quantised
from jaxbake.models.spec import ModelConfig, factor_axes, is_param, param_specs


def stationary(tokens: int, config: ModelConfig) -> bool:
    """Whether the weights stay in their shards: gathering a [D, O] matrix moves more than tokens of width D + O do."""
    return tokens * 4 <= config.hidden_size


def whole_layer(layer: dict, factors: dict | None, config: ModelConfig, mesh: AnyMesh | None) -> tuple[dict, Any]:
    """One block's parameters and factors, gathered over fsdp."""
    if mesh is None:
        return layer, factors
    layer = {name: _whole_weight(name, w, config, mesh) for name, w in layer.items()}
    if factors is not None:
        axes = factor_axes(config)
        factors = {
            slot: {name: gathered(x, (None,) * (x.ndim - 2) + axes[slot][name][1:], mesh) for name, x in factor.items()}
            for slot, factor in factors.items()
        }
    return layer, factors


def _whole_weight(name: str, weight: Any, config: ModelConfig, mesh: AnyMesh) -> Any:
    specs = param_specs(config, weight.kind if isinstance(weight, Quantised) else None)["layers"][name]
    return jax.tree.map(lambda p, x: constrain(x, _whole(p.axes[1:]), mesh), specs, weight, is_leaf=is_param)


def _whole(axes: tuple[str, ...]) -> tuple[str | None, ...]:
    return tuple(None if name == "embed" else name for name in axes)


def recompute_gathers(prim: Any, *_, **__) -> bool:
    """A policy for `jax.checkpoint`: everything may be kept for the backward pass but the gathered weights."""
    return prim.name != "sharding_constraint"


def lookup(table_VD: jax.Array, tokens_BT: jax.Array, mesh: AnyMesh | None) -> jax.Array:
    """Rows of the embedding [B, T, D], neither the table nor its gradient ever in one place.

    Each device looks up the tokens of all its fsdp group in its own columns, and in its own part of the vocabulary;
    then rows are exchanged for columns, and the parts summed.
    """
    if mesh is None:
        return jnp.take(table_VD, tokens_BT, axis=0)
    rows, seq = _split("batch", tokens_BT.shape[0], mesh), _split("seq", tokens_BT.shape[1], mesh)
    vocab, embed = split_over("vocab", mesh), split_over("embed", mesh)
    shared = tuple(axis for axis in rows if axis in embed)  # over these, rows are split and columns too

    def local(table, tokens):
        if shared:
            tokens = jax.lax.all_gather(tokens, shared, tiled=True)
        if vocab:
            tokens = tokens - jax.lax.axis_index(vocab) * table.shape[0]
            here = (tokens >= 0) & (tokens < table.shape[0])
            x = jnp.where(here[..., None], jnp.take(table, tokens, axis=0, mode="clip"), 0)
        else:
            x = jnp.take(table, tokens, axis=0)
        if shared:
            x = jax.lax.all_to_all(x, shared, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(x, vocab) if vocab else x

    wide = tuple(axis for axis in embed if axis not in shared)
    specs = (P(vocab or None, embed or None), P(rows or None, seq or None))
    out = P(rows or None, seq or None, wide or None)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(table_VD, tokens_BT)


def attend_on(
    mesh: AnyMesh | None, q_BTNH: jax.Array, blocks: list[Keys], *, scale: float, softcap: float | None = None
) -> jax.Array:
    """`attention.attend` on a mesh: rows over replica and fsdp, heads over tp, the queries' tokens over context.

    The last block holds the rows' own keys, which lie as the queries do: they are gathered over context. Key heads
    that tp does not divide are on every device; each takes those of its query heads.
    """
    if mesh is None:
        return attend(q_BTNH, blocks, scale=scale, softcap=softcap)
    b, t, n, _ = q_BTNH.shape
    kv_heads = blocks[0].k.shape[-2]
    rows, seq = _split("batch", b, mesh), _split("seq", t, mesh)
    heads, kv = _split("heads", n, mesh), _split("kv_heads", kv_heads, mesh)
    group = n // kv_heads

    def local(q, blocks):
        def of_these_heads(x):
            if kv or not heads:
                return x
            count = q.shape[2]
            first = jax.lax.axis_index(heads) * count
            if group % count == 0:
                return jax.lax.dynamic_slice_in_dim(x, first // group, 1, axis=-2)
            if count % group == 0:
                return jax.lax.dynamic_slice_in_dim(x, first // group, count // group, axis=-2)
            return jnp.take(x, (first + jnp.arange(count)) // group, axis=-2)  # one of its own for each query head

        def whole(x):
            return jax.lax.all_gather(x, seq, axis=1, tiled=True) if seq and x is not None else x

        keys = [block._replace(k=of_these_heads(block.k), v=of_these_heads(block.v)) for block in blocks]
        k, v, seen = keys[-1]
        seen = seen._replace(positions=whole(seen.positions), key_segments=whole(seen.key_segments))
        keys[-1] = Keys(whole(k), whole(v), seen)
        return attend(q, keys, scale=scale, softcap=softcap)

    def lies(block: Keys, own: bool) -> Keys:
        tokens, along = P(rows or None, seq or None), (seq or None) if own else None
        shared = block.k.ndim == 3
        k = P(None, kv or None, None) if shared else P(rows or None, along, kv or None, None)
        positions = P(None) if block.seen.positions.ndim == 1 else P(rows or None, along)
        specs = Seen(tokens, positions, tokens, positions, tokens)
        return Keys(k, k, Seen(*(None if x is None else spec for x, spec in zip(block.seen, specs, strict=True))))

    specs = [lies(block, i == len(blocks) - 1) for i, block in enumerate(blocks)]
    q_spec = P(rows or None, seq or None, heads or None, None)
    spread = jax.shard_map(
        local, mesh=mesh, in_specs=(q_spec, specs), out_specs=P(rows or None, seq or None, heads or None),
        check_vma=False,
    )  # fmt: skip
    return spread(q_BTNH, blocks)


def _split(name: str, size: int, mesh: AnyMesh) -> tuple[str, ...]:
    """The mesh axes a logical axis of this size is split over: none where they do not divide it."""
    return split_over(name, mesh) if size % parts(name, mesh) == 0 else ()
