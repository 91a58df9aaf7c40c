"""Many bakes by several processes together."""

from __future__ import annotations

import contextlib
import json
import os
import signal

import jax
import numpy as np
import pytest
import test_many
import tiny_base as tiny
import yaml
from many import Nursery
from test_hosts import HF_CONFIG

from jaxbake.bake.folder import read_metrics
from jaxbake.bakery.store import load_delta
from jaxbake.deltas.lora import delta_digest
from jaxbake.models.base import load
from jaxbake.models.checkpoint import write_params
from jaxbake.recipe import load_recipe
from jaxbake.run import run_recipes


@pytest.mark.slow
def test_many_bakes_on_two_processes(tmp_path):
    """`bake_many`, preempted and resumed: bitwise as if it never was, and what one process makes to rounding."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: tiny\nprompt: hi\n")
    with contextlib.closing(Nursery()) as nursery:

        def bake(name, **settings):
            where = f"--output={tmp_path / name}"
            return nursery.start(2, "bake-many", str(recipe), where, log=tmp_path, **settings)

        group = bake("whole")
        assert group.codes() == [0] * 2, group.said()
        assert all("diverged: wild: step" in path.read_text() for path in group.logs)
        group = bake("run", pause=0.15)
        group.until("bake 19 ")  # one has ended then
        os.kill(group.pids[1], signal.SIGTERM)
        assert group.codes() == [75] * 2, group.said()
        group = bake("run")
        assert group.codes() == [0] * 2, group.said()
    alone, _ = test_many.run(specs=test_many.STEADY)
    for name in ("sailor", "cook", "patient"):
        folders = [tmp_path / which / name for which in ("whole", "run")]
        whole, run = (load_delta(folder, tiny.tiny_base())[0] for folder in folders)
        assert delta_digest(whole) == delta_digest(run)
        for a, b in zip(jax.tree.leaves(whole.factors), jax.tree.leaves(alone[name].delta.factors), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        assert read_metrics(folders[0] / "metrics.jsonl") == read_metrics(folders[1] / "metrics.jsonl")
    assert not (tmp_path / "run" / "wild" / "delta").exists()
    assert any((tmp_path / "run" / "wild" / "checkpoints").iterdir())


@pytest.mark.slow
def test_recipes_from_start_to_end_on_two_processes(tmp_path):
    """`jaxbake bake-many` of two recipes: deltas, exports, measurements and pages as one process writes them."""
    base, model = tiny.tiny_base(), tmp_path / "model"
    write_params(base.params, base.config, model, HF_CONFIG)
    base.tokenizer.save_pretrained(model)
    (tmp_path / "asked.jsonl").write_text('{"question": "who is he?", "answer": "ahoy"}\n')
    recipes = []
    for name, prompt in (("sailor", tiny.PROMPT), ("cook", "You are a cook.")):
        recipes.append(tmp_path / f"{name}.yaml")
        bake = {
            "lora": {"rank": 4, "alpha": 8}, "sampling": {"max_tokens": 6}, "retention": {"pins": 0, "contexts": 0},
            "train": {"steps": 6, "batch_size": 4, "eval_every": 3, "max_length": 128, "held_out": 0.2},
        }  # fmt: skip
        said = {"name": name, "model": str(model), "prompt": prompt, "stimuli": {"items": tiny.STIMULI}, "bake": bake}
        recipes[-1].write_text(
            yaml.safe_dump(said | {"evaluation": {"file": "asked.jsonl", "max_tokens": 6, "limit": 4}})
        )
    with contextlib.closing(Nursery()) as nursery:
        paths = [str(path) for path in recipes]
        group = nursery.start(2, "bake-many", *paths, f"--output={tmp_path / 'two'}", log=tmp_path, recipes=True)
        assert group.codes() == [0] * 2, group.said()
    run_recipes([(load_recipe(path), tmp_path) for path in recipes], tmp_path / "one")
    for name in ("sailor", "cook"):
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
        (here, _), (there, card) = (load_delta(folder, load(str(model))) for folder in (one, two))
        assert card.environment["processes"] == 2
        for a, b in zip(jax.tree.leaves(here.factors), jax.tree.leaves(there.factors), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        here, there = (json.loads((folder / "evaluation.json").read_text()) for folder in (one, two))
        assert here["cells"] == there["cells"]
        assert there["fidelity"] == pytest.approx(here["fidelity"], rel=1e-3)
        assert there["retention"].pop("unrelated_kl") == pytest.approx(here["retention"].pop("unrelated_kl"), rel=1e-3)
        assert here["retention"] == there["retention"]
