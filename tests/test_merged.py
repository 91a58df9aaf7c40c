"""Merged models: transformers loads them and agrees with base + delta; untouched weights keep every bit."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from test_lora import random_delta
from test_store import no_space
from tiny_hf import save_tiny, tokens, torch_logits

from jaxbake.bakery.card import make_card
from jaxbake.config import LoraConfig
from jaxbake.deltas.lora import delta_digest, with_strength
from jaxbake.deltas.merged import merge, save_merged
from jaxbake.errors import JaxbakeError
from jaxbake.models.base import load, logits

LORA = LoraConfig(rank=4, alpha=6.0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """kind -> our base of a tiny torch model, made when first asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("models") / kind
            save_tiny(kind, folder)
            (folder / "chat_template.jinja").write_text("{{ messages }}")
            (folder / "LICENSE").write_text("free")
            (folder / "notes.txt").write_text("not for others")
            made[kind] = load(folder)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2", "gemma3_multimodal"])
def test_transformers_agrees(bases, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    base = bases(kind)
    delta = random_delta(base.config, LORA, size=0.1)
    save_merged(base, delta, tmp_path / "merged", max_shard_size="20KB")
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    ids = tokens()
    theirs, ours = torch_logits(model.eval(), ids), np.asarray(logits(base, ids, delta))
    assert np.abs(theirs - ours).max() <= 1e-4
    assert np.abs(theirs - np.asarray(logits(base, ids))).max() > 0.1  # the delta does something
    again = load(tmp_path / "merged")  # and so do we
    assert np.abs(np.asarray(logits(again, ids)) - ours).max() <= 1e-4


def stored(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as f:
            found |= {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    return found


def test_shards_index_and_companions(bases, tmp_path):
    base = bases("llama")
    delta = random_delta(base.config, LORA)
    card = make_card(base, delta, name="pirate", prompt="Talk like a pirate.")
    save_merged(base, delta, tmp_path / "merged", max_shard_size="20KB", card=card)
    names = {p.name for p in (tmp_path / "merged").iterdir()}
    shards = {name for name in names if name.startswith("model-")}
    assert len(shards) > 2
    assert all((tmp_path / "merged" / name).stat().st_size < 24_000 for name in shards)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    assert set(index["weight_map"]) == set(stored(tmp_path / "merged")) == set(stored(base.folder))
    rest = {"config.json", "generation_config.json", "chat_template.jinja", "LICENSE", "README.md", "card.json"}
    assert names - shards == rest | {"model.safetensors.index.json"}
    readme = (tmp_path / "merged" / "README.md").read_text()
    assert "Talk like a pirate." in readme and base.digest in readme and "rounds" not in readme
    save_merged(base, delta, tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").is_file()
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_only_targets_change(bases, tmp_path):
    base = bases("llama")
    delta = random_delta(base.config, LoraConfig(rank=4, alpha=6.0, targets=("v_proj",)))
    save_merged(base, delta, tmp_path / "merged")
    before, after = stored(base.folder), stored(tmp_path / "merged")
    for name, value in before.items():
        assert (value.tobytes() == after[name].tobytes()) == ("v_proj" not in name)
    a, b = (np.asarray(delta.factors["v_proj"][name][1], np.float64) for name in ("a", "b"))
    exact = before["model.layers.1.self_attn.v_proj.weight"] + (float(delta.scale) * a @ b).T
    np.testing.assert_allclose(after["model.layers.1.self_attn.v_proj.weight"], exact, atol=1e-6)


def test_stored_dtype_is_kept(bases, tmp_path):
    """A bfloat16 model, held in float32 here, is merged in float32 and rounded once, when written."""
    base = bases("llama")
    save_merged(base, None, tmp_path / "low", dtype="bfloat16")
    low = load(tmp_path / "low")
    assert low.params["embed_tokens"].dtype == jnp.float32
    delta = random_delta(low.config, LORA)
    save_merged(low, delta, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = stored(tmp_path / "merged")
    assert {x.dtype.name for x in tensors.values()} == {"bfloat16"}
    weight = merge(low, delta).params["layers"]["up_proj"][0].T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.up_proj.weight"], weight)
    assert "bfloat16 rounds" in (tmp_path / "merged" / "README.md").read_text()
    save_merged(low, delta, tmp_path / "wide", dtype="float32")
    assert {x.dtype.name for x in stored(tmp_path / "wide").values()} == {"float32"}


def test_unmerged_weights_keep_every_bit(bases, tmp_path):
    """In a bfloat16 model with one norm stored in float32, that norm stays as it is."""
    base = bases("llama")
    save_merged(base, None, tmp_path / "mixed", dtype="bfloat16")
    tensors = stored(tmp_path / "mixed")
    tensors["model.norm.weight"] = (1 + np.arange(24) / 1000).astype(np.float32)
    save_file(tensors, tmp_path / "mixed" / "model.safetensors", {"format": "pt"})
    mixed = load(tmp_path / "mixed")
    save_merged(mixed, random_delta(base.config, LORA), tmp_path / "merged")
    after = stored(tmp_path / "merged")
    for name, value in tensors.items():
        assert value.dtype == after[name].dtype
        assert (value.tobytes() == after[name].tobytes()) == ("_proj" not in name)


def test_merge_in_memory(bases):
    base = bases("llama")
    delta = random_delta(base.config, LORA)
    merged = merge(base, delta)
    ids = tokens()
    ours, theirs = np.asarray(logits(base, ids, delta)), np.asarray(logits(merged, ids))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(ours).max()
    assert merged.digest not in (base.digest, merge(base, with_strength(delta, 0.5)).digest)
    assert merged.digest == merge(base, delta).digest and len(merged.digest) == 64
    assert merged.name == f"{base.name} + delta {delta_digest(delta)[:8]}"
    assert jax.tree.structure(merged.params) == jax.tree.structure(base.params)


def test_refuses_without_a_trace(bases, tmp_path):
    base, phi = bases("llama"), bases("phi3")
    delta = random_delta(base.config, LORA)
    with pytest.raises(JaxbakeError, match="does not fit the base"):
        save_merged(phi, delta, tmp_path / "merged")
    with pytest.raises(JaxbakeError, match="does not fit the base"):
        merge(phi, delta)
    with pytest.raises(JaxbakeError, match="is not an empty folder"):
        save_merged(base, delta, base.folder)
    with pytest.raises(JaxbakeError, match="max_shard_size: 'huge'"):
        save_merged(base, delta, tmp_path / "merged", max_shard_size="huge")
    with pytest.raises(JaxbakeError, match="dtype: 'int7'"):
        save_merged(base, delta, tmp_path / "merged", dtype="int7")
    with pytest.raises(JaxbakeError, match="is of another delta"):
        save_merged(base, delta, tmp_path / "merged", card=make_card(base, with_strength(delta, 0.5), name="half"))
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxbakeError, match="cannot be written"):
        save_merged(base, delta, tmp_path / "file" / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_nothing(bases, tmp_path):
    base = bases("llama")
    with no_space(9000), pytest.raises(JaxbakeError, match=r"merged.*cannot"):
        save_merged(base, random_delta(base.config, LORA), tmp_path / "merged", max_shard_size="20KB")
    with no_space(100), pytest.raises(JaxbakeError, match=r"merged.*cannot"):
        save_merged(base, None, tmp_path / "merged")
    assert not any(tmp_path.iterdir())
