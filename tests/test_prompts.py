"""Several prompts in one bake: each is read once, rows are grouped behind it, and all is as with whole rows."""

from __future__ import annotations

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
from jaxbake.config import BakeConfig, LoraConfig, OptimizerConfig, TeacherConfig, TrainConfig
from jaxbake.data.chat import Example
from jaxbake.data.prompted import TeacherRows, prompts_of
from jaxbake.models.base import Base
from jaxbake.models.decoder import forward

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


def trained(config: BakeConfig = CONFIG, folder=None, examples=None, **teacher) -> tuple[list[float], list[float]]:
    """Losses and held-out KLs of a training on several prompts."""
    changes = {name: teacher.pop(name) for name in list(teacher) if name != "top_k"}
    config = replace(config, train=replace(config.train, **changes), teacher=TeacherConfig(**teacher))
    examples = make_examples() if examples is None else examples
    held_out = [e for e in make_examples(each=1, seed=0) if e.kind == "bake"]
    rows = train(tiny.tiny_base(), config, examples, held_out, folder, lambda *_: None, Runs(None, {})).metrics
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
