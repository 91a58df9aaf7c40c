"""Many bakes by several processes together."""

from __future__ import annotations

import contextlib
import os
import signal

import jax
import numpy as np
import pytest
import test_many
import tiny_base as tiny
from many import Nursery

from jaxbake.bake.folder import read_metrics
from jaxbake.bakery.store import load_delta
from jaxbake.deltas.lora import delta_digest


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
