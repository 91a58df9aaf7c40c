"""PEFT adapter folders: bit-exact both ways, and parity with real peft over the transformers model."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_lora import random_delta
from tiny_hf import save_tiny, tokens, torch_logits

from jaxbake.bakery.card import Card, make_card
from jaxbake.config import LoraConfig
from jaxbake.deltas.lora import delta_digest, with_strength
from jaxbake.deltas.peft import load_peft, save_peft
from jaxbake.errors import JaxbakeError
from jaxbake.models.base import load, logits

LORA = LoraConfig(rank=4, alpha=6.0)
KINDS = ("llama", "phi3", "gemma2", "gemma3_multimodal")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (torch model's folder, our base), made when first asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("models") / kind
            save_tiny(kind, folder)
            made[kind] = folder, load(folder)
        return made[kind]

    return get


def torch_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def with_peft(folder, adapter):
    """The transformers model with an adapter loaded by real peft; any warning is an error."""
    from peft import PeftModel

    model = torch_model(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft's, not ours
        return PeftModel.from_pretrained(model, adapter).eval()


def assert_same_delta(one, other):
    assert one.config == other.config
    assert one.scale.dtype == other.scale.dtype and np.asarray(one.scale) == np.asarray(other.scale)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_close(ours, theirs):
    """Within 1e-5 of the largest logit."""
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("kind", KINDS)
def test_real_peft_agrees_with_us(models, tmp_path, kind):
    folder, base = models(kind)
    delta = random_delta(base.config, LORA)
    save_peft(delta, base, tmp_path / "adapter")
    ids = tokens()
    theirs = torch_logits(with_peft(folder, tmp_path / "adapter"), ids)
    assert_close(np.asarray(logits(base, ids, delta)), theirs)
    assert np.abs(theirs - np.asarray(logits(base, ids))).max() > 0.1  # the adapter does something
    assert_same_delta(load_peft(tmp_path / "adapter", base), delta)


@pytest.mark.parametrize(
    "lora, strength",
    [
        (LoraConfig(rank=4, alpha=7.3, targets=("q_proj", "down_proj"), rslora=True, init="b_random"), 1.0),
        (LoraConfig(rank=3, alpha=7.3, targets=("o_proj",)), 0.37),
        (LoraConfig(rank=3, alpha=5.0, targets=("o_proj", "v_proj"), rslora=True), 0.37),
    ],
)
def test_rslora_subsets_and_strengths_are_exact(models, tmp_path, lora, strength):
    folder, base = models("llama")
    delta = random_delta(base.config, lora)
    delta = delta if strength == 1.0 else with_strength(delta, strength)
    save_peft(delta, base, tmp_path / "adapter")
    assert_same_delta(load_peft(tmp_path / "adapter", base), delta)
    model = with_peft(folder, tmp_path / "adapter")
    scalings = {np.float32(m.scaling["default"]) for m in model.modules() if hasattr(m, "lora_A")}
    assert scalings == {np.float32(delta.scale)}
    assert_close(np.asarray(logits(base, tokens(), delta)), torch_logits(model, tokens()))


@pytest.mark.parametrize("rank", [1, 3, 7, 24])
@pytest.mark.parametrize("rslora", [False, True])
def test_any_strength_survives_to_the_bit(models, tmp_path, rank, rslora):
    _, base = models("llama")
    delta = random_delta(base.config, LoraConfig(rank=rank, alpha=7.3, targets=("q_proj",), rslora=rslora))
    for i, strength in enumerate((1 / 3, 0.1, 0.0, -1.7, 1e-6)):
        changed = with_strength(delta, strength)
        save_peft(changed, base, tmp_path / str(i))
        assert_same_delta(load_peft(tmp_path / str(i), base), changed)


def test_low_precision_factors_survive(models, tmp_path):
    _, base = models("llama")
    delta = random_delta(base.config, LORA)
    low = delta.replace(factors=jax.tree.map(lambda x: x.astype(jnp.bfloat16), delta.factors))
    save_peft(low, base, tmp_path / "adapter")
    assert_same_delta(load_peft(tmp_path / "adapter", base), low)


def test_folder_says_what_it_is(models, tmp_path):
    folder, base = models("llama")
    delta = random_delta(base.config, LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "up_proj")))
    card = make_card(base, delta, name="pirate", prompt="Talk like ```a pirate```.", metrics={"kl": 0.125})
    save_peft(delta, base, tmp_path / "adapter", card)
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 4 and adapter["lora_alpha"] == 8 and isinstance(adapter["lora_alpha"], int)
    assert adapter["target_modules"] == ["q_proj", "up_proj"]
    assert adapter["base_model_name_or_path"] == str(folder)
    assert (adapter["peft_type"], adapter["task_type"], adapter["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert adapter["inference_mode"] is True and adapter["use_rslora"] is False
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    assert tensors[key.format("A")].shape == (4, 24) and tensors[key.format("B")].shape == (32, 4)
    assert len(tensors) == 2 * 2 * 2
    readme = (tmp_path / "adapter" / "README.md").read_text()
    for part in ("pirate", "````text\nTalk like ```a pirate```.\n````", base.digest, delta_digest(delta), "kl | 0.125"):
        assert part in readme
    assert "PeftModel.from_pretrained" in readme and "jb.load_peft" in readme
    assert Card.load(tmp_path / "adapter" / "card.json") == card


def test_hub_name_is_named(models, tmp_path):
    _, base = models("llama")
    delta = random_delta(base.config, LORA)
    save_peft(delta, replace(base, name="meta-llama/Llama-3.1-8B"), tmp_path / "adapter")
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "meta-llama/Llama-3.1-8B"
    assert 'base_model: "meta-llama/Llama-3.1-8B"' in (tmp_path / "adapter" / "README.md").read_text()


def test_multimodal_base_has_its_prefix(models, tmp_path):
    """In transformers the decoder is `model.language_model`; short names would match the vision tower too."""
    _, base = models("gemma3_multimodal")
    save_peft(random_delta(base.config, LORA), base, tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "np") as f:
        keys = list(f.keys())
    assert all(key.startswith("base_model.model.model.language_model.layers.") for key in keys)
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert isinstance(adapter["target_modules"], str)


@pytest.mark.parametrize("kind, targets", [("llama", ["q_proj", "v_proj"]), ("phi3", "all-linear")])
@pytest.mark.parametrize("rslora", [False, True])
def test_reads_adapters_made_by_real_peft(models, tmp_path, kind, targets, rslora):
    import peft
    import torch

    folder, base = models(kind)
    torch.manual_seed(1)
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=targets,
        use_rslora=rslora,
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(torch_model(folder), settings).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    delta = load_peft(tmp_path / "adapter", base)
    wanted = ("q_proj", "v_proj") if kind == "llama" else "all"
    assert delta.config == LoraConfig(rank=3, alpha=5.0, targets=wanted, rslora=rslora)
    theirs = torch_logits(model, tokens())
    assert_close(np.asarray(logits(base, tokens(), delta)), theirs)
    assert np.abs(theirs - np.asarray(logits(base, tokens()))).max() > 0.1
    save_peft(delta, base, tmp_path / "again")
    assert_same_delta(load_peft(tmp_path / "again", base), delta)


@pytest.fixture
def adapter(models, tmp_path):
    """A good adapter folder as another program would write it, and functions to change it."""
    _, base = models("llama")
    folder = tmp_path / "adapter"
    save_peft(random_delta(base.config, LORA), base, folder)
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # without our header

    def change(fields=None, tensors=None):
        if fields:
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
        if tensors:
            save_file(tensors(load_file(weights)), weights)
        return folder, base

    return change


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]},
        {"fan_in_fan_out": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["model.embed_tokens"]},
        {"target_parameters": ["experts.up"]},
        {"init_lora_weights": "pissa_niter_4"},
        {"trainable_token_indices": [1]},
        {"some_new_field": {"x": 1}},
        {"peft_type": "IA3"},
        {"r": "4"},
        {"r": 0},
        {"r": 5},
        {"lora_alpha": None},
    ],
    ids=str,
)
def test_refuses_what_it_cannot_represent(adapter, fields):
    folder, base = adapter()
    load_peft(folder, base)  # good before the change
    adapter(fields)
    with pytest.raises(JaxbakeError, match=next(iter(fields))):
        load_peft(folder, base)


def _without(part):
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


@pytest.mark.parametrize(
    "change, message",
    [
        (_without("layers.1.self_attn.k_proj.lora_B"), r"k_proj lora_B must cover layers 0 to 1.*: 1"),
        (_without("k_proj.lora_A"), r"k_proj lora_A must cover layers 0 to 1.*: 0, 1"),
        (_without("lora"), "no tensors"),
        (
            lambda t: {**t, "base_model.model.lm_head.lora_A.weight": np.ones((4, 24), np.float32)},
            r"no place.*lm_head;",
        ),
        (lambda t: {k.replace("model.model.", "model.", 1): v for k, v in t.items()}, r"no place.*layers\.\*\."),
        (lambda t: {k: v[:, :20] if "lora_A" in k and "q_proj" in k else v for k, v in t.items()}, r"\[2, 20, 4\]"),
        (
            lambda t: {k: v[:2] if "lora_A" in k and "0.mlp.up" in k else v for k, v in t.items()},
            "up_proj lora_A differs",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(adapter, change, message):
    folder, base = adapter(tensors=change)
    with pytest.raises(JaxbakeError, match=message):
        load_peft(folder, base)


def test_adapter_of_another_architecture(models, tmp_path):
    (_, llama), (_, phi) = models("llama"), models("phi3")
    save_peft(random_delta(llama.config, LORA), llama, tmp_path / "adapter")
    with pytest.raises(JaxbakeError, match=r"no place.*q_proj.*linear layers are qkv_proj"):
        load_peft(tmp_path / "adapter", phi)
    with pytest.raises(JaxbakeError, match="does not fit the base"):
        save_peft(random_delta(phi.config, LORA), llama, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_adapter_of_another_base_names_both(models, tmp_path):
    _, base = models("llama")
    other = replace(base, name="other/base", digest="f" * 64)
    delta = random_delta(base.config, LORA)
    save_peft(delta, base, tmp_path / "adapter")
    with pytest.raises(JaxbakeError, match=rf"{base.digest[:12]}.*other/base.*{'f' * 12}"):
        load_peft(tmp_path / "adapter", other)
    assert_same_delta(load_peft(tmp_path / "adapter", other, any_base=True), delta)


def test_damaged_folders(adapter, tmp_path):
    folder, base = adapter()
    with pytest.raises(JaxbakeError, match="no such folder"):
        load_peft(tmp_path / "nowhere", base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(JaxbakeError, match=r"no adapter_config\.json"):
        load_peft(tmp_path / "empty", base)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for cut in (len(whole) - 7, 100, 3, 0):
        weights.write_bytes(whole[:cut])
        with pytest.raises(JaxbakeError, match=r"adapter_model\.safetensors: is damaged or truncated"):
            load_peft(folder, base)
    weights.unlink()
    with pytest.raises(JaxbakeError, match=r"adapter_model\.safetensors: there is no such file"):
        load_peft(folder, base)
    (folder / "adapter_config.json").write_text('{"r": 4')
    with pytest.raises(JaxbakeError, match=r"adapter_config\.json: is damaged"):
        load_peft(folder, base)


def test_writes_whole_or_not_at_all(models, tmp_path):
    _, base = models("llama")
    delta = random_delta(base.config, LORA)
    mixed = {
        **delta.factors,
        "q_proj": random_delta(base.config, LoraConfig(rank=2, targets=("q_proj",))).factors["q_proj"],
    }
    with pytest.raises(JaxbakeError, match="one rank"):
        save_peft(delta.replace(factors=mixed), base, tmp_path / "adapter")
    card = make_card(base, with_strength(delta, 0.5), name="half")
    with pytest.raises(JaxbakeError, match="'half' is of another delta"):
        save_peft(delta, base, tmp_path / "adapter", card)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(JaxbakeError, match=r"holds other files \(mine\.txt\)"):
        save_peft(delta, base, tmp_path / "notes")
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxbakeError, match="cannot be written"):
        save_peft(delta, base, tmp_path / "file" / "adapter")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "notes"]
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"
    save_peft(delta, base, tmp_path / "adapter")
    save_peft(with_strength(delta, 0.5), base, tmp_path / "adapter")  # an earlier export is replaced
    assert load_peft(tmp_path / "adapter", base).scale == delta.scale * 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "file", "notes"]
