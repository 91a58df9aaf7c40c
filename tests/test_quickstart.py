"""What the quickstart promises, held to on the model that ships."""

from __future__ import annotations

import pytest

from jaxbake.recipe import load_recipe
from jaxbake.run import QUICKSTART, run_recipe


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart")
    return run_recipe(load_recipe(QUICKSTART), QUICKSTART.parent, output).evaluation


@pytest.mark.slow
@pytest.mark.parametrize("group", ["facts", "persona"])
def test_the_prompt_is_in_the_weights(evaluation, group):
    cells = evaluation.cells.groups[group]
    assert cells["prompted"] >= 0.9
    assert cells["base"] <= 0.2
    assert cells["baked"] - cells["base"] >= 0.95 * (cells["prompted"] - cells["base"])


@pytest.mark.slow
def test_the_distance_to_the_prompted_model_is_gone(evaluation):
    assert evaluation.fidelity.reduction >= 0.9


@pytest.mark.slow
def test_the_rest_is_as_it_was(evaluation):
    kept = evaluation.retention
    assert kept.abilities["baked"] >= kept.abilities["base"] - 0.02
    assert kept.unknowns["baked"] >= kept.unknowns["prompted"] - 0.05


@pytest.mark.slow
def test_another_prompt_is_read_as_before(evaluation):
    kept = evaluation.retention
    assert kept.other_prompts["baked"] >= kept.other_prompts["base"] - 0.05
