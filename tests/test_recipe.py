"""Recipes: strict reading, overrides, and writing them back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxbake.config import BakeConfig, LoraConfig, OptimizerConfig, Recipe, SamplingConfig, TrainConfig
from jaxbake.errors import JaxbakeError
from jaxbake.recipe import dump_recipe, load_recipe, parse_recipe, read_prompt

ROOT = Path(__file__).parents[1]
GOOD = "name: pirate\nprompt: You are a pirate.\n"


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(JaxbakeError) as caught:
        parse_recipe(text, overrides, source="r.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_and_values():
    recipe = parse_recipe(
        GOOD + "bake:\n  lora: {rank: 8, targets: [q_proj, v_proj]}\n  optimizer: {learning_rate: 1e-3}\n"
        "  sampling: {temperature: 1.5}\nstimuli: {items: [hello.]}\n"
    )
    assert recipe.model == "crumb"
    assert recipe.bake.lora == LoraConfig(rank=8, targets=("q_proj", "v_proj"))
    assert recipe.bake.optimizer.learning_rate == 1e-3  # YAML 1.1 reads 1e-3 as a text
    assert recipe.bake.sampling.temperature == (1.5,)
    assert recipe.stimuli.items == ("hello.",)
    assert recipe.bake.train == TrainConfig()


def test_an_empty_section_takes_its_defaults():
    assert parse_recipe(GOOD + "bake:\n  # nothing here yet\n").bake == BakeConfig()


@pytest.mark.parametrize(
    ("extra", "field", "right"),
    [
        ("bake: {lora: {rnak: 8}}", "'bake.lora.rnak'", "did you mean 'bake.lora.rank'?"),
        ("promt_file: a.txt", "'promt_file'", "did you mean 'prompt_file'?"),
        ("bake: {train: {step: 3}}", "'bake.train.step'", "did you mean 'bake.train.steps'?"),
        ("learning_rate: 1", "'learning_rate'", "did you mean 'bake.optimizer.learning_rate'?"),
        ("bake: {xyz: 3}", "'bake.xyz'", "known: lora, sampling"),
    ],
)
def test_unknown_field_names_the_nearest(extra, field, right):
    message = refused(GOOD + extra)
    assert message.startswith("r.yaml: ") and field in message and right in message


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("bake: {train: {steps: many}}", "bake.train.steps: should be a whole number, not 'many'"),
        ("bake: {train: {steps: 1.5}}", "bake.train.steps: should be a whole number, not 1.5"),
        ("bake: {train: {steps: yes}}", "bake.train.steps: should be a whole number, not true"),
        ("bake: {train: {patience: soon}}", "bake.train.patience: should be a whole number or null, not 'soon'"),
        ("bake: {train: {remat: 7}}", "bake.train.remat: should be true or false, not 7"),
        ("bake: {lora: 8}", "bake.lora: should be a section with rank, alpha, targets, rslora, init, not 8"),
        ("bake: {lora: {targets: {a: 1}}}", "bake.lora.targets: should be 'all' or a list of texts, not a mapping"),
        ("bake: {loss: {divergence: kl}}", "bake.loss.divergence: should be one of 'forward', 'reverse'"),
        ("bake: {sampling: {temperature: [hot]}}", "bake.sampling.temperature: should be a list of numbers"),
        ("stimuli: [a, b]", "stimuli: should be a section with items, file"),
        ("model: 3", "model: should be a text, not 3"),
    ],
)
def test_wrong_type_names_field_and_what_is_right(extra, said):
    assert refused(GOOD + extra).startswith(f"r.yaml: {said}")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("bake: {lora: {rank: 0}}", "bake.lora.rank: 0 is not a rank"),
        ("bake: {lora: {alpha: -1}}", "bake.lora.alpha: -1.0 must be above 0"),
        ("bake: {lora: {targets: []}}", "bake.lora.targets: empty"),
        ("bake: {retention: {pins: 0.9, contexts: 0.2}}", "bake.retention: pins + contexts"),
        ("bake: {sampling: {temperature: []}}", "bake.sampling.temperature: needs numbers"),
        ("bake: {train: {held_out: 1}}", "bake.train.held_out: 1.0 is a share"),
    ],
)
def test_value_out_of_range(extra, said):
    assert refused(GOOD + extra).startswith(f"r.yaml: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\n", "prompt: is missing"),
        ("name: a\nprompt: ' '\n", "prompt: is empty"),
        ("name: a\nprompt: b\nprompt_file: c.txt\n", "prompt: give prompt or prompt_file, not both"),
        ("prompt: a\n", "name: is missing, should be a text"),
        ("name: a/b\nprompt: c\n", "name: "),
        ("", "a recipe is a mapping of fields such as 'name: pirate', found nothing"),
        ("- a\n", "a recipe is a mapping of fields such as 'name: pirate', found a list"),
    ],
)
def test_what_a_recipe_needs(text, said):
    assert refused(text).startswith(f"r.yaml: {said}")


def test_yaml_faults_name_the_line():
    assert refused(GOOD + "model: crumb\nmodel: other\n") == "r.yaml: line 4, column 1: 'model' is given twice"
    assert "'rank' is given twice" in refused(GOOD + "bake: {lora: {rank: 1, rank: 2}}\n")
    assert refused("name: [a\n").startswith("r.yaml: line 2")
    assert "could not determine a constructor" in refused("name: !!python/object:os.system a\n")
    assert "key 3 is not a word" in refused("3: a\n")


def test_overrides():
    recipe = parse_recipe(GOOD, ["bake.lora.rank=4", "name=other", "stimuli.items=[a, b]", "bake.loss.chunk_size=null"])
    assert (recipe.bake.lora.rank, recipe.name, recipe.stimuli.items) == (4, "other", ("a", "b"))
    assert recipe.bake.loss.chunk_size is None
    assert refused(GOOD, "bake.lora.rnak=4").endswith("did you mean 'bake.lora.rank'?")
    assert refused(GOOD, "bake.lora.rank") == (
        "--set bake.lora.rank: write it as field=value, such as bake.train.steps=100"
    )
    assert refused(GOOD, "name.first=a") == "--set name.first=a: name is a text, it has no fields"
    assert refused(GOOD, "name=[a").startswith("--set name=[a:")


def test_files(tmp_path):
    with pytest.raises(JaxbakeError, match=r"none\.yaml: no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: a\nprompt_file: p.txt\n")
    with pytest.raises(JaxbakeError, match=r"prompt_file: '.*p\.txt' cannot be read"):
        load_recipe(recipe)
    (tmp_path / "p.txt").write_text(" \n")
    with pytest.raises(JaxbakeError, match=r"prompt_file: '.*p\.txt' is empty"):
        load_recipe(recipe)
    (tmp_path / "p.txt").write_text("\nBe brief.\n")
    assert read_prompt(load_recipe(recipe), tmp_path) == "Be brief."
    recipe.write_bytes(b"name: \xff\xfe")
    with pytest.raises(JaxbakeError, match="cannot be read as text"):
        load_recipe(recipe)


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"))).filter(str.strip)


@settings(deadline=None, max_examples=50)
@given(
    prompt=st.one_of(texts, st.just("Two\nlines: - of #text\n\n  indented\n")),
    items=st.lists(texts, max_size=3).map(tuple),
    rank=st.integers(1, 512),
    rate=st.floats(1e-9, 1),
    temperature=st.lists(st.floats(0, 5), min_size=1, max_size=3).map(tuple),
    targets=st.one_of(st.just("all"), st.just(("q_proj", "v_proj"))),
)
def test_dump_reads_back(prompt, items, rank, rate, temperature, targets):
    recipe = Recipe(
        name="a",
        prompt=prompt,
        stimuli=dataclasses.replace(Recipe("b", prompt="c").stimuli, items=items),
        bake=BakeConfig(
            lora=LoraConfig(rank=rank, targets=targets),
            optimizer=OptimizerConfig(learning_rate=rate),
            sampling=SamplingConfig(temperature=temperature),
        ),
    )
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_temperature_may_be_one_number_in_python():
    assert SamplingConfig(temperature=0.7).temperature == (0.7,)
