"""Cards and deltas on disk: bit-exact, whole or not at all, and never for the wrong base."""

from __future__ import annotations

import json
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lora import LORA, random_delta

from jaxbake.bakery.card import Card, for_delta, make_card, sha256
from jaxbake.bakery.store import delta_digest, load_delta, read_card, save_delta
from jaxbake.config import BakeConfig, LoraConfig
from jaxbake.deltas.lora import with_strength
from jaxbake.deltas.peft import save_peft
from jaxbake.errors import JaxbakeError
from jaxbake.models.base import Base


class Tokenizer:
    chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def base(tiny_config, tiny_params):
    return Base(tiny_params, tiny_config, Tokenizer(), "a" * 64, "tiny", Path("tiny"), (2,), 0)


@pytest.fixture
def delta(base):
    return random_delta(base.config)


@pytest.fixture
def card(base, delta):
    return make_card(
        base, delta, name="pirate", prompt="Talk like a pirate: ärr.", config=BakeConfig(lora=LORA), seeds={"bake": 3},
        parent=with_strength(delta, 2.0), metrics={"kl": 0.25, "steps": 7, "lost": float("nan"), "np": np.float32(0.5)},
    )  # fmt: skip


def assert_same_delta(one, other):
    assert one.config == other.config
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert isinstance(y, jax.Array) and x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_card_holds_all_that_repeats_the_bake(card, base, delta):
    assert card.base_digest == base.digest and card.delta_digest == delta_digest(delta)
    assert card.parent_digest == delta_digest(with_strength(delta, 2.0))
    assert card.prompt_sha256 == sha256("Talk like a pirate: ärr.")
    assert (
        card.template_sha256
        and card.template_sha256
        != make_card(
            replace(base, tokenizer=type("T", (), {"chat_template": "other"})), delta, name="x"
        ).template_sha256
    )
    assert card.config["lora"]["rank"] == 4 and card.config["optimizer"]["learning_rate"] == 1e-4
    assert card.seeds == {"bake": 3}
    assert card.metrics == {"kl": 0.25, "steps": 7, "lost": None, "np": 0.5}
    assert {"jaxbake", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers"} < set(card.versions)
    assert card.versions["jax"] == jax.__version__ and "python" in card.versions and "platform" in card.versions
    assert card.created.endswith("+00:00")


def test_card_is_exact_in_json(card, tmp_path):
    assert Card.from_json(card.to_json()) == card
    card.save(tmp_path / "card.json")
    assert Card.load(tmp_path / "card.json") == card
    assert "ärr" in (tmp_path / "card.json").read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["card.json"]


def test_card_reads_well(card):
    text = card.to_markdown()
    for part in (
        "# pirate",
        "Talk like a pirate: ärr.",
        card.base_digest,
        card.delta_digest,
        "| kl | 0.25 |",
        "bake 3",
    ):
        assert part in text


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v | {"prompt": "Talk like a poet."}, "prompt_sha256 is not the hash"),
        (lambda v: {k: x for k, x in v.items() if k != "base_digest"}, "lacks base_digest"),
        (lambda v: v | {"metrik": {}}, "unknown field 'metrik'; did you mean 'metrics'"),
        (lambda v: v | {"metrics": [1]}, r"card\.metrics: \[1\] must be an object"),
        (lambda v: v | {"name": None}, r"card\.name: None must be a text"),
    ],
)
def test_damaged_cards_are_refused(card, tmp_path, change, message):
    file = tmp_path / "card.json"
    file.write_text(json.dumps(change(json.loads(card.to_json()))))
    with pytest.raises(JaxbakeError, match=message) as error:
        Card.load(file)
    assert str(file) in str(error.value)


def test_unreadable_cards(card, tmp_path):
    file = tmp_path / "card.json"
    with pytest.raises(JaxbakeError, match=r"card\.json: cannot be read"):
        Card.load(file)
    file.write_text(card.to_json()[:-30])
    with pytest.raises(JaxbakeError, match=r"card\.json: is damaged, not JSON"):
        Card.load(file)
    file.write_text("[1]")
    with pytest.raises(JaxbakeError, match="one JSON object"):
        Card.load(file)
    with pytest.raises(JaxbakeError, match="a set cannot be kept as JSON"):
        replace(card, metrics={"x": {1}})


def test_delta_round_trip_is_bit_exact(base, delta, card, tmp_path):
    folder = save_delta(delta, card, tmp_path / "run" / "delta")
    assert sorted(p.name for p in folder.iterdir()) == ["card.json", "weights"]
    assert [p.name for p in folder.parent.iterdir()] == ["delta"]
    for place in (folder, folder.parent):  # the delta's folder, and the bake's output folder
        loaded, its_card = load_delta(place, base)
        assert_same_delta(delta, loaded)
        assert its_card == card == read_card(place)


@pytest.mark.parametrize("kind", ["bfloat16", "strength", "subset"])
def test_other_deltas_round_trip(base, delta, tmp_path, kind):
    if kind == "bfloat16":
        delta = delta.replace(factors=jax.tree.map(lambda x: x.astype(jnp.bfloat16), delta.factors))
    elif kind == "strength":
        delta = with_strength(delta, 0.3)
    else:
        delta = random_delta(base.config, LoraConfig(rank=3, alpha=1.5, targets=("o_proj", "up_proj"), rslora=True))
    save_delta(delta, make_card(base, delta, name="x"), tmp_path / "delta")
    assert_same_delta(delta, load_delta(tmp_path / "delta", base)[0])


def test_saving_again_replaces_only_a_delta(base, delta, card, tmp_path):
    save_delta(delta, card, tmp_path / "delta")
    half = with_strength(delta, 0.5)
    with pytest.raises(JaxbakeError, match="'pirate' is of another delta"):
        save_delta(half, card, tmp_path / "delta")
    save_delta(half, for_delta(card, half), tmp_path / "delta")
    assert_same_delta(half, load_delta(tmp_path / "delta", base)[0])
    (tmp_path / "delta" / "mine.txt").write_text("keep")
    with pytest.raises(JaxbakeError, match=r"holds other files \(mine\.txt\)"):
        save_delta(delta, card, tmp_path / "delta")
    assert_same_delta(half, load_delta(tmp_path / "delta", base)[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxbakeError, match="cannot be written"):
        save_delta(delta, card, tmp_path / "file" / "delta")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta", "file"]


@contextmanager
def no_space(limit):
    """No file of this process may grow beyond `limit` bytes: writes fail in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["orbax", "peft"])
@pytest.mark.parametrize("limit", [0, 4000])
def test_a_write_that_fails_leaves_the_earlier_delta(base, delta, card, tmp_path, kind, limit):
    half = with_strength(delta, 0.5)

    def save(delta):
        its_card = for_delta(card, delta)
        if kind == "orbax":
            return save_delta(delta, its_card, tmp_path / "delta")
        return save_peft(delta, base, tmp_path / "delta", its_card)

    save(delta)
    with no_space(limit), pytest.raises(JaxbakeError, match="delta: cannot be written"):
        save(half)
    assert_same_delta(delta, load_delta(tmp_path / "delta", base)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["delta"]
    save(half)
    assert_same_delta(half, load_delta(tmp_path / "delta", base)[0])


def test_reads_peft_folders(base, delta, card, tmp_path):
    save_peft(delta, base, tmp_path / "with", card)
    loaded, its_card = load_delta(tmp_path / "with", base)
    assert_same_delta(delta, loaded)
    assert its_card == card
    save_peft(delta, base, tmp_path / "without")
    loaded, its_card = load_delta(tmp_path / "without", base)
    assert_same_delta(delta, loaded)
    assert (its_card.name, its_card.prompt, its_card.delta_digest) == ("without", None, delta_digest(delta))
    (tmp_path / "with" / "card.json").write_text(replace(card, delta_digest="b" * 64).to_json())
    with pytest.raises(JaxbakeError, match="is damaged or was changed.*card says bbbbbbbbbbbb"):
        load_delta(tmp_path / "with", base)


@pytest.mark.parametrize("kind", ["orbax", "peft"])
def test_a_delta_of_another_base_names_both(base, delta, card, tmp_path, kind):
    if kind == "orbax":
        save_delta(delta, card, tmp_path / "delta")
    else:
        save_peft(delta, base, tmp_path / "delta", card)
    other = replace(base, name="their/model", digest="c" * 64)
    with pytest.raises(JaxbakeError, match="'tiny'.*aaaaaaaaaaaa.*'their/model'.*cccccccccccc"):
        load_delta(tmp_path / "delta", other)


def test_every_damaged_file_is_noticed(base, delta, card, tmp_path):
    """Each file that is read, cut short or emptied: an error. One bit changed: an error, or it did not matter."""
    save_delta(delta, card, tmp_path / "delta")
    files = [p.relative_to(tmp_path / "delta") for p in (tmp_path / "delta").rglob("*") if p.is_file()]
    data = [p for p in files if p.parent.name == "d" or p.name in ("card.json", "_METADATA", "manifest.ocdbt")]
    data = [p for p in data if "ocdbt.process_0" not in p.parts]  # Orbax's own leavings, never read
    assert len(data) >= 4
    silent = []
    for file in data:
        whole = (tmp_path / "delta" / file).read_bytes()
        for end in (0, len(whole) // 3, len(whole) - 3):
            (tmp_path / "delta" / file).write_bytes(whole[:end])
            with pytest.raises(JaxbakeError):
                load_delta(tmp_path / "delta", base)
        for at in (len(whole) // 2, len(whole) - 9):
            (tmp_path / "delta" / file).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            try:
                assert_same_delta(delta, load_delta(tmp_path / "delta", base)[0])
                silent.append(file.name)
            except JaxbakeError:
                continue
        (tmp_path / "delta" / file).write_bytes(whole)
    assert set(silent) <= {"card.json", "_METADATA"}, "a bit of the arrays themselves may not change unnoticed"
    assert_same_delta(delta, load_delta(tmp_path / "delta", base)[0])


def test_changed_weights_are_noticed(base, delta, card, tmp_path):
    save_delta(delta, card, tmp_path / "delta")
    half = with_strength(delta, 0.5)
    save_delta(half, for_delta(card, half), tmp_path / "half")
    shutil.rmtree(tmp_path / "delta" / "weights")
    shutil.copytree(tmp_path / "half" / "weights", tmp_path / "delta" / "weights")
    with pytest.raises(JaxbakeError, match="is damaged or was changed"):
        load_delta(tmp_path / "delta", base)


def test_folders_without_a_delta(base, delta, card, tmp_path):
    with pytest.raises(JaxbakeError, match="there is no such folder"):
        load_delta(tmp_path / "nowhere", base)
    with pytest.raises(JaxbakeError, match="holds no delta"):
        load_delta(tmp_path, base)
    save_delta(delta, card, tmp_path / "delta")
    (tmp_path / "delta" / "card.json").unlink()
    with pytest.raises(JaxbakeError, match=r"card\.json: cannot be read"):
        load_delta(tmp_path / "delta", base)


def test_a_delta_that_does_not_fit(base, delta, card, tmp_path):
    """The same digest on a base of another shape: a damaged base, not another one."""
    save_delta(delta, card, tmp_path / "delta")
    wider = replace(base, config=replace(base.config, intermediate_size=48))
    with pytest.raises(
        JaxbakeError, match=r"does not fit the base: .*gate_proj B is \[2, 4, 40\], must be \[2, 4, 48\]"
    ):
        load_delta(tmp_path / "delta", wider)
