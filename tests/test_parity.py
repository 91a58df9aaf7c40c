"""Our decoder against transformers', float32 on CPU: every family, on random small models with nothing at its init."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxbake.errors import JaxbakeError
from jaxbake.models import families
from jaxbake.models.base import Base, load
from jaxbake.models.checkpoint import write_params
from jaxbake.models.decoder import forward, logits_from, prefix_from
from jaxbake.models.rope import frequencies
from jaxbake.models.spec import abstract_params, num_params
from jaxbake.sampling import generate

TOLERANCE = 1e-4
WINDOW, ORIGINAL, VOCAB = 5, 16, 97  # attention window, pretraining length of rescaled rotary embeddings
SHAPE = dict(vocab_size=VOCAB, intermediate_size=44, num_hidden_layers=3, max_position_embeddings=256,
             bos_token_id=None, eos_token_id=None, pad_token_id=None)  # fmt: skip
ODD = dict(hidden_size=35, num_attention_heads=5, num_key_value_heads=1)
GROUPED = dict(hidden_size=42, num_attention_heads=6, num_key_value_heads=3)
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=ORIGINAL)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=ORIGINAL)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.3, 2.0], long_factor=[1.0, 4.0, 9.0])
GEMMA = dict(head_dim=10, query_pre_attn_scalar=11, sliding_window=WINDOW, layer_types=LAYERS)
GEMMA3 = dict(GEMMA, rope_parameters={
    "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e5),
    "sliding_attention": dict(rope_type="default", rope_theta=1e3),
})  # fmt: skip
VISION = dict(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
)

CASES: dict[str, dict] = {
    "llama": dict(model_type="llama", **ODD, head_dim=8),
    "llama3": dict(model_type="llama", **GROUPED, head_dim=12, attention_bias=True, mlp_bias=True,
                   rope_parameters=LLAMA3, tie_word_embeddings=True),
    "mistral": dict(model_type="mistral", **GROUPED, head_dim=8, sliding_window=WINDOW),
    "qwen2": dict(model_type="qwen2", **GROUPED | dict(hidden_size=36), use_sliding_window=True, sliding_window=WINDOW,
                  max_window_layers=1, rope_parameters=YARN, tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", **ODD, head_dim=6, attention_bias=True),
    "gemma2": dict(model_type="gemma2", **ODD, **GEMMA, attn_logit_softcapping=4.0, final_logit_softcapping=3.0),
    "gemma3_text": dict(model_type="gemma3_text", **GROUPED, **GEMMA3),
    "gemma3": dict(model_type="gemma3", text_config=dict(SHAPE, **ODD, **GEMMA3), vision_config=VISION,
                   mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92),
    "phi3": dict(model_type="phi3", **GROUPED | dict(hidden_size=48), sliding_window=WINDOW,
                 rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    "longrope": dict(model_type="phi3", **GROUPED | dict(hidden_size=36), rope_parameters=LONGROPE,
                     original_max_position_embeddings=ORIGINAL),
    "smollm3": dict(model_type="smollm3", **GROUPED | dict(hidden_size=36), no_rope_layers=[1, 0, 1],
                    use_sliding_window=True, sliding_window=WINDOW),
    "olmo2": dict(model_type="olmo2", **GROUPED | dict(hidden_size=36), attention_bias=True),
    "olmo3": dict(model_type="olmo3", **GROUPED | dict(hidden_size=36), sliding_window=WINDOW, layer_types=LAYERS),
}  # fmt: skip


class Pair(NamedTuple):
    theirs: torch.nn.Module
    ours: Base
    folder: Path


def save_random(folder: Path, settings: dict, **save_options) -> torch.nn.Module:
    """A transformers model far from its init, norms and biases too, saved in float32."""
    settings = dict(settings)
    model_type = settings.pop("model_type")
    shape = {} if "text_config" in settings else SHAPE
    config = AutoConfig.for_model(model_type, **shape, **settings)
    torch.manual_seed(7)
    kind = AutoModelForImageTextToText if "text_config" in settings else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder, **save_options)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> Pair:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    options = {"max_shard_size": "30KB"} if request.param == "llama3" else {}
    theirs = save_random(folder, CASES[request.param], **options)
    assert (folder / "model.safetensors.index.json").exists() == bool(options)
    return Pair(theirs, load(folder), folder)


def random_tokens(shape, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 90, shape).astype(np.int32)


def their_logits(model, tokens, mask=None, positions=None) -> np.ndarray:
    """Logits [T, V] of one row."""
    extra = {} if mask is None else {
        "attention_mask": torch.tensor(mask[None].astype(np.int64)),
        "position_ids": torch.tensor(positions[None].astype(np.int64)),
    }  # fmt: skip
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens[None].astype(np.int64)), **extra).logits[0].numpy()


@jax.jit(static_argnames="config")
def our_logits(params, tokens, config, **options):
    return logits_from(params, forward(params, None, tokens, config=config, **options), config=config)


@jax.jit(static_argnames="config")
def our_prefix(params, tokens, config):
    return prefix_from(params, None, tokens, config=config)


def assert_close(ours, theirs):
    assert np.std(theirs) > 0.3  # else a difference would not show
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_logits_at_every_position(pair):
    """A plain row, one padded right, one padded left, one packed with two sequences: each as transformers has it."""
    length = 24
    tokens = random_tokens((4, length), seed=1)
    mask = np.ones((4, length), np.int32)
    mask[1, 14:] = 0
    mask[2, :5] = 0
    segments = mask.copy()
    segments[3, 10:] = 2
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    positions[3, 10:] -= 10
    assert length > max(WINDOW, ORIGINAL)

    ours = our_logits(pair.ours.params, tokens, pair.ours.config, positions=positions, segment_ids=segments)
    assert_close(ours[0], their_logits(pair.theirs, tokens[0]))
    for row in (1, 2):
        real = mask[row] == 1
        theirs = their_logits(pair.theirs, tokens[row], mask[row], positions[row])
        assert_close(ours[row][real], theirs[real])
    assert_close(ours[3, :10], their_logits(pair.theirs, tokens[3, :10]))
    assert_close(ours[3, 10:], their_logits(pair.theirs, tokens[3, 10:]))


def test_cached_prefix(pair):
    """A row after a cached prefix is the whole row; a row beside it that does not see the prefix is itself alone."""
    params, config = pair.ours.params, pair.ours.config
    tokens = random_tokens((2, 14), seed=2)
    prefix = our_prefix(params, tokens[0, :6], config)
    visible = np.repeat(np.array([[6], [0]], np.int32), 8, axis=1)
    ours = our_logits(params, tokens[:, 6:], config, prefix=prefix, prefix_visible=visible)
    theirs = their_logits(pair.theirs, tokens[0])[6:], their_logits(pair.theirs, tokens[1, 6:])
    assert_close(ours[0], theirs[0])
    assert_close(ours[1], theirs[1])
    at = np.array([[2, 7, 0], [5, 5, 6]], np.int32)  # these positions alone
    ours = our_logits(params, tokens[:, 6:], config, prefix=prefix, prefix_visible=visible, at=at)
    assert_close(ours[0], theirs[0][at[0]])
    assert_close(ours[1], theirs[1][at[1]])


def greedy(base: Base, prompt: np.ndarray, count: int) -> list[int]:
    result = generate(base.params, None, [prompt], config=base.config, max_tokens=count, temperature=0.0)
    return result[0].tokens.tolist()


def their_greedy(model, prompt: np.ndarray, count: int) -> list[int]:
    tokens = torch.tensor(prompt[None].astype(np.int64))
    out = model.generate(tokens, do_sample=False, max_new_tokens=count, attention_mask=torch.ones_like(tokens))
    return out[0, len(prompt) :].tolist()


def test_greedy_decoding(pair):
    prompt = random_tokens(20, seed=3)
    theirs = their_greedy(pair.theirs, prompt, 60)
    assert len(theirs) == 60
    assert greedy(pair.ours, prompt, 60) == theirs


def test_written_model_is_the_same_in_transformers(pair, tmp_path):
    """What `write_params` writes, sharded, transformers loads; of a multimodal model, its text part on its own."""
    hf_config = json.loads((pair.folder / "config.json").read_text())
    files = write_params(pair.ours.params, pair.ours.config, tmp_path, hf_config, "40KB")
    assert len(files) > 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert again.dtype == torch.float32
    tokens = random_tokens(24, seed=4)
    np.testing.assert_array_equal(their_logits(again, tokens), their_logits(pair.theirs, tokens))


def test_transformers_4_config_is_the_same_model(pair):
    """`rope_theta` and `rope_scaling`, as checkpoints saved by transformers 4 have them."""
    config = json.loads((pair.folder / "config.json").read_text())
    old = json.loads(json.dumps(config))
    text = old.get("text_config", old)
    rope = text.pop("rope_parameters")
    if "full_attention" in rope:
        text["rope_local_base_freq"] = rope["sliding_attention"].pop("rope_theta")
        rope = rope["full_attention"]
    text["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        text["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    rope["type"] = rope.pop("rope_type")
    text["rope_scaling"] = None if rope["type"] == "default" else rope
    assert families.convert(old) == families.convert(config) == pair.ours.config


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_absent_fields_mean_what_transformers_takes(model_type):
    """Hub configs leave out fields; beyond the sizes every one means transformers' default."""
    sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=44, num_hidden_layers=30, num_attention_heads=64,
                 max_position_embeddings=512)  # fmt: skip
    sparse = {"text_config": sizes} if model_type == "gemma3" else sizes
    full = AutoConfig.for_model(model_type, **sparse).to_dict()
    assert families.convert({"model_type": model_type, **sparse}) == families.convert(full)
    if model_type.startswith("gemma"):  # these leave out sizes too
        sparse = {name: sizes[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        sparse = sparse if model_type == "gemma3" else dict(sparse, vocab_size=64)
        sparse = {"text_config": sparse} if model_type == "gemma3" else sparse
        full = AutoConfig.for_model(model_type, **sparse).to_dict()
        assert families.convert({"model_type": model_type, **sparse}) == families.convert(full)


ROPES = {
    "linear": dict(factor=8.0),
    "llama3": dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    "yarn": dict(factor=4.0, original_max_position_embeddings=32768),
    "yarn untruncated": dict(factor=40.0, original_max_position_embeddings=4096, truncate=False, beta_fast=16),
    "yarn attention": dict(factor=8.0, original_max_position_embeddings=8192, attention_factor=1.2),
    "longrope": dict(short_factor=[1.0 + i / 9 for i in range(64)], long_factor=[1.0 + i for i in range(64)]),
    "longrope factor": dict(factor=9.0, short_factor=[1.0] * 64, long_factor=[2.0] * 64),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPES)
def test_rope_frequencies_at_real_size(case):
    kind = case.split()[0]
    rope = dict(ROPES[case], rope_type=kind, rope_theta=5e5)
    settings = dict(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope)
    extra = {"original_max_position_embeddings": 4096} if kind == "longrope" else {}
    model_type = "phi3" if kind == "longrope" else "llama"
    theirs = AutoConfig.for_model(model_type, **settings, **extra)
    ours = families.convert(dict(SHAPE, model_type=model_type, **settings, **extra)).ropes[0]
    for long in (False, True) if kind == "longrope" else (False,):
        inverse, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=4097 if long else None)
        our_inverse, our_factor = frequencies(ours, 128, long=long)
        np.testing.assert_allclose(our_inverse, inverse.numpy(), rtol=2e-6)
        assert our_factor == pytest.approx(factor, rel=1e-9)


def test_stories260k_greedy_text(real_dir):
    folder = real_dir / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    base = load(folder)
    prompt = np.array([1], np.int32)
    ours = greedy(base, prompt, 100)
    assert ours == their_greedy(model, prompt, 100)
    assert base.tokenizer.decode(ours).startswith("Once upon a time, there was a little girl named Lily.")
    assert base.eos_ids == (2,)


UNSUPPORTED = ("deepseek-r1", "gpt-oss-20b", "mixtral-8x7b", "qwen3-30b-a3b")


def test_real_configs(real_dir):
    """Every real config converts and its forward traces at full size, or is refused by name."""
    configs = {path.parent.name: json.loads(path.read_text()) for path in real_dir.glob("configs/*/config.json")}
    assert len(configs) == 32
    for name, hf_config in configs.items():
        if name in UNSUPPORTED:
            with pytest.raises(JaxbakeError, match=f"'{hf_config['model_type']}' is not supported"):
                families.convert(hf_config)
            continue
        config = families.convert(hf_config)
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        hidden = jax.eval_shape(
            lambda p, t, config=config: forward(p, None, t, config=config),
            abstract_params(config, jnp.bfloat16),
            tokens,
        )
        assert (hidden.shape, hidden.dtype) == ((2, 8, config.hidden_size), jnp.bfloat16), name


SIZES = {
    "qwen2.5-0.5b": 494_032_768,
    "llama3.1-8b": 8_030_261_248,
    "gemma3-270m": 268_098_176,
    "gemma2-2b": 2_614_341_888,
}


def test_real_parameter_counts(real_dir):
    """Sizes as their publishers count them."""
    for name, count in SIZES.items():
        config = families.convert(json.loads((real_dir / "configs" / name / "config.json").read_text()))
        assert num_params(config) == count, name
