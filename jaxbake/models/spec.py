"""What a decoder is: its settings, and shape, axes, init and Hugging Face name of every parameter, stated once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jaxbake.models.quantised import Quantised, check_kind, group_size


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and the rescalings in use.

    kind: "default", "linear", "llama3", "yarn", "longrope" or "none" (a layer without position embedding).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    rotary_fraction: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a dense decoder; `models.families` makes one from a Hugging Face `config.json`.

    norm_placement: "pre" (Llama), "sandwich" (Gemma 2 and 3: before and after each block), "post" (OLMo 2).
    qk_norm: None, "head" (one scale per head dim), "full" (over all heads together, OLMo 2).
    norm_offset: the scale is `norm_offset + weight` (1 for Gemma).
    windows: attention window per layer, 0 for full attention; a query sees keys less than `window` back.
    ropes / layer_rope: the rotary tables in use, and which of them each layer takes.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 4096
    norm_eps: float = 1e-6
    activation: str = "silu"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused_projections: bool = False
    qk_norm: str | None = None
    norm_placement: str = "pre"
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int, ...] = ()
    ropes: tuple[RopeConfig, ...] = (RopeConfig(),)
    layer_rope: tuple[int, ...] = ()
    init_range: float = 0.02

    @property
    def query_scale(self) -> float:
        """What query-key products are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale


@dataclass(frozen=True)
class Param:
    """One parameter. `axes` are logical axis names; `hf` is its Hugging Face name, `{layer}` standing for the index.

    A stacked parameter (first axis "layers") is one Hugging Face tensor per layer; `transpose` swaps the last two axes.
    `dtype` is set where it is not the model's: in the parts of a `Quantised`.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf: str
    init: str = "normal"
    transpose: bool = False
    dtype: str | None = None


def linear_shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, str], tuple[int, str]]]:
    """The linear layers of one block: name -> ((input size, axis), (output size, axis))."""
    embed = (config.hidden_size, "embed")
    heads = (config.num_heads * config.head_dim, "heads")
    kv_heads = (config.num_kv_heads * config.head_dim, "kv_heads")
    mlp = (config.intermediate_size, "mlp")
    if config.fused_projections:
        qkv = (heads[0] + 2 * kv_heads[0], "heads")
        return {
            "qkv_proj": (embed, qkv),
            "o_proj": (heads, embed),
            "gate_up_proj": (embed, (2 * mlp[0], "mlp")),
            "down_proj": (mlp, embed),
        }
    return {
        "q_proj": (embed, heads),
        "k_proj": (embed, kv_heads),
        "v_proj": (embed, kv_heads),
        "o_proj": (heads, embed),
        "gate_proj": (embed, mlp),
        "up_proj": (embed, mlp),
        "down_proj": (mlp, embed),
    }


def factor_axes(config: ModelConfig) -> dict[str, dict[str, tuple[str, str, str]]]:
    """Logical axes of a delta's factors: A [L, I, R] and B [L, R, O] lie as the weight's inputs and outputs."""
    return {
        slot: {"a": ("layers", axis_in, "rank"), "b": ("layers", "rank", axis_out)}
        for slot, ((_, axis_in), (_, axis_out)) in linear_shapes(config).items()
    }


ATTENTION_SLOTS = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"})


def hf_module(slot: str) -> str:
    """Hugging Face path of a block's linear layer inside its layer: `self_attn.q_proj`, `mlp.gate_proj`."""
    return f"{'self_attn' if slot in ATTENTION_SLOTS else 'mlp'}.{slot}"


def _has_bias(config: ModelConfig, slot: str) -> bool:
    if slot == "o_proj":
        return config.o_bias
    return config.qkv_bias if slot in ATTENTION_SLOTS else config.mlp_bias


def _norms(config: ModelConfig) -> tuple[str, ...]:
    return {
        "pre": ("input_layernorm", "post_attention_layernorm"),
        "sandwich": (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    }[config.norm_placement]


def param_specs(config: ModelConfig, quantize: str | None = None) -> dict:
    """Every parameter of the model as a tree of `Param`; layers are stacked on a leading axis.

    quantize: "int8" or "int4" makes the weights of linear layers `Quantised` ones; norms, biases, embeddings and the
    head stay as they are.
    """
    n, d, v = config.num_layers, config.hidden_size, config.vocab_size
    unit = "zeros" if config.norm_offset else "ones"
    layers: dict[str, Param] = {}
    for slot, ((size_in, axis_in), (size_out, axis_out)) in linear_shapes(config).items():
        module = f"model.layers.{{layer}}.{hf_module(slot)}"
        weight = Param((n, size_in, size_out), ("layers", axis_in, axis_out), f"{module}.weight", transpose=True)
        layers[slot] = quantised_spec(weight, quantize) if quantize else weight
        if _has_bias(config, slot):
            layers[f"{slot}_bias"] = Param((n, size_out), ("layers", axis_out), f"{module}.bias", "zeros")
    for name in _norms(config):
        layers[name] = Param((n, d), ("layers", "embed"), f"model.layers.{{layer}}.{name}.weight", unit)
    if config.qk_norm:
        full = config.qk_norm == "full"
        for name, heads, axis in (("q_norm", config.num_heads, "heads"), ("k_norm", config.num_kv_heads, "kv_heads")):
            size, axis = (heads * config.head_dim, axis) if full else (config.head_dim, "head_dim")
            hf = f"model.layers.{{layer}}.self_attn.{name}.weight"
            layers[name] = Param((n, size), ("layers", axis), hf, unit)
    specs = {
        "embed_tokens": Param((v, d), ("vocab", "embed"), "model.embed_tokens.weight"),
        "layers": layers,
        "norm": Param((d,), ("embed",), "model.norm.weight", unit),
    }
    if not config.tie_embeddings:
        specs["lm_head"] = Param((v, d), ("vocab", "embed"), "lm_head.weight")
    return specs


def quantised_spec(weight: Param, kind: str) -> Quantised:
    """What a linear layer's weight becomes: the integers lie as the weight does, the scales as its outputs."""
    check_kind(kind)
    (n, size_in, size_out), (_, _, axis_out) = weight.shape, weight.axes
    if kind == "int8":
        scales = Param((n, size_out), ("layers", axis_out), weight.hf, dtype="float32")
        return Quantised(replace(weight, dtype="int8"), scales)
    shape = (n, size_in // group_size(size_in), size_out)
    scales = Param(shape, ("layers", "group", axis_out), weight.hf, dtype="float32")
    return Quantised(replace(weight, shape=(n, size_in // 2, size_out), dtype="uint8"), scales)


def is_param(leaf) -> bool:
    """Whether a leaf of `param_specs` has been reached (for `jax.tree.map(..., is_leaf=is_param)`)."""
    return isinstance(leaf, Param)


def abstract_params(config: ModelConfig, dtype=jnp.float32, quantize: str | None = None) -> dict:
    """`jax.ShapeDtypeStruct` of every parameter, for compiling without weights."""
    specs = param_specs(config, quantize)
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype or dtype), specs, is_leaf=is_param)


def init_params(key: jax.Array, config: ModelConfig, dtype=jnp.float32) -> dict:
    """Random parameters: normal with `init_range` standard deviation, norms at their identity."""
    leaves, tree = jax.tree.flatten(param_specs(config), is_leaf=is_param)

    def init(key, spec: Param):
        if spec.init == "normal":
            return (config.init_range * jax.random.normal(key, spec.shape)).astype(dtype)
        return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, dtype)

    return tree.unflatten(init(k, p) for k, p in zip(jax.random.split(key, len(leaves)), leaves, strict=True))


def num_params(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(param_specs(config), is_leaf=is_param))
