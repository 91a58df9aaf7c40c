"""Low-rank deltas (LoRA, arXiv 2106.09685) as a pytree of their own."""

from __future__ import annotations

import hashlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxbake import hosts
from jaxbake.config import LoraConfig
from jaxbake.errors import JaxbakeError, did_you_mean
from jaxbake.models.quantised import Quantised
from jaxbake.models.spec import ModelConfig, linear_shapes


@flax.struct.dataclass
class Delta:
    """A low-rank change of a base: `W + scale * A @ B` for every slot it has factors for.

    factors: {slot: {"a": [L, I, R], "b": [L, R, O]}}, the only part that is trained.
    scale: float32 scalar, alpha / rank (alpha / sqrt(rank) for rsLoRA) times the strength it is applied with.
    config: the settings it was made with.
    """

    factors: dict
    scale: jax.Array
    config: LoraConfig = flax.struct.field(pytree_node=False)


def target_slots(config: ModelConfig, lora: LoraConfig) -> tuple[str, ...]:
    """The linear layers a delta covers. Raises JaxbakeError for a name the model does not have."""
    known = linear_shapes(config)
    if lora.targets == "all":
        return tuple(known)
    if isinstance(lora.targets, str):
        raise JaxbakeError(f"lora.targets: '{lora.targets}' must be 'all' or a list of names, as [{lora.targets}]")
    for name in lora.targets:
        if name not in known:
            raise JaxbakeError(f"lora.targets: this model has no linear layer '{name}'; {did_you_mean(name, known)}")
    return tuple(slot for slot in known if slot in lora.targets)


def init_delta(key: jax.Array, config: ModelConfig, lora: LoraConfig, dtype=jnp.float32) -> Delta:
    """A delta that changes nothing yet: one factor random (uniform, as in peft), the other zero.

    Raises JaxbakeError where the rank exceeds a layer's smaller side or a target is unknown.
    """
    shapes = linear_shapes(config)
    factors = {}
    for i, slot in enumerate(target_slots(config, lora)):
        (size_in, _), (size_out, _) = shapes[slot]
        if lora.rank > min(size_in, size_out):
            raise JaxbakeError(
                f"lora.rank: {lora.rank} is larger than layer '{slot}' ({size_in} x {size_out}) can use; "
                f"at most {min(size_in, size_out)}, usual are 8 to 64"
            )
        shape_a = (config.num_layers, size_in, lora.rank)
        shape_b = (config.num_layers, lora.rank, size_out)
        a, b = jnp.zeros(shape_a, dtype), jnp.zeros(shape_b, dtype)
        # kaiming_uniform(a=sqrt(5)) of peft is uniform within 1 / sqrt(fan_in)
        if lora.init == "a_random":
            a = jax.random.uniform(jax.random.fold_in(key, i), shape_a, dtype, -1, 1) * size_in**-0.5
        else:
            b = jax.random.uniform(jax.random.fold_in(key, i), shape_b, dtype, -1, 1) * lora.rank**-0.5
        factors[slot] = {"a": a, "b": b}
    return Delta(factors, jnp.float32(lora.scale), lora)


def with_strength(delta: Delta, strength: float) -> Delta:
    """The same delta applied `strength` times as strongly: 0 is the base, 1 the full bake."""
    return delta.replace(scale=delta.scale * strength)


def merge(params: dict, delta: Delta) -> dict:
    """The base with the delta added into its weights; computed in float32, each weight keeps its dtype.

    Raises JaxbakeError for quantised weights: rounded to integers again, they would lose most of the delta.
    """
    layers = dict(params["layers"])
    for slot, factor in delta.factors.items():
        if isinstance(layers[slot], Quantised):
            raise JaxbakeError(
                f"merge: the base is held as {layers[slot].kind}, into which no delta can be added; load it without "
                "quantize, or write the merged model with save_merged, which reads the original weights"
            )
        layers[slot] = _merged(layers[slot], factor["a"], factor["b"], delta.scale)
    return {**params, "layers": layers}


@jax.jit
def _merged(weight_LIO: jax.Array, a_LIR: jax.Array, b_LRO: jax.Array, scale: jax.Array) -> jax.Array:
    def add(layer):  # one layer at a time: no float32 copy of the whole stack
        weight, a, b = (x.astype(jnp.float32) for x in layer)
        return (weight + scale * jnp.matmul(a, b, precision="highest")).astype(weight_LIO.dtype)

    return jax.lax.map(add, (weight_LIO, a_LIR, b_LRO))


def delta_digest(delta: Delta) -> str:
    """sha256 over the factors' names, shapes, dtypes and bytes, and the scale: equal only for bitwise equal deltas.

    Of factors that lie with several processes all must call it (or `hosts.fetch` them first).
    """
    digest = hashlib.sha256()
    for slot in sorted(delta.factors):
        for name in sorted(delta.factors[slot]):
            array = hosts.fetch(delta.factors[slot][name])
            digest.update(f"{slot}.{name} {array.shape} {array.dtype.name}\n".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(np.float32(hosts.fetch(delta.scale)).tobytes())
    return digest.hexdigest()


def check_fits(delta: Delta, config: ModelConfig, source: str) -> None:
    """Raises JaxbakeError listing every factor that does not fit the model; `source` names the delta in it."""
    shapes, wrong = linear_shapes(config), []
    for slot, factor in delta.factors.items():
        a, b = factor["a"].shape, factor["b"].shape
        if slot not in shapes:
            wrong.append(f"'{slot}' is no linear layer of this model ({did_you_mean(slot, shapes)})")
            continue
        (size_in, _), (size_out, _) = shapes[slot]
        for name, shape, right in (
            ("A", a, (config.num_layers, size_in, a[-1])),
            ("B", b, (config.num_layers, a[-1], size_out)),
        ):
            if shape != right:
                wrong.append(f"{slot} {name} is {list(shape)}, must be {list(right)}")
    if wrong:
        raise JaxbakeError(f"{source}: does not fit the base: {'; '.join(wrong)}")
