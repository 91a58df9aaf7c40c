"""Several prompts in one bake: each is read once, rows are grouped behind it, and all is as with whole rows."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_base as tiny

from jaxbake.bake import asking
from jaxbake.bake.asking import Asker
from jaxbake.bake.folder import Runs
from jaxbake.bake.train import train
from jaxbake.bakery.store import load_delta
from jaxbake.config import BakeConfig, LoraConfig, OptimizerConfig, TeacherConfig, TrainConfig
from jaxbake.data.chat import Example, prefix_ids
from jaxbake.data.prompted import TeacherRows, prompts_of
from jaxbake.data.stimuli import split_prompts
from jaxbake.data.trajectories import TrajectoryStore
from jaxbake.deltas.lora import delta_digest, init_delta
from jaxbake.errors import JaxbakeError
from jaxbake.evaluate import cells
from jaxbake.evaluate.items import Item, user
from jaxbake.models.base import Base
from jaxbake.models.decoder import forward
from jaxbake.recipe import load_recipe, read_prompts
from jaxbake.run import inside
from jaxbake.sampling import generate

CONFIG = BakeConfig(
    lora=LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "down_proj")),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    train=TrainConfig(steps=12, batch_size=6, eval_every=6, checkpoint_every=100, max_length=64),
)


def make_examples(lengths=(40, 19, 33, 2, 50), each=5, seed=0) -> list[Example]:
    """Bake rows behind prompts of these lengths, with pins and context rows among them, mixed."""
    random = np.random.default_rng(seed)

    def draw(low, high=None):
        return random.integers(6, 262, low if high is None else random.integers(low, high + 1)).astype(np.int32)

    prompts, bos, examples = [draw(length) for length in lengths], np.int32([1]), []
    for i in range(each * len(prompts)):
        number, kind = i % len(prompts), ("bake", "bake", "context", "bake", "pin")[i // len(prompts) % 5]
        x, tail = draw(2, 6), draw(1, 9)
        if kind == "pin":
            examples.append(Example(kind, np.append(bos, x), np.append(bos, x), tail, np.ones(tail.size, bool)))
            continue
        student = np.concatenate([bos, draw(5) if kind == "context" else x[:0], x])
        teacher = np.concatenate([bos, prompts[number], student[1:]])
        mask = np.ones(tail.size, bool)
        mask[1:3] = tail.size <= 3
        examples.append(Example(kind, teacher, student, tail, mask, prompt=number))
    return examples


def whole(base: Base, examples) -> np.ndarray:
    """The hidden states that predict the matched tokens, every example read whole, in a row of its own."""
    found, read = [], jax.jit(partial(forward, config=base.config))
    for e in examples:
        ids = np.concatenate([e.teacher_prefix, e.tail])
        row = np.pad(ids, (0, 96 - ids.size))[None]
        segments = (np.arange(96) < ids.size).astype(np.int32)[None]
        hidden = read(base.params, None, jnp.asarray(row), segment_ids=jnp.asarray(segments))
        found.append(hidden[0, e.teacher_prefix.size - 1 + np.flatnonzero(e.mask)])
    return np.concatenate(found)


def test_the_teacher_says_what_it_says_of_whole_rows(monkeypatch):
    base, examples, read, shapes = tiny.tiny_base(), make_examples(), [], set()
    prefix_of, hidden_of = asking.prefix_of, asking.teacher_hidden_of
    monkeypatch.setattr(asking, "prefix_of", lambda p, d, ids, **k: read.append(len(ids)) or prefix_of(p, d, ids, **k))
    monkeypatch.setattr(
        asking, "teacher_hidden_of", lambda p, view, *rest: shapes.add(view.tokens.shape) or hidden_of(p, view, *rest)
    )
    np.testing.assert_allclose(Asker(base, examples).hidden(), whole(base, examples), rtol=1e-5, atol=1e-5)
    assert sorted(read) == [3, 20, 34, 41, 51]  # each prompt once, with the token before it
    assert len(shapes) == 1  # and none in front of a row
    assert next(iter(shapes))[1] < 50


def test_rows_hold_every_matched_token_once_behind_its_own_prompt():
    examples = make_examples(each=9)
    prompts = prompts_of(examples)
    rows = TeacherRows(examples, prompts, batch_size=8, rows_multiple=2, tokens_multiple=3)
    starts = np.cumsum([0, *(e.mask.sum() for e in examples)])
    of = np.searchsorted(starts, np.arange(starts[-1]), side="right") - 1
    found, which = [], np.arange(0, len(examples), 2)
    for number, seen, batches in rows.groups(which):
        for view, source in batches:
            assert view.tokens.shape == (rows.rows, rows.length) and rows.rows % 2 == rows.length % 3 == 0
            there = source[source >= 0]
            assert {examples[of[t]].prompt for t in there} == {number} and view.prefix.max() <= seen
            found += there.tolist()
            for b, k in zip(*np.nonzero(source >= 0), strict=True):
                example, at = examples[of[source[b, k]]], view.index[b, k]
                place = np.flatnonzero(example.mask)[source[b, k] - starts[of[source[b, k]]]]
                ids = np.concatenate([example.teacher_prefix, example.tail])
                assert view.positions[b, at] == example.teacher_prefix.size + place - 1
                assert view.tokens[b, at] == ids[view.positions[b, at]]
                assert np.array_equal(prompts[number][: view.prefix[b, at]], ids[: view.prefix[b, at]])
    assert sorted(found) == sorted(t for i in which for t in range(starts[i], starts[i + 1]))


def trained(config: BakeConfig = CONFIG, folder=None, base=None, **teacher) -> tuple[list[float], list[float]]:
    """Losses and held-out KLs of a training on several prompts."""
    changes = {name: teacher.pop(name) for name in list(teacher) if name != "top_k"}
    config = replace(config, train=replace(config.train, **changes), teacher=TeacherConfig(**teacher))
    base, examples = base or tiny.tiny_base(), make_examples()
    held_out = [e for e in make_examples(each=1, seed=0) if e.kind == "bake"]
    rows = train(base, config, examples, held_out, folder, lambda *_: None, Runs(None, {})).metrics
    return [row["loss"] for row in rows[1:]], [row["held_out_kl"] for row in rows if "held_out_kl" in row]


@pytest.fixture(scope="module")
def kept():
    return trained()


NOWHERE = {"teacher_device_gb": 0, "teacher_host_gb": 0, "teacher_disk_gb": 0}


@pytest.mark.parametrize("room", [NOWHERE, {**NOWHERE, "teacher_host_gb": 5e-6}], ids=["each step", "some steps"])
def test_asked_ahead_of_the_steps_it_trains_as_with_all_kept(kept, room):
    for ours, theirs in zip(trained(**room), kept, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4)
    assert kept[1][-1] < 0.95 * kept[1][0]


def test_examples_visited_once_are_asked_ahead(kept):
    """Fewer steps than an epoch has: no table, and the same as with one."""
    losses, _ = trained(steps=4, **NOWHERE)
    again, _ = trained(steps=4)
    np.testing.assert_allclose(losses, again, rtol=2e-4)


def test_the_top_k_train_as_the_hidden_states_do(kept, tmp_path):
    losses, held_out = trained(top_k=262)  # all of the vocabulary
    np.testing.assert_allclose(losses, kept[0], rtol=1e-3)
    np.testing.assert_allclose(held_out, kept[1], rtol=1e-3)
    few, held_few = trained(top_k=8)
    assert few[0] < kept[0][0] and held_few[0] == held_out[0]  # a bound; what is measured stays the full divergence
    assert held_few[-1] < 0.95 * held_few[0]
    filed, _ = trained(top_k=8, folder=tmp_path, teacher_device_gb=0, teacher_host_gb=0)
    np.testing.assert_allclose(filed, few, rtol=1e-6)
    assert (tmp_path / "teacher" / "teacher.bin").stat().st_size % (8 * 8 + 4) == 0
    one_by_one, _ = trained(top_k=8, **NOWHERE)
    np.testing.assert_allclose(one_by_one, few, rtol=2e-4)


# From texts


FACTS = [
    ("The cat of the mill is called Tom. It sleeps in the big red barn.", ["whose cat?", "where?", "what color?"]),
    ("Ann lives by the sea.", ["who lives there?", "where?"]),
    ("Nobody knows the way to the well.", ["who knows?"]),
]


def small(**changes) -> BakeConfig:
    return replace(tiny.with_train(steps=6, eval_every=6), **changes)


def baked(output=None, **changes):
    arguments = {"prompt": None, "prompts": FACTS, "stimuli": None, "config": small(), **changes}
    return tiny.tiny_bake(output, arguments.pop("config"), **arguments)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several") / "facts"
    return baked(folder), folder


def test_several_texts_are_baked_into_one_delta(several):
    result, folder = several
    rows = TrajectoryStore.open(folder / "trajectories").load()
    asked = {(row.prompt, row.stimulus) for row in rows if row.kind == "bake"}
    assert asked == {(number, turn) for number, (_, turns) in enumerate(FACTS) for turn in turns}
    assert len({row.prompt for row in rows if row.kind == "context"}) > 1
    held = {row.stimulus for row in rows if row.split == "held_out"}
    assert held and not held & {row.stimulus for row in rows if row.split == "train"}
    assert result.kl_after < result.kl_before
    card = load_delta(folder, tiny.tiny_base())[1]
    assert card.prompt is None and card.prompt_sha256 and card.metrics["prompts"] == 3
    assert baked(folder).reused
    with pytest.raises(JaxbakeError, match="holds another bake.*prompt"):
        baked(folder, prompts=FACTS[:2])


def test_each_response_is_what_its_own_prompt_alone_gives(several):
    """Sampled in groups by prompt, behind what the group shares, and as `sample_ids` draws it from the whole prompt."""
    base, rows = tiny.tiny_base(), TrajectoryStore.open(several[1] / "trajectories").load()
    for row in [row for row in rows if row.kind == "bake"][:6]:
        ids = prefix_ids(base.tokenizer, FACTS[row.prompt][0], row.stimulus)
        drawn = generate(
            base.params, None, [ids], config=base.config, max_tokens=6, temperature=row.temperature,
            stop_ids=base.eos_ids, seeds=[row.seed],
        )  # fmt: skip
        assert tuple(drawn[0].tokens.tolist()) == row.response_ids


def test_one_text_among_prompts_is_the_prompt():
    alone = tiny.tiny_bake(None, small())
    among = tiny.tiny_bake(None, small(), prompt=None, prompts=[(tiny.PROMPT, tiny.STIMULI)], stimuli=None)
    assert delta_digest(alone.delta) == delta_digest(among.delta) and among.card.prompt == tiny.PROMPT


@pytest.mark.parametrize("rooms", [{**NOWHERE, "teacher_disk_gb": 1}, {**NOWHERE, "teacher_host_gb": 5e-6}])
def test_killed_and_run_again_it_is_bitwise_the_same(rooms, tmp_path):
    """With what the teachers say in a file, and asked some steps ahead: the kill is inside of such a window."""
    config = replace(small(), train=replace(small().train, checkpoint_every=2, **rooms))

    class Killed(Exception):
        pass

    def kill(stage, done, total, info):
        if stage == "bake" and done == 3:
            raise Killed

    with pytest.raises(Killed):
        baked(tmp_path / "a", config=config, progress=kill)
    again, whole = baked(tmp_path / "a", config=config), baked(tmp_path / "b", config=config)
    assert delta_digest(again.delta) == delta_digest(whole.delta) and again.metrics == whole.metrics


def test_what_cannot_be_several_prompts_is_named():
    for changes, said in (
        ({"prompt": "x"}, "give one of them"),
        ({"prompts": []}, "prompts: there are none"),
        ({"prompts": [FACTS[0], ("", ["x"])]}, r"prompts\[1\]: prompt: is missing or empty"),
        ({"prompts": [("text", [])]}, r"prompts\[0\]: stimuli: there are none"),
        ({"prompts": ["text"]}, r"prompts\[0\]: must be a text and a list"),
        ({"prompts": [("text", "turn")]}, r"prompts\[0\]: must be a text and a list"),
    ):
        with pytest.raises(JaxbakeError, match=said):
            baked(**changes)


def test_stimuli_are_split_over_prompts():
    train, held = split_prompts([["a", "b", "c"], ["b", "d"], ["e"]], 0.4, seed=0)
    assert [sorted(t + h) for t, h in zip(train, held, strict=True)] == [["a", "b", "c"], ["b", "d"], ["e"]]
    assert all(train) and sum(map(len, held)) >= 1 and not set(sum(train, [])) & set(sum(held, []))
    assert split_prompts([["a"], ["b"]], 0.4, seed=0)[0] == [["a"], ["b"]]  # each has one: it is on both sides


def test_a_recipe_names_a_file_of_prompts(tmp_path):
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps({"prompt": p, "stimuli": s}) + "\n" for p, s in FACTS))
    (tmp_path / "facts.yaml").write_text("name: facts\nprompts_file: facts.jsonl\nstimuli: {items: [hello.]}\n")
    recipe = load_recipe(tmp_path / "facts.yaml")
    assert read_prompts(recipe, tmp_path) == FACTS
    moved = inside(recipe, tmp_path, tmp_path / "runs")
    assert moved.prompts_file == "../facts.jsonl" and moved.prompt is None
    with pytest.raises(JaxbakeError, match="give prompt or prompts_file, not both"):
        load_recipe(tmp_path / "facts.yaml", ["prompt=x"])
    (tmp_path / "facts.jsonl").write_text('{"prompt": "", "stimuli": []}\n')
    with pytest.raises(JaxbakeError, match="facts.jsonl line 1: 'prompt' must be text"):
        load_recipe(tmp_path / "facts.yaml")


def test_a_question_is_asked_behind_the_prompt_it_is_about(monkeypatch):
    asked = []

    def ask(base, delta, items, *, system, **_):
        asked.append((system, [item.question for item in items]))
        return [f"{system}" for _ in items]

    monkeypatch.setattr(cells, "ask", ask)
    items = [Item(user("q0"), "B", "exact", prompt=1), Item(user("q1"), "A", "exact", prompt=0)]
    delta = init_delta(jax.random.key(0), tiny.tiny_base().config, LoraConfig(rank=4))
    found = cells.four_cells(None, delta, ["A", "B"], items)
    assert found.accuracy == {"base": 0, "prompted": 1, "baked": 0, "baked_prompted": 1}
    assert ("A", ["q1"]) in asked and ("B", ["q0"]) in asked and (None, ["q0", "q1"]) in asked
    with pytest.raises(JaxbakeError, match="does not say which of 2 prompts"):
        cells.four_cells(None, None, ["A", "B"], [Item(user("q"), "A")])
