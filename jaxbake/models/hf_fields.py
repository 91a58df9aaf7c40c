"""Reading a Hugging Face `config.json`: typed fields, rotary embeddings, attention windows; errors name the field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxbake.errors import JaxbakeError
from jaxbake.models.spec import RopeConfig

_REQUIRED = object()


class Fields:
    """Typed access to a `config.json`; null counts as absent, errors name the field."""

    def __init__(self, raw: dict):
        self.raw = raw

    def get(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """A field of type `kind`, or `default`; without a default it must be there."""
        value = self.raw.get(name)
        if value is None:
            if default is _REQUIRED:
                raise JaxbakeError(f"config.json: no '{name}'; this architecture cannot be built without it")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise JaxbakeError(f"config.json: {name} = {value!r} should be of type {kind.__name__}")
        return value

    def size(self, name: str, default: Any = _REQUIRED) -> Any:
        """A whole number of at least 1."""
        value = self.get(name, int, default)
        if value is not None and value < 1:
            raise JaxbakeError(f"config.json: {name} = {value} should be at least 1")
        return value


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def read_activation(fields: Fields, name: str, default: str) -> str:
    """Our name of the activation function the field names."""
    value = fields.get(name, str, default)
    if value not in _ACTIVATIONS:
        raise JaxbakeError(f"config.json: {name} = '{value}' is not supported; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


# Rotary position embedding

_ROPE_KEYS = frozenset({
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor",
    "short_factor", "long_factor",
})  # fmt: skip
_ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def read_rope(fields: Fields, *, theta: float = 1e4, kinds=_ROPE_KINDS, partial: bool = False) -> RopeConfig:
    """A model's one rotary embedding: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    raw = fields.get("rope_scaling", dict, None) or fields.get("rope_parameters", dict, None) or {}
    theta = fields.get("rope_theta", float, theta)
    return _rope_from(raw, fields, theta=theta, kinds=kinds, partial=partial)


def _rope_from(raw: dict, fields: Fields, *, theta: float, kinds=_ROPE_KINDS, partial: bool = False) -> RopeConfig:
    for key in raw:
        if key not in _ROPE_KEYS:
            raise JaxbakeError(
                f"config.json: '{key}' in the rope parameters is not supported; known: {_listed(_ROPE_KEYS)}"
            )
    rope = Fields(raw)
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    kind = "longrope" if "longrope" in kinds and kind in ("su", "yarn") else kind
    if kind not in kinds:
        raise JaxbakeError(f"config.json: rope type '{kind}' is not supported for this family; known: {_listed(kinds)}")
    fraction = rope.get("partial_rotary_factor", float, fields.get("partial_rotary_factor", float, 1.0))
    if fraction != 1.0 and not partial:
        raise JaxbakeError(f"config.json: partial_rotary_factor = {fraction} is not supported for this family")
    longest = fields.size("max_position_embeddings")
    original = fields.size("original_max_position_embeddings", rope.size("original_max_position_embeddings", longest))
    base = RopeConfig(theta=rope.get("rope_theta", float, theta), kind=kind, rotary_fraction=fraction)
    if kind == "linear":
        return replace(base, factor=rope.get("factor", float))
    if kind == "llama3":
        return replace(
            base,
            factor=rope.get("factor", float),
            low_freq_factor=rope.get("low_freq_factor", float),
            high_freq_factor=rope.get("high_freq_factor", float),
            original_max_positions=original,
        )
    if kind == "yarn":
        return replace(
            base,
            factor=rope.get("factor", float, longest / original),
            beta_fast=rope.get("beta_fast", float, 32.0),
            beta_slow=rope.get("beta_slow", float, 1.0),
            truncate=rope.get("truncate", bool, True),
            attention_factor=rope.get("attention_factor", float, None),
            original_max_positions=original,
        )
    if kind == "longrope":
        head_dim = fields.size("head_dim", fields.size("hidden_size") // fields.size("num_attention_heads"))
        count = int(head_dim * fraction) // 2
        factors = {name: tuple(rope.get(name, list)) for name in ("short_factor", "long_factor")}
        for name, values in factors.items():
            if len(values) != count or not all(isinstance(value, (int, float)) for value in values):
                raise JaxbakeError(f"config.json: {name} has {len(values)} entries; it should hold {count} numbers")
        return replace(
            base,
            factor=rope.get("factor", float, longest / original),
            attention_factor=rope.get("attention_factor", float, None),
            original_max_positions=original,
            **{name: tuple(map(float, values)) for name, values in factors.items()},
        )
    return base


def read_ropes_by_type(fields: Fields, layer_types: list[str], *, sliding: float, full: float) -> dict:
    """`ropes` and `layer_rope` of families whose windowed and full layers have rotary embeddings of their own.

    transformers 5: `rope_parameters` by layer type. 4: `rope_theta` and `rope_scaling` for the full layers,
    `rope_local_base_freq` for the windowed ones. `sliding`, `full`: the thetas where none are given.
    """
    by_type = fields.get("rope_parameters", dict, None) or {}
    for key in by_type:
        if key not in _LAYER_TYPES:
            raise JaxbakeError(f"config.json: '{key}' in rope_parameters; it should hold {_listed(_LAYER_TYPES)}")
    full_raw = by_type.get("full_attention") or fields.get("rope_scaling", dict, None) or {}
    full_rope = _rope_from(full_raw, fields, theta=fields.get("rope_theta", float, full))
    theta = fields.get("rope_local_base_freq", float, sliding)
    sliding_rope = _rope_from(by_type.get("sliding_attention") or {}, fields, theta=theta)
    return assign_ropes([full_rope if kind == "full_attention" else sliding_rope for kind in layer_types])


def assign_ropes(per_layer: list[RopeConfig]) -> dict:
    """`ropes` and `layer_rope` from one rotary embedding per layer."""
    ropes = tuple(dict.fromkeys(per_layer))
    return {"ropes": ropes, "layer_rope": tuple(map(ropes.index, per_layer)) if len(ropes) > 1 else ()}


# Attention windows

_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_layer_types(fields: Fields, is_sliding: Callable[[int], bool]) -> list[str]:
    """`layer_types`, or by the family's own pattern where absent."""
    layers = fields.size("num_hidden_layers")
    types = fields.get("layer_types", list, None)
    if types is None:
        return [_LAYER_TYPES[bool(is_sliding(i))] for i in range(layers)]
    if len(types) < layers or any(kind not in _LAYER_TYPES for kind in types):
        raise JaxbakeError(f"config.json: layer_types should hold {layers} of {_listed(_LAYER_TYPES)}")
    return types[:layers]


def make_windows(layer_types: list[str], window: int | None) -> tuple[int, ...]:
    """The attention window of every layer, 0 for full attention; empty where no layer has one."""
    if "sliding_attention" not in layer_types:
        return ()
    if window is None:
        raise JaxbakeError("config.json: layer_types has sliding_attention, but no sliding_window is set")
    return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)


def read_one_window(fields: Fields) -> tuple[int, ...]:
    """One window for all layers, where `sliding_window` is set (Mistral, Phi-3)."""
    window = fields.size("sliding_window", None)
    kind = "full_attention" if window is None else "sliding_attention"
    if set(read_layer_types(fields, lambda i: window is not None)) != {kind}:
        raise JaxbakeError("config.json: layer_types that differ from layer to layer are not supported for this family")
    return () if window is None else (window,) * fields.size("num_hidden_layers")


def _listed(names) -> str:
    return ", ".join(sorted(names))
