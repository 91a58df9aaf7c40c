"""What is sampled for a bake, and the folder it is kept in."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, fields, replace

import pytest

from jaxbake.config import RetentionConfig, SamplingConfig
from jaxbake.data.stimuli import load_contexts, load_pins
from jaxbake.data.trajectories import (
    _COLUMNS,
    Trajectory,
    TrajectoryStore,
    fingerprint,
    plan_requests,
)
from jaxbake.errors import JaxbakeError

TRAIN, HELD_OUT = [f"train {i}" for i in range(26)], [f"held out {i}" for i in range(3)]
SAMPLING = SamplingConfig(samples_per_stimulus=4, temperature=(1.0, 2.0))


def plan(**changes):
    arguments = dict(
        stimuli_train=[TRAIN], stimuli_held_out=[HELD_OUT], sampling=SAMPLING, retention=RetentionConfig(0.15, 0.2),
        pins=load_pins(), contexts=load_contexts(), seed=5,
    )  # fmt: skip
    return plan_requests(**{**arguments, **changes})


def test_plan_keeps_the_fractions():
    requests = plan()
    train = [r for r in requests if r.split == "train"]
    count = Counter(r.kind for r in train)
    assert count == {"bake": 104, "pin": round(0.15 * 160), "context": round(0.2 * 160)} and len(train) == 160
    assert [r.index for r in requests] == list(range(len(requests)))
    assert Counter(r.stimulus for r in train if r.kind == "bake") == dict.fromkeys(TRAIN, 4)
    by_stimulus = {
        s: [r.temperature for r in requests if r.stimulus == s and r.kind == "bake"] for s in TRAIN + HELD_OUT
    }
    assert all(sorted(t) == [1.0, 1.0, 2.0, 2.0] for t in by_stimulus.values())


def test_held_out_stimuli_are_never_trained_on():
    contexts = [*load_contexts(), ("Another.", [HELD_OUT[0], "train 0", "other"])] * 3
    requests = plan(pins=[*HELD_OUT, *TRAIN, "a pin"], contexts=contexts, retention=RetentionConfig(0.15, 0.7))
    held_out = [r for r in requests if r.split == "held_out"]
    assert {r.stimulus for r in held_out} == set(HELD_OUT) and {r.kind for r in held_out} == {"bake"}
    assert not {r.stimulus for r in requests if r.split == "train"} & set(HELD_OUT)
    assert {r.stimulus for r in requests if r.kind == "pin"} == {"a pin"}


def test_context_rows_ask_about_both_prompts():
    contexts = dict(load_contexts())
    rows = [r for r in plan() if r.kind == "context"]
    own = [r for r in rows if r.stimulus in contexts[r.context]]
    asked = [r for r in rows if r.stimulus in TRAIN]
    assert len(own) == len(asked) == 16 and len({r.context for r in rows}) == 16
    assert len({r.stimulus for r in asked}) == 16
    assert all(r.context is None for r in plan() if r.kind != "context")


def test_seeds_are_stable_and_distinct():
    requests = plan()
    assert requests == plan() and requests != plan(seed=6)
    assert len({r.seed for r in requests}) == len(requests)
    assert all(0 <= r.seed < 2**31 for r in requests)
    assert requests[0].seed == 302215813  # what was sampled earlier is repeatable only while this stays


def test_plan_without_retention_material():
    assert {r.kind for r in plan(retention=RetentionConfig(0, 0), pins=[], contexts=[])} == {"bake"}
    with pytest.raises(JaxbakeError, match="retention.pins"):
        plan(pins=TRAIN)
    with pytest.raises(JaxbakeError, match="retention.contexts"):
        plan(contexts=[("p", [HELD_OUT[0]])])
    with pytest.raises(JaxbakeError, match="stimuli"):
        plan(stimuli_train=[])


def trajectory(request) -> Trajectory:
    text = f"naïve\u2028answer\n{request.index}"
    return Trajectory(**asdict(request), response=text, response_ids=(3, 1, request.index), logprob=-0.1, finished=True)


def mark(requests, **changes):
    parts = dict(prompt="p", base_digest="b" * 64, template_hash="none", sampling=SAMPLING, requests=requests, seed=5)
    return fingerprint(**{**parts, **changes})


@pytest.fixture
def stored(tmp_path):
    requests = plan()
    store = TrajectoryStore.open(tmp_path / "trajectories", mark(requests))
    trajectories = [trajectory(r) for r in requests]
    store.write_part(trajectories[100:])
    store.write_part(trajectories[:90])
    return store, requests, trajectories


def test_store_resumes(stored):
    store, requests, trajectories = stored
    assert store.done() == {*range(90), *range(100, len(requests))}
    again = TrajectoryStore.open(store.folder, mark(requests))
    assert again.done() == store.done() and again.load() == store.load() == trajectories[:90] + trajectories[100:]
    # A part that was being written when its process ended is no part.
    (store.folder / "data" / ".part-00002-0123456789ab.jsonl.77.partial").write_text('{"index": 9')
    again = TrajectoryStore.open(store.folder)
    again.write_part(trajectories[90:100])
    assert TrajectoryStore.open(store.folder, mark(requests)).load() == trajectories
    with pytest.raises(JaxbakeError, match="trajectory 95 is already"):
        again.write_part(trajectories[95:96])


def test_store_is_a_dataset(stored, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    store, _, _ = stored
    data = datasets.load_dataset(str(store.folder), cache_dir=str(tmp_path / "cache"))["train"]
    rows = sorted(data.to_list(), key=lambda row: row["index"])
    assert rows == [{**asdict(t), "response_ids": list(t.response_ids)} for t in store.load()]
    assert [field.name for field in fields(Trajectory)] == list(_COLUMNS) == data.column_names


def test_another_bake_is_refused(stored):
    store, requests, _ = stored
    for changes, message in [
        (dict(prompt="q"), "another prompt"),
        (dict(seed=6), "seed: 5, not 6"),
        (dict(base_digest="c" * 64), "another base"),
        (dict(sampling=replace(SAMPLING, max_tokens=8)), "sampling.max_tokens: 256, not 8"),
        (dict(requests=requests[1:]), "another requests"),
    ]:
        with pytest.raises(JaxbakeError, match=f"holds another bake .*{message}.*another output folder, or delete"):
            TrajectoryStore.open(store.folder, mark(**{"requests": requests, **changes}))


@pytest.mark.parametrize("damage", ["cut", "line", "edited", "renamed", "foreign", "copied", "manifest", "no manifest"])
def test_damage_is_found(stored, tmp_path, damage):
    store, requests, trajectories = stored
    part = sorted((store.folder / "data").iterdir())[1]
    text = part.read_text()
    if damage == "cut":
        part.write_text(text[:-40])
    elif damage == "line":
        part.write_text("".join(text.splitlines(keepends=True)[:-1]))
    elif damage == "edited":
        part.write_text(text.replace("na\u00efve", "naive", 1))
    elif damage == "renamed":
        part.rename(part.with_name("part-1.jsonl"))
    elif damage == "foreign":
        other = TrajectoryStore.open(tmp_path / "other", mark(requests, seed=8))
        path = other.write_part(trajectories[90:95])
        (store.folder / "data" / path.name).write_text(path.read_text())
    elif damage == "copied":
        part.with_name(part.name.replace("00001", "00002")).write_text(text)
    elif damage == "manifest":
        (store.folder / "manifest.json").write_text('{"version"')
    elif damage == "no manifest":
        (store.folder / "manifest.json").unlink()
    with pytest.raises(JaxbakeError, match="trajectories"):
        TrajectoryStore.open(store.folder, mark(requests))


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(JaxbakeError, match="holds no trajectories"):
        TrajectoryStore.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxbakeError, match="cannot be written"):
        TrajectoryStore.open(tmp_path / "file" / "trajectories", {"seed": 0})


def test_parts_are_readable_json_lines(stored):
    store, _, _ = stored
    line = sorted((store.folder / "data").iterdir())[1].read_text().split("\n")[0]
    assert "na\u00efve" in line and json.loads(line)["kind"] == "bake"
