"""A whole bake of a tiny model: what comes out, what is written, and what bad input is answered with."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_base as tiny

from jaxbake.bake import train as training
from jaxbake.bake.checkpoint import Checkpoints
from jaxbake.bake.folder import MetricsLog, claim, read_metrics
from jaxbake.bake.rollout import collect, write_stimuli
from jaxbake.bake.step import init_state
from jaxbake.bakery.store import load_delta
from jaxbake.config import GenerateConfig, LoraConfig, OptimizerConfig, SamplingConfig, StimuliConfig
from jaxbake.data.stimuli import split_held_out
from jaxbake.data.trajectories import TrajectoryStore, plan_requests
from jaxbake.deltas.lora import delta_digest
from jaxbake.errors import JaxbakeError, TrainingDiverged


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    """One bake, its folder, and what it said on the way."""
    calls = []
    folder = tmp_path_factory.mktemp("bake") / "sailor"
    return tiny.tiny_bake(folder, progress=lambda *call: calls.append(call)), folder, calls


@pytest.fixture
def folder_of(baked, tmp_path):
    """A copy of the finished bake's folder, without its delta: all is sampled and trained but for the end."""
    shutil.copytree(baked[1], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "delta")
    return tmp_path / "copy"


def test_the_divergence_falls_and_the_result_says_so(baked):
    result, folder, _ = baked
    assert result.kl_after < 0.5 * result.kl_before
    assert [row["step"] for row in result.metrics] == list(range(25))
    assert [row["step"] for row in result.metrics if "held_out_kl" in row] == [0, 8, 16, 24]
    assert result.kl_before == result.metrics[0]["held_out_kl"]
    assert result.kl_after == result.metrics[-1]["held_out_kl"]
    assert {"loss", "grad_norm", "update_norm", "learning_rate", "tokens"} <= result.metrics[-1].keys()
    assert read_metrics(folder / "metrics.jsonl") == result.metrics


def test_the_card_says_what_was_baked(baked):
    result, folder, _ = baked
    assert result.card.name == "sailor" and result.card.prompt == tiny.PROMPT
    assert result.card.delta_digest == delta_digest(result.delta)
    assert result.card.config["optimizer"]["learning_rate"] == 1e-2
    assert result.card.metrics["held_out_kl"] == result.kl_after
    delta, card = load_delta(folder, tiny.tiny_base())
    assert card == result.card and delta_digest(delta) == card.delta_digest


def test_progress_tells_both_stages_to_their_end(baked):
    for stage in ("sample", "bake"):
        done = [call[1] for call in baked[2] if call[0] == stage]
        assert done == sorted(done)
        assert done[-1] == next(call[2] for call in baked[2] if call[0] == stage)


def test_the_trajectories_are_a_dataset(baked, monkeypatch, tmp_path):
    import datasets

    rows = datasets.load_dataset(str(baked[1] / "trajectories"), cache_dir=str(tmp_path))["train"]
    assert set(rows["kind"]) == {"bake", "pin", "context"}
    assert set(rows["split"]) == {"train", "held_out"}
    held = {row["stimulus"] for row in rows if row["split"] == "held_out"}
    assert held and not held & {row["stimulus"] for row in rows if row["split"] == "train"}


def test_the_same_call_returns_the_finished_bake(baked):
    result, folder, _ = baked
    again = tiny.tiny_bake(folder)
    assert again.reused and not result.reused
    assert again.card == result.card and again.metrics == result.metrics
    assert (again.kl_before, again.kl_after) == (result.kl_before, result.kl_after)


def test_without_a_folder_the_result_is_the_same(baked):
    result = tiny.tiny_bake(None)
    assert result.output is None
    assert delta_digest(result.delta) == delta_digest(baked[0].delta)
    assert result.metrics == baked[0].metrics


def test_a_teacher_asked_at_every_step_agrees_with_one_asked_once(baked):
    nowhere = tiny.with_train(teacher_device_gb=0, teacher_host_gb=0, teacher_disk_gb=0)
    losses = [row["loss"] for row in tiny.tiny_bake(None, nowhere).metrics[1:]]
    np.testing.assert_allclose(losses, [row["loss"] for row in baked[0].metrics[1:]], rtol=1e-3)


def test_another_bake_in_the_folder_is_refused(baked):
    folder = baked[1]
    config = replace(tiny.CONFIG, optimizer=OptimizerConfig(learning_rate=2e-2))
    for changes, named in (
        ({"prompt": "You are a cook."}, "prompt"),
        ({"stimuli": ["who?", "why?"]}, "stimuli"),
        ({"pins": ["hm"]}, "pins"),
        ({"config": config}, "config.optimizer.learning_rate"),
        ({"base": replace(tiny.tiny_base(), digest="another")}, "base"),
    ):
        with pytest.raises(JaxbakeError, match=f"holds another bake.*{named}"):
            tiny.tiny_bake(folder, **changes)


def test_settings_without_influence_do_not_make_another_bake(baked):
    assert tiny.tiny_bake(baked[1], tiny.with_train(checkpoint_every=5)).reused


def test_early_stop_keeps_the_best_delta(folder_of, tmp_path):
    """A rate so high that it only gets worse: the best evaluation is the base, and the bake stops before the end."""
    config = replace(tiny.with_train(patience=2, eval_every=1), optimizer=OptimizerConfig(learning_rate=3.0, warmup=0))
    result = tiny.tiny_bake(None, config)
    last = result.metrics[-1]["step"]
    kl = {row["step"]: row["held_out_kl"] for row in result.metrics}
    best = min(kl, key=kl.get)
    assert last == best + 2 < config.train.steps
    assert result.kl_after == kl[best] == min(kl.values())
    if best == 0:
        assert all(np.all(np.asarray(f["b"]) == 0) for f in result.delta.factors.values())


@pytest.mark.parametrize("prompt", [None, "", " \n"])
def test_no_prompt(prompt):
    with pytest.raises(JaxbakeError, match="prompt"):
        tiny.tiny_bake(None, prompt=prompt)


@pytest.mark.parametrize("stimuli", [None, [], "who?", [3], StimuliConfig()])
def test_no_stimuli(stimuli):
    with pytest.raises(JaxbakeError, match="stimuli"):
        tiny.tiny_bake(None, stimuli=stimuli)


def test_a_prompt_longer_than_the_context():
    with pytest.raises(JaxbakeError, match=r"prompt: 2\d\d tokens.*context of 160"):
        tiny.tiny_bake(None, prompt="sail " * 50)


def test_a_stimulus_that_leaves_no_room_for_the_response():
    with pytest.raises(JaxbakeError, match=r"tokens; with sampling.max_tokens 6.*context of 160"):
        tiny.tiny_bake(None, stimuli=["a" * 130, "b"])


@pytest.mark.parametrize(
    "lora, named", [(LoraConfig(rank=99), "rank: 99"), (LoraConfig(targets=("q_prj",)), "did you mean 'q_proj'")]
)
def test_a_delta_the_model_cannot_take_is_refused_before_any_work(lora, named, tmp_path):
    with pytest.raises(JaxbakeError, match=named):
        tiny.tiny_bake(tmp_path / "out", replace(tiny.CONFIG, lora=lora))
    assert not (tmp_path / "out").exists()


def test_a_model_without_tokenizer():
    with pytest.raises(JaxbakeError, match="no tokenizer"):
        tiny.tiny_bake(None, base=replace(tiny.tiny_base(), tokenizer=None))


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JaxbakeError, match="cannot be written"):
        tiny.tiny_bake(tmp_path / "file" / "out")


def test_a_folder_with_an_unknown_bake(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(JaxbakeError, match="no bake.json"):
        claim(tmp_path, {"prompt": "x"})
    (tmp_path / "bake.json").write_text("{half")
    with pytest.raises(JaxbakeError, match=r"bake\.json.*damaged"):
        claim(tmp_path, {"prompt": "x"})


def test_a_loss_that_is_not_finite_stops_the_bake(folder_of, tmp_path, monkeypatch):
    """From step 10 on the base is broken: steps 7 to 9 are kept beside the checkpoint of step 6."""
    params, real = tiny.tiny_base().params, training.make_bake_step
    broken = {**params, "norm": params["norm"].at[0].set(jnp.nan)}

    def breaking(*args):
        step = real(*args)
        return lambda state, p, *a, **k: step(state, p if int(state.step) < 9 else broken, *a, **k)

    for name in ("checkpoints", "metrics.jsonl"):
        path = folder_of / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(training, "make_bake_step", breaking)
    with pytest.raises(TrainingDiverged, match=r"step 10: the loss is nan.*after step 9.*checkpoints/9") as caught:
        tiny.tiny_bake(folder_of)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(caught.value.delta.factors))
    assert [row["step"] for row in read_metrics(folder_of / "metrics.jsonl")] == list(range(10))
    with Checkpoints(folder_of / "checkpoints") as checkpoints:
        assert checkpoints.latest == 9
    monkeypatch.undo()  # with a sound base the same command goes on from there
    assert tiny.tiny_bake(folder_of).metrics[-1]["step"] == 24


def test_a_damaged_checkpoint_is_named_with_the_way_out(folder_of, baked):
    for path in (folder_of / "checkpoints" / "24").rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(JaxbakeError, match=r"checkpoints/24: the checkpoint is damaged.*go on from step 18"):
        tiny.tiny_bake(folder_of)
    shutil.rmtree(folder_of / "checkpoints" / "24")
    again = tiny.tiny_bake(folder_of)
    assert again.card.delta_digest == baked[0].card.delta_digest
    assert again.metrics == baked[0].metrics


def test_a_checkpoint_that_was_being_written_is_not_taken(tmp_path):
    state = init_state(jax.random.key(0), tiny.tiny_base().config, tiny.CONFIG)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state, {}, {"kl": float("inf"), "step": 0, "since": 0})
    shutil.copytree(tmp_path / "c" / "0", tmp_path / "c" / "7.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps == [0]
        restored, _, cursor = checkpoints.restore(state, {})
    assert cursor["kl"] == float("inf")
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)


def test_no_space_for_metrics(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl", None)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(JaxbakeError, match="metrics.jsonl: cannot be written: No space left"):
        log.add({"step": 1})


def test_metrics_after_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(5)) + '{"step": 5, "lo')
    assert MetricsLog(path, 3).rows == [{"step": i} for i in range(4)]
    assert len(path.read_text().splitlines()) == 4
    path.write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    with pytest.raises(JaxbakeError, match="line 2"):
        read_metrics(path)


def test_rollouts_do_not_depend_on_what_was_there_already(baked, tmp_path):
    """A part is taken away and drawn again."""
    shutil.copytree(baked[1] / "trajectories", tmp_path / "t")
    parts = sorted((tmp_path / "t" / "data").iterdir())
    before = TrajectoryStore.open(tmp_path / "t").load()
    parts[1].unlink()
    store = TrajectoryStore.open(tmp_path / "t")
    config = tiny.CONFIG
    train, held = split_held_out(tiny.STIMULI, config.train.held_out, config.seed)
    requests = plan_requests([train], [held], config.sampling, config.retention, tiny.PINS, tiny.CONTEXTS, config.seed)
    assert len(store.done()) < len(requests) == len(before)
    collect(tiny.tiny_base(), [tiny.PROMPT], requests, store, config.sampling)
    assert store.load() == before


def test_a_stop_text_ends_a_response(tmp_path):
    base = tiny.tiny_base()
    sampling = SamplingConfig(samples_per_stimulus=4, max_tokens=6, batch_size=8)
    requests = plan_requests(
        [["a?"]], [["a?"]], sampling, replace(tiny.CONFIG.retention, pins=0, contexts=0), [], [], 0
    )

    def draw(stop, folder):
        store = TrajectoryStore.open(folder, {"stop": list(stop)})
        collect(base, [tiny.PROMPT], requests, store, replace(sampling, stop=stop))
        return store.load()

    free = draw((), tmp_path / "free")
    text = base.tokenizer.decode(free[0].response_ids[2:3])
    stopped = draw((text,), tmp_path / "stopped")
    shorter = next(n for n in range(1, 7) if text in base.tokenizer.decode(free[0].response_ids[:n]))
    assert stopped[0].response_ids == free[0].response_ids[:shorter]
    assert stopped[0].logprob > free[0].logprob


def test_a_model_without_chat_template_reads_plain_text():
    config = replace(tiny.with_train(steps=8), retention=replace(tiny.CONFIG.retention, contexts=0))
    result = tiny.tiny_bake(None, config, base=tiny.tiny_base(None))
    assert result.kl_after < result.kl_before


def test_the_model_writes_stimuli_itself():
    base = tiny.tiny_base()
    long = replace(base, config=replace(base.config, max_positions=2048))
    asked = GenerateConfig(count=6, max_tokens=4, styles=("question",))
    first = _written_or_refused(long, asked)
    assert first == _written_or_refused(long, asked)


def _written_or_refused(base, asked):
    """Random weights rarely end a turn: nothing usable is an answer too, if it is said and is the same each time."""
    try:
        return write_stimuli(base, tiny.PROMPT, asked, seed=3)
    except JaxbakeError as error:
        assert "nothing usable" in str(error)
        return str(error)


def test_tensorboard(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(JaxbakeError, match=r"jaxbake\[tensorboard\]"):
        training.TensorBoard(tmp_path)
    seen, module = [], ModuleType("tensorboard.summary")

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path)

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def flush(self):
            pass

    module.Writer = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "tensorboard.summary", module)
    training.TensorBoard(tmp_path).add({"step": 3, "loss": 0.5})
    assert seen == [("loss", 0.5, 3)]
