"""Batches: every example whole and once, the same numbers packed or not, with the shared prefix or not."""

from __future__ import annotations

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbake.data.batches import Batches, shared_prefix
from jaxbake.data.chat import Example
from jaxbake.errors import JaxbakeError
from jaxbake.models.cache import Prefix
from jaxbake.models.decoder import forward, prefix_from

VOCAB = 97
PROMPT = np.arange(1, 31, dtype=np.int32)  # u; 0 is BOS, 31.. are turns


def make_examples(count: int, seed: int = 0, longest: int = 20) -> list[Example]:
    """Bake rows [0 u x], pins [0 x] and context rows [0 u o x], some with user tokens inside their tail."""
    random = np.random.default_rng(seed)

    def draw(low, high):
        return random.integers(31, VOCAB, random.integers(low, high + 1)).astype(np.int32)

    bos, examples = np.int32([0]), []
    for i in range(count):
        kind = ("bake", "bake", "bake", "context", "bake", "pin")[i % 6]
        x, o = draw(2, 8), draw(6, 14)
        student = np.concatenate([bos, o, x] if kind == "context" else [bos, x])
        teacher = student if kind == "pin" else np.concatenate([bos, PROMPT, student[1:]])
        tail = draw(1, longest)
        mask = np.ones(tail.size, bool)
        if i % 4 == 1 and tail.size > 4:
            mask[1:4] = False
        examples.append(Example(kind, teacher, student, tail, mask, weight=1.0))
    return examples


@pytest.fixture(scope="module")
def examples():
    return make_examples(41)


def rows_of(batch, side):
    """The examples of one side of a batch: (row, segment, tokens, positions, prefix) of each."""
    view = getattr(batch, side)
    for b in range(view.tokens.shape[0]):
        for segment in range(1, view.segments[b].max() + 1):
            at = np.flatnonzero(view.segments[b] == segment)
            assert np.array_equal(at, np.arange(at[0], at[0] + at.size))  # in one piece
            yield b, segment, view.tokens[b, at], view.positions[b, at], view.prefix[b, at]


def rebuilt(batch, shared):
    """Every example of a batch as (student ids, teacher ids, matched target ids), from the arrays alone."""
    found = []
    students, teachers = list(rows_of(batch, "student")), list(rows_of(batch, "teacher"))
    for (b, segment, s, s_at, s_prefix), (b_t, segment_t, t, t_at, t_prefix) in zip(students, teachers, strict=True):
        assert (b, segment) == (b_t, segment_t)
        assert (s_prefix == 0).all() and np.array_equal(s_at, np.arange(s.size))
        assert len(set(t_prefix)) == 1 and np.array_equal(t_at, np.arange(t.size) + t_prefix[0])
        matched = []
        for k in np.flatnonzero(batch.weights[b]):
            at_s, at_t, target = batch.student.index[b, k], batch.teacher.index[b, k], batch.targets[b, k]
            same = batch.student.segments[b, at_s] == segment
            assert same == (batch.teacher.segments[b, at_t] == segment)
            if same:
                assert batch.student.tokens[b, at_s + 1] == batch.teacher.tokens[b, at_t + 1] == target
                assert batch.student.segments[b, at_s + 1] == segment
                matched.append(int(target))
        found.append((s.tolist(), [*shared[: t_prefix[0]].tolist(), *t.tolist()], matched))
    return found


def whole(example):
    views = [np.concatenate([p, example.tail]).tolist() for p in (example.student_prefix, example.teacher_prefix)]
    return views[0], views[1], example.tail[example.mask].tolist()


def test_examples_are_rebuilt_from_batches(examples):
    shared = shared_prefix(examples)
    assert shared.tolist() == [0, *PROMPT]
    batches = Batches(examples, shared, batch_size=16, max_length=64, seed=1)
    for step in range(8):
        batch = batches.batch(step)
        wanted = [examples[i] for i in batches.chosen(step)]
        assert sorted(rebuilt(batch, shared)) == sorted(whole(e) for e in wanted)
        assert batch.weights.sum() == sum(e.mask.sum() for e in wanted)
        # Bake rows leave out the whole prompt, context rows too, pins only what they begin with.
        hidden = Counter(int(p[0]) for *_, p in rows_of(batch, "teacher"))
        pins = sum(e.kind == "pin" for e in wanted)
        assert hidden == Counter({shared.size: 16 - pins, 1: pins}) and pins in (2, 3)
    arrays = [batch.targets, *vars(batch.student).values(), *vars(batch.teacher).values()]
    assert all(a.dtype == np.int32 for a in arrays) and batch.weights.dtype == np.float32


def test_epochs_are_permutations_and_steps_need_no_past(examples):
    batches = Batches(examples, batch_size=16, max_length=96, seed=1)
    n = len(examples)
    seen = np.concatenate([batches.chosen(step) for step in range(n)])
    for epoch in seen.reshape(-1, n):
        assert sorted(epoch) == list(range(n))
    assert len({tuple(epoch) for epoch in seen.reshape(-1, n)}) == 16
    again = Batches(examples, batch_size=16, max_length=96, seed=1)
    for step in (12, 3):
        one, other = batches.batch(step), again.batch(step)
        assert all(np.array_equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))
    other = Batches(examples, batch_size=16, max_length=96, seed=2)
    assert not np.array_equal(other.chosen(0), batches.chosen(0))
    # A batch larger than an epoch goes on into the next ones.
    large = Batches(examples[:5], batch_size=12, max_length=64, seed=1)
    assert set(Counter(large.chosen(0)).values()) <= {2, 3} and len(large.chosen(0)) == 12


def leaves(batch):
    return [batch.targets, batch.weights, *vars(batch.student).values(), *vars(batch.teacher).values()]


def test_all_visits_every_example_once_in_order(examples):
    shared = shared_prefix(examples)
    batches = Batches(examples, shared, batch_size=16, max_length=64, seed=1)
    groups = [rebuilt(batch, shared) for batch in batches.all()]
    assert [len(group) for group in groups] == [16, 16, 9]
    for i, group in enumerate(groups):
        assert sorted(group) == sorted(whole(e) for e in examples[16 * i : 16 * i + 16])


def test_shapes_are_few_and_kept():
    for batch_size, rows_multiple in ((16, 1), (32, 4), (3, 8)):
        examples = make_examples(300, seed=batch_size)
        batches = Batches(
            examples,
            shared_prefix(examples),
            batch_size=batch_size,
            max_length=128,
            seed=0,
            rows_multiple=rows_multiple,
        )
        allowed = {(s.rows, s.student, s.teacher, s.matched, s.kept) for s in batches.shapes}
        assert all(not s.kept for s in batches.shapes) or rows_multiple == 1
        seen = Counter()
        for batch in [*map(batches.batch, range(60)), *batches.all()]:
            student, teacher = batch.student.tokens.shape, batch.teacher.tokens.shape
            assert student[0] == teacher[0] == len(batch.weights) and student[0] % rows_multiple == 0
            assert batch.student.index.shape == batch.teacher.index.shape == batch.targets.shape == batch.weights.shape
            if batch.kept is not None:  # every matched token once, and padding
                source = batch.source.ravel()[batch.kept]
                assert sorted(source[source >= 0]) == sorted(batch.source[batch.source >= 0])
            seen[(*student, teacher[1], batch.weights.shape[1], 0 if batch.kept is None else batch.kept.size)] += 1
        assert set(seen) <= allowed and len(allowed) <= 4, seen


@pytest.mark.parametrize("batch_size", [16, 32, 64])
def test_few_tokens_are_padding(batch_size):
    """Responses of 16 to 512 tokens, log-normal around 200, as chat models write them."""
    random = np.random.default_rng(0)
    examples = []
    for _ in range(600):
        prefix = random.integers(31, VOCAB, random.integers(8, 40)).astype(np.int32)
        tail = random.integers(31, VOCAB, int(np.clip(random.lognormal(5.3, 0.6), 16, 512))).astype(np.int32)
        teacher = np.concatenate([PROMPT, prefix])
        examples.append(Example("bake", teacher, prefix, tail, np.ones(tail.size, bool)))
    batches = Batches(examples, PROMPT, batch_size=batch_size, max_length=1024, seed=0)
    useful = batches.useful_fraction(50)
    assert useful >= 0.9
    filled = total = 0
    for step in range(50):
        batch = batches.batch(step)
        filled += (batch.student.segments > 0).sum() + (batch.teacher.segments > 0).sum()
        total += batch.student.segments.size + batch.teacher.segments.size
    assert useful == filled / total
    assert batches.projected_fraction(50) >= (0.85 if batch_size == 16 else 0.9)


def test_batches_hold_kinds_and_lengths_in_proportion():
    examples = make_examples(300)
    batches = Batches(examples, batch_size=24, max_length=128, seed=0)
    lengths = np.array([e.student_prefix.size + e.tail.size for e in examples])
    kinds = np.array([e.kind for e in examples])
    sums = []
    for step in range(50):
        chosen = batches.chosen(step)
        assert 3 <= (kinds[chosen] == "pin").sum() <= 5 and 3 <= (kinds[chosen] == "context").sum() <= 5
        sums.append(lengths[chosen].sum())
    random = np.random.default_rng(0)
    unordered = [lengths[random.permutation(300)[:24]].sum() for _ in range(200)]
    assert np.std(sums) < 0.5 * np.std(unordered)


def test_packed_rows_compute_what_single_rows_do(examples, tiny_config, tiny_params):
    """Hidden states at every predicting position, of both views, against each example alone and without prefix."""
    shared = shared_prefix(examples)
    batch = Batches(examples[:20], shared, batch_size=20, max_length=64, seed=0).batch(0)
    prefix: Prefix = prefix_from(tiny_params, None, jnp.asarray(shared), config=tiny_config)

    @jax.jit
    def hidden(view, prefix):
        extra = {} if prefix is None else dict(prefix=prefix, prefix_visible=view.prefix)
        places = dict(positions=view.positions, segment_ids=view.segments)
        out = forward(tiny_params, None, view.tokens, config=tiny_config, **places, **extra)
        return jnp.take_along_axis(out, view.index[..., None], axis=1)

    got = {"student": np.asarray(hidden(batch.student, None)), "teacher": np.asarray(hidden(batch.teacher, prefix))}
    assert max(batch.student.segments.max(), batch.teacher.segments.max()) >= 3  # rows are packed
    assert np.abs(got["student"] - got["teacher"]).max() > 0.1
    places = [(side, b, segment, tokens, p[0]) for side in got for b, segment, tokens, _, p in rows_of(batch, side)]
    alone = np.zeros((len(places), 96), np.int32)
    for row, (_, _, _, tokens, seen) in zip(alone, places, strict=True):
        row[: seen + tokens.size] = np.concatenate([shared[:seen], tokens])
    want = np.asarray(jax.jit(partial(forward, config=tiny_config))(tiny_params, None, alone))
    checked = 0
    for (side, b, segment, _, _), hidden_TD in zip(places, want, strict=True):
        view = getattr(batch, side)
        for k in np.flatnonzero(batch.weights[b]):
            at = view.index[b, k]
            if view.segments[b, at] == segment:
                np.testing.assert_allclose(got[side][b, k], hidden_TD[view.positions[b, at]], atol=1e-5)
                checked += 1
    assert checked == 2 * sum(e.mask.sum() for e in examples[:20])


def test_shared_prefix_is_shorter_than_every_prompt():
    def bake(*teacher):
        return Example("bake", np.int32(teacher), np.int32([1]), np.int32([5]), np.ones(1, bool))

    assert shared_prefix([bake(1, 2, 3, 4), bake(1, 2, 3, 5, 6)]).tolist() == [1, 2, 3]
    assert shared_prefix([bake(1, 2, 3, 4), bake(1, 2, 3)]).tolist() == [1, 2]
    assert shared_prefix([bake(1, 2, 3)] * 2).tolist() == [1, 2]
    assert shared_prefix([bake(1), bake(2, 3)]).tolist() == shared_prefix([]).tolist() == []
    pin = Example("pin", np.int32([1, 9]), np.int32([1, 9]), np.int32([5]), np.ones(1, bool))
    assert shared_prefix([bake(1, 2, 3, 4), pin]).tolist() == [1, 2, 3]
    # The whole of a teacher prefix never leaves its row, whatever is shared.
    batch = Batches([bake(1, 2, 3), pin], np.int32([1, 2, 3, 4]), batch_size=2, max_length=8, seed=0).batch(0)
    assert sorted(t.tolist() for _, _, t, _, _ in rows_of(batch, "teacher")) == [[3, 5], [9, 5]]


def test_bad_examples(examples):
    with pytest.raises(JaxbakeError, match="no examples"):
        Batches([], batch_size=1, max_length=8, seed=0)
    with pytest.raises(JaxbakeError, match=r"more than train.max_length: 12; raise it to \d+"):
        Batches(examples, batch_size=4, max_length=12, seed=0)
    one = np.int32([1])
    with pytest.raises(JaxbakeError, match="example 0 .*no token of its tail"):
        Batches([Example("bake", one, one, one, np.zeros(1, bool))], batch_size=1, max_length=8, seed=0)
    with pytest.raises(JaxbakeError, match="example 0 .*no token stands before"):
        Batches([Example("bake", one, one[:0], one, np.ones(1, bool))], batch_size=1, max_length=8, seed=0)


def test_weights_of_examples_are_carried():
    one = np.int32([1, 2])
    pair = [Example("bake", one, one, one, np.ones(2, bool), w) for w in (0.5, 2.0)]
    batch = Batches(pair, batch_size=2, max_length=8, seed=0).batch(0)
    assert sorted(batch.weights[batch.weights > 0].tolist()) == [0.5, 0.5, 2.0, 2.0]
