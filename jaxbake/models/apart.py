"""Decoding on a CPU: what every token reads lies layer by layer, and as the products want it.

`lax.scan` gives its body a copy of each layer's weights, and attention first turns the keys and values round. Beside
the few rows of a decoding step that is as much work as the products themselves, so it is done once, before the loop
over tokens, whose body then goes through the layers one by one. An accelerator reads slices in place and scans.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp

from jaxbake.chip import chip
from jaxbake.models.linear import add_factors
from jaxbake.models.quantised import Quantised

BYTES = range(2**24, 2**31)
"""Sizes of the layers that are laid apart: smaller ones take longer to compile so than it saves, larger ones are not to
be held twice."""


def wanted(params: Any) -> bool:
    """Whether this model's layers are to lie apart where the computation being traced will run."""
    here, layers = chip(), params["layers"]
    plain = not any(isinstance(weight, Quantised) for weight in layers.values())  # those would be copied as floats
    return here.platform == "cpu" and here.alone and plain and sum(w.nbytes for w in layers.values()) in BYTES


def is_apart(tree: Any) -> bool:
    """Whether layers, keys or values lie apart: as a tuple, one entry a layer."""
    return isinstance(tree, tuple)


def each(stacked: Any) -> tuple:
    """Trees of the layers one by one, of a tree of arrays [L, ...]."""
    layers = jax.tree.leaves(stacked)[0].shape[0]
    return tuple(jax.tree.map(itemgetter(i), stacked) for i in range(layers))


def lay_apart(params: Any, delta: Any) -> tuple[Any, Any]:
    """The parameters with a tuple of layers, and the delta with its factors apart likewise.

    One delta for all rows is added to float32 weights, and None is left of it; low precision would round it away.
    """
    layers = each(params["layers"])
    exact = params["embed_tokens"].dtype == jnp.float32
    if delta is not None:
        factors, shared = each(delta.factors), jnp.ndim(delta.scale) == 0
        if exact and shared:
            layers = tuple(_added(*both, delta.scale) for both in zip(layers, factors, strict=True))
        delta = None if exact and shared else delta.replace(factors=factors)
    return params | {"layers": layers}, delta


def _added(layer: dict, factors: dict, scale: jax.Array) -> dict:
    return layer | {slot: add_factors(layer[slot], f["a"], f["b"], scale) for slot, f in factors.items()}


def turned(memory: Any) -> Any:
    """A `Prefix` or `Cache` with its keys and values apart: k [..., K, H, S] and v [..., K, S, H] of each layer."""
    return memory.replace(k=each(jnp.moveaxis(memory.k, -3, -1)), v=each(jnp.swapaxes(memory.v, -3, -2)))


def stacked(memory: Any) -> Any:
    """The inverse of `turned`."""
    return memory.replace(k=jnp.moveaxis(jnp.stack(memory.k), -1, -3), v=jnp.swapaxes(jnp.stack(memory.v), -3, -2))


def seen(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One layer's turned keys and values as `attention.Keys` has them, [..., S, K, H]; no copy where they are read."""
    return jnp.moveaxis(k, -1, -3), jnp.swapaxes(v, -3, -2)


def write(k: jax.Array, v: jax.Array, new_k: jax.Array, new_v: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One layer's turned cache with keys and values [B, T, K, H] of new tokens from slot `at` on."""
    new_k, new_v = jnp.moveaxis(new_k, -3, -1).astype(k.dtype), jnp.swapaxes(new_v, -3, -2).astype(v.dtype)
    return jax.lax.dynamic_update_slice(k, new_k, (0, 0, 0, at)), jax.lax.dynamic_update_slice(v, new_v, (0, 0, at, 0))


def scan(block: Any, x: Any, layers: tuple) -> tuple[Any, dict[str, tuple]]:
    """As `jax.lax.scan` of a block over (parameters, factors, details, memory) that lie apart."""
    params, factors, details, memory = layers
    made = []
    for i, detail in enumerate(each(details)):
        own = {name: (k[i], v[i]) for name, (k, v) in memory.items()}
        x, kv = block(x, (params[i], None if factors is None else factors[i], detail, own))
        made.append(kv)
    return x, {name: tuple(kv[name] for kv in made) for name in ("k", "v")}
