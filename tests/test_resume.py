"""A bake that is killed, again and again, and run again with the same command ends bitwise as if never killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import tiny_base as tiny

from jaxbake.bake.folder import read_metrics
from jaxbake.bakery.store import load_delta
from jaxbake.data.trajectories import TrajectoryStore

STEPS = 300
MOMENTS = [("sample", 1), ("sample", 17), ("bake", 0), ("bake", 37), ("bake", 160)]
"""Stage and how far it must be when the process is killed: while sampling, before the first checkpoint, after some."""


def start(folder: Path) -> subprocess.Popen:
    cache = str(Path(tempfile.gettempdir()) / f"jaxbake-tests-{os.getuid()}")
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-W", "ignore", str(Path(tiny.__file__)), str(folder), str(STEPS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def until(process: subprocess.Popen, stage: str, at_least: int) -> None:
    for line in process.stdout:
        name, done = line.rsplit(maxsplit=1)
        if name == stage and int(done) >= at_least:
            return
    raise AssertionError(f"ended before {stage} {at_least}: {process.stderr.read()[-2000:]}")


@pytest.mark.slow
def test_killed_at_several_moments(tmp_path):
    folder = tmp_path / "killed"
    for stage, at_least in MOMENTS:
        process = start(folder)
        until(process, stage, at_least)
        time.sleep(0.02)  # somewhere inside what comes next
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (folder / "delta").exists()
    process = start(folder)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    steps = [int(line.split()[1]) for line in said.splitlines() if line.startswith("bake ")]
    assert steps[0] > 140, "it began anew instead of going on from its last checkpoint"
    assert said.splitlines()[0] == "sample 33"

    whole = tmp_path / "whole"
    tiny.main(str(whole), str(STEPS))
    (delta, card), (other, other_card) = (load_delta(f, tiny.tiny_base()) for f in (whole, folder))
    assert card.delta_digest == other_card.delta_digest
    assert {k: v.tobytes() for f in delta.factors.values() for k, v in f.items()} == {
        k: v.tobytes() for f in other.factors.values() for k, v in f.items()
    }
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert rows == read_metrics(whole / "metrics.jsonl")
    assert TrajectoryStore.open(folder / "trajectories").load() == TrajectoryStore.open(whole / "trajectories").load()
    left = [p for p in folder.rglob("*") if "tmp" in p.name or p.name.endswith(".partial")]
    assert not [p for p in left if p.is_dir()], left
