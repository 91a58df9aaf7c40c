"""What a bake is to leave alone, by model and by settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import jaxbake as jb
from jaxbake.bake.others import contexts_for, pins_for
from jaxbake.config import BakeConfig, RetentionConfig
from jaxbake.data.stimuli import load_pins
from jaxbake.smallworld.items import context_prompts, pin_stimuli


@pytest.fixture(scope="module")
def crumb():
    return jb.load("crumb")


def test_crumb_is_asked_in_its_own_language(crumb):
    config = BakeConfig()
    assert pins_for(crumb, config, Path()) == pin_stimuli(600)
    contexts = contexts_for(crumb, "You are a pirate.", config, Path())
    assert contexts and set(map(str, contexts)) <= set(map(str, context_prompts(600)))


def test_other_models_are_asked_in_english(crumb):
    other = replace(crumb, folder=Path("elsewhere"))
    assert pins_for(other, BakeConfig(), Path()) == load_pins()


def test_no_share_no_material(crumb):
    config = BakeConfig(retention=RetentionConfig(pins=0.0, contexts=0.0))
    assert pins_for(crumb, config, Path()) == [] == contexts_for(crumb, "A.", config, Path())


def test_a_prompt_that_fills_the_context_leaves_room_for_no_other(crumb):
    config = replace(BakeConfig(), sampling=replace(BakeConfig().sampling, max_tokens=crumb.config.max_positions))
    assert contexts_for(crumb, "A.", config, Path()) == []


def test_the_files_of_a_recipe_come_first(crumb, tmp_path):
    (tmp_path / "pins.txt").write_text("hello.\n")
    config = BakeConfig(retention=RetentionConfig(pin_stimuli="pins.txt"))
    assert pins_for(crumb, config, tmp_path) == ["hello."]
