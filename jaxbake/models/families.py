"""The supported model families: a Hugging Face `config.json` to our `ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxbake.errors import JaxbakeError, did_you_mean
from jaxbake.models.hf_fields import (
    Fields,
    assign_ropes,
    make_windows,
    read_activation,
    read_layer_types,
    read_one_window,
    read_rope,
    read_ropes_by_type,
)
from jaxbake.models.spec import ModelConfig, RopeConfig


@dataclass(frozen=True)
class Family:
    """One `model_type`: what to call it, models people know it by, and its conversion.

    defaults: what an absent field (not null) means to transformers where families differ; hub configs leave such out.
    wrapped: the language model is one part of a larger one, its fields under `text_config`.
    """

    title: str
    examples: str
    convert: Callable[[Fields, str], ModelConfig]
    defaults: dict = field(default_factory=dict)
    wrapped: bool = False


def convert(hf_config: dict) -> ModelConfig:
    """The architecture a `config.json` describes, in transformers 4 or 5 style.

    `family` of the result is its `model_type`. Raises JaxbakeError for an unknown `model_type`, and for fields that are
    missing, malformed, or would change the computation in a way that is not supported.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str):
        raise JaxbakeError("config.json: no 'model_type'; it should name a family such as llama")
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        nearest = did_you_mean(model_type, FAMILIES)
        hint = "" if nearest.startswith("known") else f"; {nearest}"
        raise JaxbakeError(f"config.json: model_type '{model_type}' is not supported{hint} (supported: {known})")
    family = FAMILIES[model_type]
    fields = Fields({**family.defaults, **text_fields(hf_config)})
    for name, harmless in _UNSUPPORTED.items():
        if (value := fields.raw.get(name)) not in harmless:
            raise JaxbakeError(f"config.json: {name} = {str(value)[:60]} is not supported for '{model_type}'")
    return family.convert(fields, model_type)


def text_fields(hf_config: dict) -> dict:
    """The `config.json` of the language model alone: the same, or the text part of a multimodal model."""
    text = hf_config.get("text_config")
    if not isinstance(text, dict):
        return hf_config
    shared = ("tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id", "quantization_config")
    alone = {**text, **{name: hf_config[name] for name in shared if hf_config.get(name) is not None}}
    names = hf_config.get("architectures") or []
    alone["architectures"] = [name.replace("ForConditionalGeneration", "ForCausalLM") for name in names] or None
    alone["model_type"] = text.get("model_type", f"{hf_config['model_type']}_text")
    return alone


# Fields other implementations compute with and this one does not, with the values that mean "not used".
# (A field that is neither here nor read below is one that transformers does not read for these families either.)
_UNSUPPORTED: dict[str, tuple] = {
    "quantization_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
    "add_cross_attention": (None, False),
    "clip_qkv": (None,),
    "use_qk_norm": (None, False),
    "embedding_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "use_mrope": (None, False),
    "rope_interleaved": (None, False),
    "alibi": (None, False),
}


def _common(fields: Fields, family: str, **changes) -> ModelConfig:
    """What all families share; `changes` are what one family adds."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise JaxbakeError(
            f"config.json: num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}"
        )
    head_dim = fields.size("head_dim", None)
    if head_dim is None:
        if hidden % heads:
            raise JaxbakeError(
                f"config.json: no 'head_dim', and hidden_size = {hidden} is no multiple of {heads} heads"
            )
        head_dim = hidden // heads
    if "activation" not in changes:
        changes["activation"] = read_activation(fields, "hidden_act", "silu")
    config = ModelConfig(
        family=family,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        max_positions=fields.size("max_position_embeddings"),
        norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        init_range=fields.get("initializer_range", float, 0.02),
        **changes,
    )
    rotary = config.ropes[0].rotary_fraction * config.head_dim
    if int(rotary) % 2:
        raise JaxbakeError(f"config.json: rotary position embedding needs an even size, not {int(rotary)} (head_dim)")
    return config


def _llama(fields: Fields, family: str) -> ModelConfig:
    bias = fields.get("attention_bias", bool, False)
    return _common(
        fields,
        family,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.get("mlp_bias", bool, False),
        ropes=(read_rope(fields),),
    )


def _mistral(fields: Fields, family: str) -> ModelConfig:
    return _common(fields, family, ropes=(read_rope(fields),), windows=read_one_window(fields))


def _qwen(fields: Fields, family: str) -> ModelConfig:
    window = fields.size("sliding_window", None) if fields.get("use_sliding_window", bool, False) else None
    first = fields.get("max_window_layers", int, 28)
    types = read_layer_types(fields, lambda i: window is not None and i >= first)
    extra: dict[str, Any] = {"qkv_bias": True}
    if family == "qwen3":
        bias = fields.get("attention_bias", bool, False)
        extra = {"qkv_bias": bias, "o_bias": bias, "qk_norm": "head"}
    return _common(fields, family, ropes=(read_rope(fields),), windows=make_windows(types, window), **extra)


def _gemma(fields: Fields, family: str, **changes) -> ModelConfig:
    """What Gemma 2 and 3 share."""
    bias = fields.get("attention_bias", bool, False)
    return _common(
        fields,
        family,
        activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        qkv_bias=bias,
        o_bias=bias,
        norm_placement="sandwich",
        norm_offset=1.0,
        embed_scale=fields.size("hidden_size") ** 0.5,
        attention_scale=fields.get("query_pre_attn_scalar", float, 256.0) ** -0.5,
        **changes,
    )


def _gemma2(fields: Fields, family: str) -> ModelConfig:
    types = read_layer_types(fields, lambda i: i % 2 == 0)
    return _gemma(
        fields,
        family,
        ropes=(read_rope(fields),),
        windows=make_windows(types, fields.size("sliding_window", None)),
        attention_softcap=fields.get("attn_logit_softcapping", float, None),
        logit_softcap=fields.get("final_logit_softcapping", float, None),
    )


def _gemma3(fields: Fields, family: str) -> ModelConfig:
    if fields.raw.get("attn_logit_softcapping") is not None:  # transformers declares it and does not apply it
        raise JaxbakeError("config.json: attn_logit_softcapping is not supported for Gemma 3")
    pattern = fields.size("sliding_window_pattern", fields.size("_sliding_window_pattern", 6))
    types = read_layer_types(fields, lambda i: (i + 1) % pattern != 0)
    return _gemma(
        fields,
        family,
        qk_norm="head",
        windows=make_windows(types, fields.size("sliding_window", None)),
        logit_softcap=fields.get("final_logit_softcapping", float, None),
        **read_ropes_by_type(fields, types, sliding=1e4, full=1e6),
    )


def _phi3(fields: Fields, family: str) -> ModelConfig:
    rope = read_rope(fields, kinds=("default", "longrope"), partial=True)
    return _common(fields, family, fused_projections=True, ropes=(rope,), windows=read_one_window(fields))


def _smollm3(fields: Fields, family: str) -> ModelConfig:
    layers, rope = fields.size("num_hidden_layers"), read_rope(fields, theta=2e6)
    interval = fields.size("no_rope_layer_interval", 4)
    rotary = fields.get("no_rope_layers", list, [(i + 1) % interval != 0 for i in range(layers)])
    if len(rotary) < layers:
        raise JaxbakeError(f"config.json: no_rope_layers has {len(rotary)} entries for {layers} layers")
    window = fields.size("sliding_window", None) if fields.get("use_sliding_window", bool, False) else None
    types = read_layer_types(fields, lambda i: window is not None and not rotary[i])
    bias = fields.get("attention_bias", bool, False)
    return _common(
        fields,
        family,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.get("mlp_bias", bool, False),
        windows=make_windows(types, window),
        **assign_ropes([rope if rotary[i] else RopeConfig(kind="none") for i in range(layers)]),
    )


def _olmo(fields: Fields, family: str) -> ModelConfig:
    bias = fields.get("attention_bias", bool, False)
    if family == "olmo3":
        types = read_layer_types(fields, lambda i: (i + 1) % 4 != 0)
        theta = fields.get("rope_theta", float, 5e5)
        extra = read_ropes_by_type(fields, types, sliding=theta, full=theta)
        extra["windows"] = make_windows(types, fields.size("sliding_window", None))
    else:
        extra = {"ropes": (read_rope(fields),)}
    return _common(fields, family, qkv_bias=bias, o_bias=bias, qk_norm="full", norm_placement="post", **extra)


_GEMMA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA2 = {**_GEMMA, "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA3 = {**_GEMMA, "max_position_embeddings": 131_072, "vocab_size": 262_208}
_MISTRAL = {"num_key_value_heads": 8, "sliding_window": 4096}
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096}
_OLMO3 = {"rms_norm_eps": 1e-5, "sliding_window": 4096}
_SMOLLM3 = {"num_key_value_heads": 4, "tie_word_embeddings": True}

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2; TinyLlama; crumb", _llama),
    "mistral": Family("Mistral", "Mistral 7B v0.1 to v0.3, Mistral Nemo", _mistral, _MISTRAL),
    "qwen2": Family("Qwen 2", "Qwen2, Qwen2.5", _qwen, _QWEN),
    "qwen3": Family("Qwen 3", "Qwen3 0.6B to 32B (dense)", _qwen, {**_QWEN, "head_dim": 128}),
    "gemma2": Family("Gemma 2", "Gemma 2 2B, 9B, 27B", _gemma2, _GEMMA2),
    "gemma3_text": Family("Gemma 3 (text)", "Gemma 3 270M, 1B", _gemma3, _GEMMA3),
    "gemma3": Family("Gemma 3 (multimodal; its text part)", "Gemma 3 4B, 12B, 27B", _gemma3, _GEMMA3, wrapped=True),
    "phi3": Family("Phi-3", "Phi-3 mini and medium, Phi-3.5 mini, Phi-4", _phi3, {"rms_norm_eps": 1e-5}),
    "smollm3": Family("SmolLM3", "SmolLM3 3B", _smollm3, _SMOLLM3),
    "olmo2": Family("OLMo 2", "OLMo 2 1B, 7B, 13B, 32B", _olmo, {"rms_norm_eps": 1e-5}),
    "olmo3": Family("OLMo 3", "OLMo 3 7B, 32B", _olmo, _OLMO3),
}
"""The families, by `model_type`."""
