"""Each thing vLLM would refuse or silently ignore, found in a folder that has just that."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxbake.deltas.vllm import check_vllm
from jaxbake.errors import JaxbakeError

PREFIX = "base_model.model.model.layers"
FIELDS = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"], "bias": "none"}
LLAMA = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip
PHI = LLAMA | {"model_type": "phi3"}
GEMMA = {"model_type": "gemma3", "text_config": LLAMA | {"model_type": "gemma3_text"}}


def good(rank=8, dtype=np.float16):
    modules = [f"{PREFIX}.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
    return {
        f"{module}.lora_{letter}.weight": np.ones(shape, dtype)
        for module in modules
        for letter, shape in (("A", (rank, 12)), ("B", (20, rank)))
    }


@pytest.fixture
def findings(tmp_path):
    """Findings about an adapter with these fields and tensors, as {(severity, field): finding}."""

    def check(fields=None, tensors=None, base=None):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        fields = {k: v for k, v in {**FIELDS, **(fields or {})}.items() if v is not None}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        save_file(good() if tensors is None else tensors, folder / "adapter_model.safetensors")
        if base is not None:
            (tmp_path / "base").mkdir(exist_ok=True)
            (tmp_path / "base" / "config.json").write_text(json.dumps(base))
        found = check_vllm(folder, tmp_path / "base" if base is not None else None)
        assert len({(f.severity, f.field, f.message) for f in found}) == len(found)
        assert all(f.message and f.fix for f in found)
        return {(f.severity, f.field): f for f in found}

    return check


def renamed(change):
    return {change(key): value for key, value in good().items()}


WEIGHTS = "adapter_model.safetensors"


def test_a_good_adapter_has_no_findings(findings):
    assert findings() == {}
    assert findings(base=LLAMA) == {}
    assert findings({"use_rslora": True, "lora_alpha": 3.7}) == {}
    assert findings({"rank_pattern": {}, "modules_to_save": None, "use_dora": False, "bias": "none"}) == {}


def test_part_of_a_packed_layer_is_fine(findings):
    """vLLM packs q, k, v and gate, up itself; an adapter on q alone has zeros for the others."""
    assert findings(tensors={k: v for k, v in good().items() if "up_proj" not in k}, base=LLAMA) == {}


@pytest.mark.parametrize("rank", [1, 8, 16])
def test_ranks_served_by_default(findings, rank):
    assert findings({"r": rank}, good(rank)) == {}


@pytest.mark.parametrize(
    "rank, room", [(17, 32), (32, 32), (64, 64), (100, 128), (128, 128), (256, 256), (300, 320), (512, 512)]
)
def test_larger_ranks_need_the_flag(findings, rank, room):
    found = findings({"r": rank}, good(rank))
    assert list(found) == [("note", "r")]
    assert f"--max-lora-rank {room}" in found["note", "r"].fix


def test_odd_ranks_take_the_room_of_the_next(findings):
    found = findings({"r": 12}, good(12))
    assert list(found) == [("note", "r")] and "takes the room of 16" in found["note", "r"].message


@pytest.mark.parametrize("rank", [0, 513, "8"])
def test_impossible_ranks(findings, rank):
    assert ("refused", "r") in findings({"r": rank}, good(513 if rank == 513 else 8))


@pytest.mark.parametrize(
    "fields, severity",
    [
        ({"use_dora": True}, "refused"),
        ({"modules_to_save": ["lm_head"]}, "refused"),
        ({"bias": "all"}, "refused"),
        ({"lora_bias": True}, "refused"),
        ({"peft_type": "IA3"}, "refused"),
        ({"lora_alpha": None}, "refused"),
        ({"target_modules": None}, "refused"),
        ({"r": None}, "refused"),
        ({"rank_pattern": {"q_proj": 4}}, "ignored"),
        ({"alpha_pattern": {"q_proj": 4}}, "ignored"),
        ({"init_lora_weights": "pissa"}, "ignored"),
        ({"alora_invocation_tokens": [1, 2]}, "ignored"),
        ({"trainable_token_indices": [1]}, "ignored"),
    ],
    ids=str,
)
def test_fields(findings, fields, severity):
    assert list(findings(fields)) == [(severity, next(iter(fields)))]


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace("model.model.layers", "model.layers"),
        lambda key: key.replace("model.layers", "model._orig_mod.layers"),
        lambda key: key.replace("base_model.model.model", "base_model.model.module.model"),
        lambda key: key.replace("base_model.model.model", "base_model.model.decoder"),
    ],
)
@pytest.mark.parametrize("base", [None, LLAMA])
def test_names_that_match_no_module_serve_the_base(findings, change, base):
    found = findings(tensors=renamed(change), base=base)
    assert list(found) == [("ignored", WEIGHTS)]
    assert "silently serves the base" in found["ignored", WEIGHTS].message


def test_prefix_must_be_that_of_the_base(findings):
    wrapped = renamed(lambda key: key.replace("model.model.layers", "model.model.language_model.layers"))
    assert list(findings(tensors=wrapped, base=LLAMA)) == [("ignored", WEIGHTS)]
    assert findings(tensors=wrapped, base=GEMMA) == {}
    found = findings(base=GEMMA)
    assert list(found) == [("ignored", WEIGHTS)] and "language_model.layers" in found["ignored", WEIGHTS].fix


def test_prefix_of_an_unknown_base_is_noted(findings):
    wrapped = renamed(lambda key: key.replace("model.model.layers", "model.model.language_model.layers"))
    assert list(findings({"base_model_name_or_path": "some/hub-model"}, wrapped)) == [("note", WEIGHTS)]


def test_the_base_named_in_the_adapter_is_used(findings, tmp_path):
    (tmp_path / "phi").mkdir()
    (tmp_path / "phi" / "config.json").write_text(json.dumps(PHI))
    found = findings({"base_model_name_or_path": str(tmp_path / "phi")})
    assert "q_proj, up_proj" in found["refused", "target_modules"].message
    assert "gate_up_proj" in found["refused", "target_modules"].fix


def test_names_without_pefts_prefix(findings):
    found = findings(tensors=renamed(lambda key: key.removeprefix("base_model.model.")))
    assert list(found) == [("ignored", WEIGHTS)] and "lack 'base_model.model.'" in found["ignored", WEIGHTS].message


def test_modules_vllm_does_not_have(findings):
    found = findings(tensors=renamed(lambda key: key.replace("up_proj", "router")))
    assert list(found) == [("refused", "target_modules")] and "router" in found["refused", "target_modules"].message
    packed = renamed(lambda key: key.replace("q_proj", "qkv_proj"))
    assert findings(tensors=packed) == {}  # Phi-3 has it
    assert list(findings(tensors=packed, base=LLAMA)) == [("refused", "target_modules")]


@pytest.mark.parametrize(
    "key", ["base_model.model.lm_head.lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_A"]
)
def test_embeddings_and_heads(findings, key):
    other = key.replace("_A", "_B")
    found = findings(tensors=good() | {key: np.ones((8, 12), np.float16), other: np.ones((32, 8), np.float16)})
    assert list(found) == [("refused", "target_modules")]


def test_names_vllm_cannot_read(findings):
    found = findings(tensors=renamed(lambda key: key.replace(".weight", ".default.weight")))
    assert ("refused", WEIGHTS) in found and "cannot read 8 names" in found["refused", WEIGHTS].message
    bias = {f"{PREFIX}.0.self_attn.q_proj.lora_B.bias": np.ones(20, np.float16)}
    assert list(findings(tensors=good() | bias)) == [("refused", WEIGHTS)]


def test_pairs_must_be_whole(findings):
    tensors = good()
    del tensors[f"{PREFIX}.1.mlp.up_proj.lora_B.weight"]
    found = findings(tensors=tensors)
    assert list(found) == [("refused", WEIGHTS)]
    assert f"{PREFIX}.1.mlp.up_proj (no lora_B)" in found["refused", WEIGHTS].message


def test_factors_must_fit_together(findings):
    found = findings(tensors={k: np.ascontiguousarray(v.T) for k, v in good().items()})
    assert "do not fit together" in found["refused", WEIGHTS].message


def test_tensors_of_another_rank(findings):
    assert list(findings({"r": 16})) == [("ignored", "r")]
    assert list(findings({"r": 8}, good(16))) == [("refused", "r")]


def test_dtypes(findings):
    assert list(findings(tensors=good(dtype=np.float32))) == [("note", "dtype")]
    assert list(findings(tensors=good(dtype=np.int8))) == [("ignored", "dtype")]


def test_no_tensors(findings):
    assert list(findings(tensors={})) == [("ignored", WEIGHTS)]


def test_the_gravest_comes_first(findings):
    found = findings({"r": 32, "rank_pattern": {"q_proj": 4}, "use_dora": True}, good(32))
    assert list(found) == [("refused", "use_dora"), ("ignored", "rank_pattern"), ("note", "r")]


def test_folders_that_are_no_adapter(tmp_path):
    with pytest.raises(JaxbakeError, match="no such folder"):
        check_vllm(tmp_path / "nowhere")
    (finding,) = check_vllm(tmp_path)
    assert (finding.severity, finding.field) == ("refused", "adapter_config.json")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(FIELDS))
    (finding,) = check_vllm(tmp_path)
    assert str(tmp_path / "peft") in finding.fix
    (finding,) = check_vllm(tmp_path / "peft")
    assert (finding.severity, finding.field) == ("refused", WEIGHTS)
    (tmp_path / "peft" / "adapter_model.bin").write_bytes(b"x")
    (finding,) = check_vllm(tmp_path / "peft")
    assert (finding.severity, finding.field) == ("note", WEIGHTS) and "pickle" in finding.message


def test_a_merged_model_is_to_be_served_by_itself(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (finding,) = check_vllm(tmp_path)
    assert finding.severity == "refused" and f"vllm serve {tmp_path}" in finding.fix


def test_damaged_files(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(FIELDS))
    (tmp_path / WEIGHTS).write_bytes(b"12345")
    with pytest.raises(JaxbakeError, match="is damaged or truncated"):
        check_vllm(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(JaxbakeError, match="is damaged"):
        check_vllm(tmp_path)
    with pytest.raises(JaxbakeError, match=r"has no config\.json"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(FIELDS))
        save_file(good(), tmp_path / WEIGHTS)
        check_vllm(tmp_path, tmp_path / "no-base")
