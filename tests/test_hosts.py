"""Several processes, preemption, and what is on disk after any kind of end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import random
import re
import shutil
import signal
import sys
import threading
import time

import fake_gcs
import jax
import numpy as np
import pytest
import tiny_base as tiny
from many import Nursery

import jaxbake as jb
from jaxbake import hosts, run
from jaxbake.bake import lock, train
from jaxbake.bake.folder import read_metrics
from jaxbake.bakery.store import load_delta
from jaxbake.data.trajectories import TrajectoryStore
from jaxbake.deltas.lora import delta_digest
from jaxbake.deltas.peft import read_tensors
from jaxbake.errors import JaxbakeError, Preempted
from jaxbake.files import as_path
from jaxbake.models.checkpoint import digest, write_params

HF_CONFIG = {
    "model_type": "llama", "vocab_size": 262, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 160,
    "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
"""Of the tiny model."""


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"coordinator": "h:1"}, "go together"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "not one of the 2 processes"),
        ({"processes": 2, "process": 1}, "give all three"),
    ],
)
def test_start_refuses_what_does_not_fit(settings, says):
    with pytest.raises(JaxbakeError, match=says):
        hosts.start(**settings)


def test_preemptible_needs_the_means_to_be():
    off = jax.config.jax_enable_preemption_service
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with pytest.raises(JaxbakeError, match="preemption service is off"):
            hosts.start("localhost:1", 2, 0, preemptible=True)
    finally:
        jax.config.update("jax_enable_preemption_service", off)
    refused = []

    def elsewhere():
        with pytest.raises(JaxbakeError, match="main thread"):
            hosts.start(preemptible=True)
        refused.append(True)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert refused


def test_sigterm_saves_and_leaves(tmp_path):
    """A single process: while sampling and in a step; then it goes on to the bitwise same delta."""
    before = signal.getsignal(signal.SIGTERM)

    def terminate(stage, at):
        def progress(now, done, total, info):
            if (now, done) == (stage, at):
                os.kill(os.getpid(), signal.SIGTERM)

        return progress

    try:
        for stage, at, says in (("sample", 8, "responses are kept"), ("bake", 9, "step 1[01] is saved")):
            hosts.start()
            with pytest.raises(Preempted, match=says):
                tiny.tiny_bake(tmp_path / "run", progress=terminate(stage, at))
        hosts.start()  # as a new process would
    finally:
        signal.signal(signal.SIGTERM, before)
    result, whole = tiny.tiny_bake(tmp_path / "run"), tiny.tiny_bake(tmp_path / "whole")
    assert result.card.delta_digest == whole.card.delta_digest
    assert result.metrics == whole.metrics
    assert load_delta(tmp_path / "run", tiny.tiny_base())[1] == result.card


def test_a_save_does_not_count_among_the_moments_to_stop(tmp_path, monkeypatch):
    """Processes agree on when to stop by counting; were Orbax to count too, a SIGTERM during a save would be lost."""
    counted = []
    monkeypatch.setattr(jax.experimental.multihost_utils, "reached_preemption_sync_point", counted.append)
    tiny.tiny_bake(tmp_path / "run", tiny.with_train(steps=4, checkpoint_every=2, eval_every=4))
    assert not counted


@pytest.fixture
def quick(monkeypatch):
    """Bakes of one configuration trace their programs once."""
    for name in ("make_bake_step", "make_eval_step"):
        monkeypatch.setattr(train, name, functools.cache(getattr(train, name)))
    monkeypatch.setattr(lock, "BEAT", 0.04)


class Trace:
    """Progress that remembers where it began: responses that were there, and the first step that was recorded."""

    def __init__(self):
        self.first = {}

    def __call__(self, stage, done, total, info):
        self.first.setdefault(stage, done)


def resumes_rightly(folder, config, steps: list[int], responses: int, digest: str) -> None:
    """Goes on in the folder; nothing that was saved is lost, and the end is the same to the bit."""
    trace = Trace()
    result = tiny.tiny_bake(folder, config, progress=trace)
    assert result.card.delta_digest == digest
    assert trace.first.get("sample", responses) == responses
    assert trace.first.get("bake", 0) == (max(steps) + 1 if steps and max(steps) < config.train.steps else 0)


SHORT = tiny.with_train(steps=12, checkpoint_every=3, eval_every=6)


def test_every_moment_is_one_to_be_killed_at(tmp_path, quick):
    """The disk as it stands before each change that is made to it, as a SIGKILL would leave it: twenty moments."""
    folder, snapshots, inside = tmp_path / "run", [], threading.local()
    changes = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
    dice, numbers, watching = random.Random(0), itertools.count(), True

    def hook(event, arguments):
        if not watching or getattr(inside, "busy", False) or not arguments:
            return
        writes = event == "open" and (set(str(arguments[1])) & set("wax+") or (arguments[2] or 0) & os.O_WRONLY)
        if (writes or event in changes) and str(arguments[0]).startswith(str(folder)):
            inside.busy = True
            copy = tmp_path / f"moment{next(numbers)}"
            with contextlib.suppress(FileNotFoundError, shutil.Error):  # what another thread removes meanwhile
                shutil.copytree(folder, copy)
            snapshots.append((event, str(arguments[0]), copy))
            inside.busy = False

    sys.addaudithook(hook)
    digest = tiny.tiny_bake(folder, SHORT).card.delta_digest
    watching = False
    kinds = {
        "sampling": [s for s in snapshots if "trajectories" in s[1]],
        "commit": [s for s in snapshots if "checkpoints" in s[1]],
        "others": [s for s in snapshots if "trajectories" not in s[1] and "checkpoints" not in s[1]],
    }
    assert all(len(found) > 7 for found in kinds.values()), {kind: len(found) for kind, found in kinds.items()}
    assert any(event == "os.rename" for event, *_ in kinds["commit"])
    chosen = [*dice.sample(kinds["sampling"], 6), *dice.sample(kinds["commit"], 8), *dice.sample(kinds["others"], 6)]
    for _, _, copy in chosen:
        steps = [int(p.name) for p in (copy / "checkpoints").glob("*") if p.name.isdigit()]
        responses = sum(p.read_bytes().count(b"\n") for p in (copy / "trajectories" / "data").glob("part-*"))
        resumes_rightly(copy, SHORT, steps, responses, digest)
        assert not [p for p in copy.rglob("*") if "tmp" in p.name and p.is_dir()]


def test_in_an_object_store(tmp_path, monkeypatch, quick):
    """Bake, kills, preemption and PEFT on gs://, as on the disk. The fake store refuses to rename or to append."""
    with fake_gcs.running(monkeypatch) as objects:
        moments = []
        whole = fake_gcs.put

        def put(name, content):
            moments.append(dict(objects))
            return whole(name, content)

        monkeypatch.setattr(fake_gcs, "put", put)
        result = tiny.tiny_bake("gs://bucket/run", SHORT)
        jb.save_peft(result.delta, tiny.tiny_base(), "gs://bucket/peft", card=result.card)
        monkeypatch.setattr(fake_gcs, "put", whole)
        here = tiny.tiny_bake(tmp_path / "run", SHORT)
        jb.save_peft(here.delta, tiny.tiny_base(), tmp_path / "peft", card=result.card)
        assert result.card.delta_digest == here.card.delta_digest
        (tmp_path / "stored").mkdir()
        for name, (content, _) in objects.items():
            if "/peft/" in name:
                (tmp_path / "stored" / name.removeprefix("bucket/peft/")).write_bytes(content)
        assert contents(tmp_path / "stored") == contents(tmp_path / "peft")
        loaded, card = load_delta("gs://bucket/run", tiny.tiny_base())
        assert card == result.card and card.delta_digest == delta_digest(loaded)
        assert delta_digest(jb.load_peft("gs://bucket/peft", tiny.tiny_base())) == card.delta_digest
        assert read_metrics(as_path("gs://bucket/run") / "metrics.jsonl") == here.metrics
        assert tiny.tiny_bake("gs://bucket/run", SHORT).reused
        for moment in random.Random(0).sample(moments, 8):
            objects.clear()
            objects.update(moment)
            marks = [name.split("/")[2:] for name in moment]  # a step is whole once its own mark is there
            steps = [int(m[1]) for m in marks if m[0] == "checkpoints" and m[2:] == ["commit_success.txt"]]
            parts = [content for name, (content, _) in moment.items() if "/part-" in name]
            responses = sum(content.count(b"\n") for content in parts)
            resumes_rightly("gs://bucket/run", SHORT, steps, responses, result.card.delta_digest)


def test_a_recipe_in_an_object_store(tmp_path, monkeypatch, quick):
    """All that a recipe writes stands there, and the second time it is found there."""
    base = dataclasses.replace(tiny.tiny_base(), folder=tmp_path)
    monkeypatch.setattr(run, "load", lambda *_, **__: base)
    monkeypatch.setattr(run, "_UNRELATED", 2)
    stimuli = jb.StimuliConfig(items=tuple(tiny.STIMULI))
    bake = dataclasses.replace(SHORT, retention=jb.RetentionConfig(pins=0, contexts=0))
    recipe = jb.Recipe(name="sailor", prompt=tiny.PROMPT, stimuli=stimuli, bake=bake)
    with fake_gcs.running(monkeypatch) as objects:
        outcome = jb.run_recipe(recipe, tmp_path, "gs://bucket/sailor")
        files = {name.split("/")[2] for name in objects}
        assert files >= {"recipe.yaml", "evaluation.json", "summary.md", "plot.png", "peft", "delta", "metrics.jsonl"}
        assert str(outcome.files["card"]) == "gs://bucket/sailor/delta/card.json"
        again = jb.run_recipe(recipe, tmp_path, "gs://bucket/sailor")
        assert again.reused and again.evaluation == outcome.evaluation


def test_paths_that_lead_nowhere():
    with pytest.raises(JaxbakeError, match="'memory://' is no known store"):
        as_path("memory://x")
    with pytest.raises(JaxbakeError, match="pip install 'adlfs'"):
        as_path("az://bucket/x")


def test_one_bake_at_a_time(tmp_path, monkeypatch, quick):
    with (
        lock.owned(tmp_path / "run"),
        pytest.raises(JaxbakeError, match=f"another bake is writing here .process {os.getpid()} on "),
    ):
        tiny.tiny_bake(tmp_path / "run", SHORT)
    with fake_gcs.running(monkeypatch) as objects:
        folder = as_path("gs://bucket/run")
        with lock.owned(folder), pytest.raises(JaxbakeError, match="another bake"), lock.owned(folder):
            raise AssertionError("two at once")
        objects["bucket/run/lock.json"] = b'{"host": "gone", "process": 1, "since": "1970", "token": "x", "beat": 3}', 1
        with lock.owned(folder):  # a dead one's lock does not beat
            pass
        assert objects["bucket/run/lock.json"][0] == b"{}"


def differences(a, b) -> float:
    """The largest difference between two deltas, over the largest value."""
    pairs = [(a.factors[slot][name], b.factors[slot][name]) for slot in a.factors for name in "ab"]
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def contents(folder) -> dict:
    """What a folder's files hold; of safetensors tensors and notes, whose order in the header is any."""
    found = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            tensors, notes = read_tensors(path)
            found[path.name] = {name: (x.dtype, x.shape, x.tobytes()) for name, x in tensors.items()}, notes
        else:
            found[path.name] = path.read_bytes()
    return found


@pytest.mark.slow
def test_four_processes(tmp_path):
    """A bake by four processes that loses one by SIGTERM, then one by SIGKILL, and goes on; also on two processes."""
    base, model, recipe = tiny.tiny_base(), tmp_path / "model", tmp_path / "recipe.yaml"
    recipe.write_text("name: tiny\nprompt: hi\n")  # the processes bake the tiny model whatever it says
    write_params(base.params, base.config, model, HF_CONFIG)
    seed = int(time.time())
    print("seed", seed)
    dice = random.Random(seed)

    def bake(count, name, **settings):
        return nursery.start(count, "bake", str(recipe), f"--output={tmp_path / name}", log=tmp_path, **settings)

    with contextlib.closing(Nursery()) as nursery:
        group = bake(4, "whole", model=str(model))
        assert group.codes() == [0] * 4, group.said()
        stored = (model / "model.safetensors").stat().st_size
        for path in group.logs:  # of the weights each has read its quarter, and their digest is the whole's
            read, found = re.search(r"read (\d+) bytes of (\w+)", path.read_text()).groups()
            assert 0.2 < int(read) / stored < 0.3
            assert found == digest(model, base.config)

        group = bake(4, "run", pause=0.15)
        group.until(f"bake {dice.randint(5, 15)} ")
        with pytest.raises(JaxbakeError, match=f"process {group.pids[0]} on"):
            tiny.tiny_bake(tmp_path / "run", tiny.with_train(steps=60, checkpoint_every=10, eval_every=30))
        os.kill(dice.choice(group.pids), signal.SIGTERM)
        assert group.codes() == [75] * 4, group.said()
        said = [re.findall(r"preempted; step (\d+) is saved", path.read_text()) for path in group.logs]
        assert len(said[0]) == 1 and said == [said[0]] * 4
        step = int(said[0][0])

        group = bake(4, "run", pause=0.15)
        group.until(f"bake {step + dice.randint(12, 14)} ")
        lost = dice.choice(group.pids)
        os.kill(lost, signal.SIGKILL)
        codes = dict(zip(group.pids, group.codes(seconds=200), strict=True))  # it takes 20 s of silence
        assert codes.pop(lost) == -signal.SIGKILL
        assert set(codes.values()) <= {69, -signal.SIGABRT}, group.said()
        shutil.copytree(tmp_path / "run", tmp_path / "two")
        saved = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit())
        assert saved >= step

        for count, name in ((4, "run"), (2, "two")):
            group = bake(count, name)
            assert group.codes() == [0] * count, group.said()
            first = int(re.search(r"^bake (\d+)", group.logs[0].read_text(), re.M)[1])
            assert first == saved + 1, "it did not go on from the last whole save"

    (delta, card), (again, resumed), (two, card_two) = (
        load_delta(tmp_path / name, base) for name in ("whole", "run", "two")
    )
    assert resumed.delta_digest == card.delta_digest and differences(again, delta) == 0
    assert 0 < differences(two, delta) < 1e-5
    assert [row["resume"] for row in resumed.resumes] == ["bitwise", "bitwise"]
    assert [row["resume"] for row in card_two.resumes] == ["bitwise", "numerical"]
    assert card_two.resumes[-1]["changed"] == ["devices", "mesh.fsdp", "processes"]
    assert card.resumes == [] and card.environment["processes"] == 4
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows == read_metrics(tmp_path / "whole" / "metrics.jsonl")
    stores = [TrajectoryStore.open(tmp_path / name / "trajectories").load() for name in ("whole", "run", "two")]
    assert stores[0] == stores[1] == stores[2]

    single = dataclasses.replace(base, folder=model)
    jb.save_peft(delta, single, tmp_path / "peft", card=card)
    jb.save_merged(single, delta, tmp_path / "merged", card=card)
    assert contents(tmp_path / "peft") == contents(tmp_path / "whole" / "peft")
    here, there = contents(tmp_path / "merged"), contents(tmp_path / "whole" / "merged")
    (here_tensors, _), (there_tensors, _) = here.pop("model.safetensors"), there.pop("model.safetensors")
    assert here == there and here_tensors.keys() == there_tensors.keys()
    for name, (dtype, shape, raw) in here_tensors.items():  # a product on shards is rounded in another order
        assert there_tensors[name][:2] == (dtype, shape)
        np.testing.assert_allclose(np.frombuffer(there_tensors[name][2], dtype), np.frombuffer(raw, dtype), atol=1e-6)
