"""Reading and writing model folders: round trips, the digest, and what is said about folders that are wrong."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxbake.errors import JaxbakeError
from jaxbake.models import base as bases
from jaxbake.models import families
from jaxbake.models.checkpoint import digest, read_params, write_params
from jaxbake.models.spec import abstract_params, num_params

LLAMA = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False, "eos_token_id": [5, 7, 500],
}  # fmt: skip


def random_params(hf_config: dict, dtype=jnp.float32) -> dict:
    """Every leaf random, the same for the same config."""
    random = np.random.default_rng(0)
    abstract = abstract_params(families.convert(hf_config), dtype)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), abstract)


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "model"
    write_params(random_params(LLAMA), families.convert(LLAMA), path, LLAMA)
    return path


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **changes) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert jax.tree.map(lambda x: x.dtype, first) == jax.tree.map(lambda x: x.dtype, second)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen2", "tie_word_embeddings": True}, {"model_type": "phi3"}])
def test_round_trip_is_exact(tmp_path, dtype, changes):
    hf_config = {**LLAMA, **changes}
    config, params = families.convert(hf_config), random_params(hf_config, dtype)
    one = write_params(params, config, tmp_path / "one", hf_config)
    many = write_params(params, config, tmp_path / "many", hf_config, "8KB")
    assert [path.name for path in one] == ["model.safetensors", "config.json"]
    assert len(many) > 4 and all(path.exists() for path in many)
    for path in many[:-2]:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 8000
    for path in ("one", "many"):
        assert_same(read_params(tmp_path / path, config, dtype), params)
    assert digest(tmp_path / "one") == digest(tmp_path / "many")
    assert json.loads(one[-1].read_text())["dtype"] == dtype


def test_written_over_an_earlier_model(tmp_path):
    """Neither a larger earlier model's index nor a smaller one's single file is read instead."""
    config = families.convert(LLAMA)
    earlier = random_params(LLAMA)
    later = jax.tree.map(lambda leaf: leaf + 1, earlier)
    for first, second in (("8KB", "1GB"), ("1GB", "8KB")):
        write_params(earlier, config, tmp_path, LLAMA, first)
        write_params(later, config, tmp_path, LLAMA, second)
        assert_same(read_params(tmp_path, config, "float32"), later)


def test_cast_while_reading(folder):
    config = families.convert(LLAMA)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(LLAMA))
    assert_same(read_params(folder, config, "bfloat16"), expected)


def test_model_is_not_held_twice(tmp_path):
    hf_config = {**LLAMA, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 512}
    config = families.convert(hf_config)
    write_params(random_params(hf_config), config, tmp_path, hf_config)
    tracemalloc.start()
    params = read_params(tmp_path, config, "bfloat16")  # of what lies there in float32, twice the size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    allowed = 2 * num_params(config) + largest
    assert peak <= allowed < 0.7 * 4 * num_params(config)


def test_digest(folder):
    first = digest(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA, indent=8))
    change_config(folder, torch_dtype="bfloat16", use_cache=False, initializer_range=0.5, transformers_version="4.0")
    assert digest(folder) == first
    change_config(folder, rope_theta=20_000.0)
    assert digest(folder) != first
    change_config(folder, rope_theta=10_000.0)
    assert digest(folder) == first

    def one_bit(tensors):
        tensors["model.norm.weight"].view(np.uint8)[-1] ^= 1

    change_tensors(folder, one_bit)
    assert digest(folder) != first
    change_tensors(folder, one_bit)
    assert digest(folder) == first


def test_load(folder):
    base = bases.load(folder)
    assert_same(base.params, random_params(LLAMA))
    assert base.config == families.convert(LLAMA)
    assert (base.name, base.folder, base.digest) == (str(folder), folder, digest(folder))
    assert base.tokenizer is None and base.mesh is None
    assert base.eos_ids == (5, 7)  # 500 is no token of this model
    assert base.pad_id == 5
    (folder / "generation_config.json").write_text('{"eos_token_id": 9, "pad_token_id": 0}')
    assert bases.load(folder).eos_ids == (9, 5, 7) and bases.load(folder).pad_id == 0
    assert bases.logits(base, [[1, 2, 3]]).shape == (1, 3, 97)


def test_default_dtype_on_cpu_is_float32(tmp_path):
    write_params(random_params(LLAMA, "bfloat16"), families.convert(LLAMA), tmp_path, LLAMA)
    assert bases.load(tmp_path).params["norm"].dtype == jnp.float32
    assert bases.load(tmp_path, dtype="bfloat16").params["norm"].dtype == jnp.bfloat16
    assert bases.parameter_dtype(None, tmp_path, None) == jnp.float32
    for wrong in ("int8", "float23"):
        with pytest.raises(JaxbakeError, match=f"dtype: '{wrong}' is not one of float32, bfloat16, float16"):
            bases.load(tmp_path, dtype=wrong)


def test_harmless_extra_tensors(folder):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        del tensors["lm_head.weight"]

    change_tensors(folder, add)
    change_config(folder, tie_word_embeddings=True)
    assert "lm_head" not in bases.load(folder).params
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": np.ones((97, 24), np.float32)}))
    assert "lm_head" not in bases.load(folder).params


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_part_of_a_multimodal_model(folder, prefix):
    """Under either of the names transformers has saved it with; the vision tower is left aside, nothing else is."""
    text = {**LLAMA, "model_type": "gemma3_text", "rope_theta": None, "rope_parameters": None}
    hf_config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    params, config = random_params(hf_config), families.convert(hf_config)
    write_params(params, config, folder, hf_config)
    written = json.loads((folder / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])

    def rename(tensors):
        for name in list(tensors):
            new = "language_model." + name if name == "lm_head.weight" else name.replace("model.", prefix, 1)
            tensors[new] = tensors.pop(name)
        tensors["vision_tower.patch.weight"] = np.ones(3, np.float32)

    change_tensors(folder, rename)
    (folder / "config.json").write_text(json.dumps(hf_config))
    assert_same(bases.load(folder).params, params)
    change_tensors(folder, lambda tensors: tensors.update({prefix + "more": np.ones(3, np.float32)}))
    with pytest.raises(JaxbakeError, match=r"1 unexpected: model\.more$"):
        bases.load(folder)


def test_wrong_tensors_are_all_listed(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)
        tensors["model.layers.2.self_attn.k_proj.weight"] = np.zeros((24, 25), np.float32)
        tensors["model.layers.2.mlp.down_proj.weight"] = np.zeros((24, 40), np.int8)

    change_tensors(folder, change)
    with pytest.raises(JaxbakeError) as caught:
        bases.load(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "1 unexpected: model.layers.0.self_attn.q_proj.bias" in message
    assert "1 mis-shaped: model.layers.2.self_attn.k_proj.weight [24, 25] instead of [24, 24]" in message
    assert "1 not floating point: model.layers.2.mlp.down_proj.weight I8" in message


def test_long_lists_are_cut(folder):
    change_config(folder, num_hidden_layers=5)
    with pytest.raises(JaxbakeError, match=r"18 missing: model.layers.3.*, \.\.\. and 8 more"):
        bases.load(folder)


@pytest.mark.parametrize("keep", [5, 200, -1])
def test_truncated_safetensors(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(JaxbakeError, match=r"model\.safetensors: corrupt or truncated"):
        bases.load(folder)


def test_broken_shards(tmp_path):
    files = write_params(random_params(LLAMA), families.convert(LLAMA), tmp_path, LLAMA, "8KB")
    index = tmp_path / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**where["weight_map"], "model.more": files[0].name}}))
    with pytest.raises(JaxbakeError, match="names 1 tensors its files do not hold: model.more"):
        bases.load(tmp_path)
    index.write_text(json.dumps(where))
    files[1].unlink()
    with pytest.raises(JaxbakeError, match=rf"{files[1].name}: no such file"):
        bases.load(tmp_path)
    index.write_text("{}")
    with pytest.raises(JaxbakeError, match="no 'weight_map'"):
        bases.load(tmp_path)
    index.write_text("{")
    with pytest.raises(JaxbakeError, match=r"index\.json: is damaged, not JSON"):
        bases.load(tmp_path)


def test_cannot_write(folder, monkeypatch):
    with pytest.raises(JaxbakeError, match="max_shard_size: 'much' is no size"):
        write_params({"embed_tokens": jnp.zeros(1)}, families.convert(LLAMA), folder, LLAMA, "much")
    params, config = random_params(LLAMA), families.convert(LLAMA)
    with pytest.raises(JaxbakeError, match="cannot write the model"):
        write_params(params, config, folder / "config.json" / "below", LLAMA)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxbake.models.checkpoint.save_file", full)
    before = sorted(folder.iterdir())
    with pytest.raises(JaxbakeError, match="No space left on device"):
        write_params(params, config, folder, LLAMA)
    assert sorted(folder.iterdir()) == before
    bases.load(folder)


# Names


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    for name in ("crumbs", "./nowhere", "/no/such/folder", "a/b/c", ""):
        with pytest.raises(JaxbakeError, match="no such folder"):
            bases.load(name)
    (tmp_path / "file").touch()
    with pytest.raises(JaxbakeError, match="is a file"):
        bases.load(tmp_path / "file")
    with pytest.raises(JaxbakeError, match=r"no config\.json"):
        bases.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(JaxbakeError, match="must hold one JSON object"):
        bases.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(JaxbakeError, match=r"model\.safetensors: no such file"):
        bases.load(tmp_path)
    monkeypatch.setattr(bases, "CRUMB", tmp_path)
    with pytest.raises(JaxbakeError, match="crumb: this installation has no weights"):
        bases.load("crumb")


def test_hub_name_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(JaxbakeError, match="some-owner/some-model: no such folder here, not in the local cache"):
        bases.load("some-owner/some-model")


def test_broken_tokenizer(folder, real_dir):
    shutil.copy(real_dir / "stories260K" / "tokenizer.json", folder)
    assert bases.load(folder).tokenizer.vocab_size == 512
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(JaxbakeError, match="the tokenizer cannot be loaded"):
        bases.load(folder)


# config.json

WRONG_FIELDS = {
    "lama": ({"model_type": "lama"}, "model_type 'lama' is not supported; did you mean 'llama'?"),
    "mixtral": ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported"),
    "no type": ({"model_type": None}, "no 'model_type'"),
    "no size": ({"hidden_size": None}, "no 'hidden_size'"),
    "size of text": ({"vocab_size": "97"}, "vocab_size = '97' should be of type int"),
    "size of nothing": ({"num_hidden_layers": 0}, "num_hidden_layers = 0 should be at least 1"),
    "flag": ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1 should be of type bool"),
    "heads": ({"num_key_value_heads": 4}, "num_key_value_heads = 4 does not divide"),
    "no head_dim": ({"head_dim": None, "hidden_size": 25}, "no 'head_dim'"),
    "odd head_dim": ({"head_dim": 7}, "needs an even size"),
    "activation": ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "experts": ({"num_local_experts": 8}, "num_local_experts = 8"),
    "multiplier": ({"residual_multiplier": 0.2}, "residual_multiplier = 0.2"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
    "proportional": ({"rope_parameters": {"rope_type": "proportional"}}, "rope type 'proportional'"),
    "mrope": ({"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, "'mrope_section' in the rope parameters"),
    "llama3": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no 'low_freq_factor'"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported for this family"),
    "longrope": (
        {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}},
        "short_factor has 1 entries; it should hold 4 numbers",
    ),
    "layer types": ({"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    "no window": ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "no sliding_window is set"),
    "null window": ({"model_type": "gemma2", "sliding_window": None}, "no sliding_window is set"),
    "mixed mistral": (
        {"model_type": "mistral", "sliding_window": 4, "layer_types": ["sliding_attention", *["full_attention"] * 2]},
        "layer_types that differ from layer to layer",
    ),
    "gemma 3 cap": ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "gemma 3 rope": (
        {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}},
        "'rope_theta' in rope_param",
    ),
    "bidirectional": (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "use_bidirectional_attention",
    ),
    "smollm3": ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers has 1 entries for 3 layers"),
}


@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_wrong_config(case):
    changes, message = WRONG_FIELDS[case]
    with pytest.raises(JaxbakeError) as caught:
        families.convert({**LLAMA, **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)
