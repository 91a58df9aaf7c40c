"""Examples to batches: packed rows, few fixed shapes, the prompt left out of the rows; a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import flax.struct
import jax
import numpy as np

from jaxbake.data.chat import Example
from jaxbake.data.shapes import Shape, bucket, cost, fit, round_up, with_overflow
from jaxbake.errors import JaxbakeError

_PREVIEW = 24  # batches looked at to choose the shapes


@flax.struct.dataclass
class View:
    """One side of a batch, int32 arrays.

    tokens, positions, segments: [B, T]; segments 1.. number the examples of a row, 0 is padding.
    prefix: [B, T], how many tokens of the shared prefix each token sees (all 0 for the student).
    index: [B, K], the position in the row whose hidden state predicts the matched token.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    prefix: np.ndarray
    index: np.ndarray


@flax.struct.dataclass
class Batch:
    """Rows of packed examples, the same examples in the same row and order on both sides.

    targets: int32 [B, K], the matched token; weights: float32 [B, K], 0 for padding.
    source: int32 [B, K], which of all examples' matched tokens (counted in order) it is, -1 for padding.
    kept: int32 [N], which of the B * K places to project to the vocabulary: all that are no padding, and then some
    that is; None: all.
    Student and teacher rows may differ in length T.
    """

    student: View
    teacher: View
    targets: np.ndarray
    weights: np.ndarray
    source: np.ndarray
    kept: np.ndarray | None = None

    def projected(self, tree: Any) -> Any:
        """Of arrays [B, K, ...], what is to be projected: [N, ...], or the same."""
        if self.kept is None:
            return tree
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[self.kept], tree)


def _match(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    n = min(a.size, b.size)
    return int(np.append(np.flatnonzero(a[:n] != b[:n]), n)[0])


def shared_prefix(examples: Sequence[Example]) -> np.ndarray:
    """The longest token prefix int32 [P] that the teacher prefixes of all "bake" rows begin with (of all rows where
    there is no such row), shorter than each of them, so that every row keeps the token that predicts its tail."""
    prefixes = [e.teacher_prefix for e in examples if e.kind == "bake"] or [e.teacher_prefix for e in examples]
    if not prefixes:
        return np.zeros(0, np.int32)
    first = prefixes[0]
    length = min(first.size - 1, *(min(_match(first, p), p.size - 1) for p in prefixes))
    return first[: max(length, 0)].astype(np.int32)


def left_out(example: Example, shared: np.ndarray) -> int:
    """How many tokens of a shared prefix an example's teacher row does without: it begins with them, and a token that
    predicts the first one of the tail stays."""
    return min(_match(example.teacher_prefix, shared), max(example.teacher_prefix.size - 1, 0))


@dataclass(frozen=True)
class _Side:
    """All examples' token sequences of one view, end to end, and where each starts."""

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    hidden: np.ndarray  # tokens of the shared prefix left out in front of each


class Batches:
    """Batches of `batch_size` examples, every one a pure function of (examples, seed, step).

    An epoch visits every example once, in random order but so that each batch is a fair sample: sorted by kind and
    length the examples are cut into `batch_size` strata, and a batch has one of each. So batches hold the kinds in
    their proportion and nearly the same number of tokens.

    Examples are packed into rows (first fit, longest first), student and teacher alike. Row lengths are chosen once,
    for the fewest computed tokens; a batch that does not fit the usual number of rows takes the next `Shape`.

    Args:
      examples: at least one.
      shared: token prefix [P] whose keys and values the teacher has at hand (see `shared_prefix`), or one for each
        prompt; each example leaves out of its teacher row as much of its own as it begins with.
      batch_size: examples a step.
      max_length: longest row an example may need, in tokens; the part left out is not counted.
      rows_multiple: the number of rows B is a multiple of it (devices along the batch, accumulated micro-batches).
      tokens_multiple: row lengths T are multiples of it (devices along the rows' tokens).

    Raises JaxbakeError for an example that is longer than max_length, or has nothing to match.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        shared: np.ndarray | Sequence[np.ndarray] | None = None,
        *,
        batch_size: int,
        max_length: int,
        seed: int,
        rows_multiple: int = 1,
        tokens_multiple: int = 1,
    ):
        if not examples:
            raise JaxbakeError("no examples to make batches of")
        self.examples, self.batch_size, self.seed = tuple(examples), batch_size, seed
        self._multiple, self._tokens_multiple = rows_multiple, tokens_multiple
        student = [np.concatenate([e.student_prefix, e.tail]) for e in examples]
        teacher = [np.concatenate([e.teacher_prefix, e.tail]) for e in examples]
        shared = np.zeros(0, np.int32) if shared is None else shared
        alone = isinstance(shared, np.ndarray)
        hidden = [left_out(e, shared if alone else shared[e.prompt]) for e in examples]
        self._student = _side(student, [0] * len(student))
        self._teacher = _side(teacher, hidden)
        self._check(max_length)

        # For each matched token: target, weight, and the place of its predicting token in either view's own sequence.
        at = [np.flatnonzero(e.mask) for e in examples]
        self._matched = np.array([a.size for a in at])
        self._matched_starts = np.cumsum(self._matched) - self._matched
        self._targets = np.concatenate([e.tail[a] for e, a in zip(examples, at, strict=True)]).astype(np.int32)
        self._weights = np.repeat(np.float32([e.weight for e in examples]), self._matched)
        self._student_at = np.concatenate([a + e.student_prefix.size - 1 for e, a in zip(examples, at, strict=True)])
        self._teacher_at = np.concatenate(
            [a + e.teacher_prefix.size - h - 1 for e, a, h in zip(examples, at, hidden, strict=True)]
        )
        self._epochs: dict[int, np.ndarray] = {}
        kinds = sorted({e.kind for e in examples})
        self._kind = np.array([kinds.index(e.kind) for e in examples])
        self._shapes = with_overflow(self._choose(max_length), self.batch_size, self._multiple)

    def _check(self, max_length: int) -> None:
        for i, example in enumerate(self.examples):
            if not example.mask.any() or example.mask.size != example.tail.size:
                raise JaxbakeError(f"example {i} ({example.kind}): no token of its tail is to be matched")
            if example.mask[0] and not (example.student_prefix.size and example.teacher_prefix.size):
                raise JaxbakeError(f"example {i} ({example.kind}): no token stands before its first matched one")
            longest = int(max(self._student.lengths[i], self._teacher.lengths[i]))
            if longest > max_length:
                raise JaxbakeError(
                    f"example {i} ({example.kind}) is {longest} tokens long, more than train.max_length: {max_length}; "
                    f"raise it to {bucket(longest)}, or lower sampling.max_tokens"
                )

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of the examples that an epoch visits."""
        if epoch not in self._epochs:
            if len(self._epochs) > 4:
                self._epochs.clear()
            n, size = len(self.examples), self.batch_size
            random = np.random.default_rng([self.seed, epoch])
            shuffled = random.permutation(n)
            ranked = shuffled[np.lexsort((self._student.lengths[shuffled], self._kind[shuffled]))]
            # The epoch begins in the middle of a batch, and ends so.
            head = min(-epoch * n % size, n)
            tail = (n - head) % size
            first, ranked = _systematic(random, ranked, head)
            last, ranked = _systematic(random, ranked, tail)
            strata = random.permuted(ranked.reshape(size, -1), axis=1)
            whole = random.permuted(strata.T, axis=1).ravel()
            self._epochs[epoch] = np.concatenate([random.permutation(first), whole, random.permutation(last)])
        return self._epochs[epoch]

    def chosen(self, step: int) -> np.ndarray:
        """Which examples the batch of a step holds: [batch_size] indices."""
        at = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(at, len(self.examples))
        return np.array([self.order(int(e))[p] for e, p in zip(epochs, places, strict=True)])

    def batch(self, step: int) -> Batch:
        """The batch of a step, numpy arrays."""
        return self._assemble(self.chosen(step))

    def all(self) -> Iterator[Batch]:
        """Every example once, in order, `batch_size` at a time, in the same shapes: for evaluation."""
        for start in range(0, len(self.examples), self.batch_size):
            yield self._assemble(np.arange(start, min(start + self.batch_size, len(self.examples))))

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes batches may have, the usual one first; the others have more rows."""
        return self._shapes

    def useful_fraction(self, steps: int = _PREVIEW) -> float:
        """Share of the computed row tokens, of student and teacher together, that are not padding, over some steps."""
        fitted = list(self._fitted(steps))
        useful = sum(int(self._student.lengths[i].sum() + self._teacher.lengths[i].sum()) for i, _ in fitted)
        return useful / sum(shape.rows * (shape.student + shape.teacher) for _, shape in fitted)

    def projected_fraction(self, steps: int = _PREVIEW) -> float:
        """Share of the tokens projected to the vocabulary that are matched ones, over some steps."""
        fitted = list(self._fitted(steps))
        return sum(int(self._matched[i].sum()) for i, _ in fitted) / sum(shape.projected for _, shape in fitted)

    def _fitted(self, steps: int) -> Iterator[tuple[np.ndarray, Shape]]:
        """What each of the first steps holds, and its shape."""
        for step in range(steps):
            chosen = self.chosen(step)
            yield chosen, self._fit_batch(chosen, self._pack(chosen, self._shapes[0]))

    def _bucket(self, length: int) -> int:
        return round_up(bucket(length), self._tokens_multiple)

    def _fit_batch(self, chosen: np.ndarray, rows: list[list[int]]) -> Shape:
        return fit(self._shapes, len(rows), int(self._matched[chosen].sum()))

    def _choose(self, max_length: int) -> Shape:
        """The shape that costs least over the first steps, among row lengths from the longest example to max_length."""
        batches = [self.chosen(step) for step in range(_PREVIEW)]
        total = np.array([side.sum() for side in (self._student.lengths, self._teacher.lengths, self._matched)])
        least = [side.max() for side in (self._student.lengths, self._teacher.lengths, self._matched)]
        limit = max(self._bucket(int(max(least[:2]))), max_length)
        matched = [int(self._matched[self.chosen(step)].sum()) for step in range(4 * _PREVIEW)]
        kept = -(-int(np.mean(matched) + 3 * np.std(matched)) // 16) * 16  # enough for nearly all
        length, best = self._bucket(int(least[0])), None
        while True:
            # Rows are filled alike when their capacities stand in proportion to the tokens; slack packs better.
            shares = [total[1] / total[0] * length * slack for slack in (15 / 16, 1.0)]
            teacher = sorted({self._bucket(max(int(least[1]), round(share))) for share in shares})
            wanted = [round(total[2] / total[0] * length * slack) for slack in (1.0, 1.1, 1.25)]
            each = sorted({self._bucket(max(int(least[2]), k)) for k in wanted})
            if best is not None and max(length, teacher[-1]) > limit:
                return best[1]
            for t, k in product(teacher, each):
                rows = [len(self._pack(batch, Shape(1, length, t, k))) for batch in batches]
                for usual in sorted(set(sorted(rows)[len(rows) // 2 :])):
                    shape = Shape(round_up(usual, self._multiple), length, t, k)
                    if self._multiple == 1 and kept < shape.projected:
                        shape = replace(shape, kept=kept)
                    shapes = with_overflow(shape, self.batch_size, self._multiple)
                    used = [fit(shapes, n, m) for n, m in zip(rows, matched[:_PREVIEW], strict=True)]
                    if best is None or cost(used) < best[0]:
                        best = cost(used), shape
            if max(rows) <= self._multiple:
                return best[1]
            length = self._bucket(length * 17 // 16 + 1)

    def _pack(self, chosen: np.ndarray, shape: Shape) -> list[list[int]]:
        """Rows of examples: first fit, longest first, within the three capacities of a row."""
        rows: list[list[int]] = []
        room: list[list[int]] = []
        sizes = [(int(self._student.lengths[i]), int(self._teacher.lengths[i]), int(self._matched[i])) for i in chosen]
        share = [max(s / shape.student, t / shape.teacher, k / shape.matched) for s, t, k in sizes]
        for at in sorted(range(len(chosen)), key=lambda at: -share[at]):
            s, t, k = sizes[at]
            fits = (n for n, left in enumerate(room) if s <= left[0] and t <= left[1] and k <= left[2])
            if (row := next(fits, len(rows))) == len(rows):
                rows.append([])
                room.append([shape.student, shape.teacher, shape.matched])
            rows[row].append(int(chosen[at]))
            left = room[row]
            left[0] -= s
            left[1] -= t
            left[2] -= k
        return rows

    def _assemble(self, chosen: np.ndarray) -> Batch:
        rows = self._pack(chosen, self._shapes[0])
        shape = self._fit_batch(chosen, rows)
        student = empty_view(shape.rows, shape.student, shape.matched)
        teacher = empty_view(shape.rows, shape.teacher, shape.matched)
        targets = np.zeros((shape.rows, shape.matched), np.int32)
        weights = np.zeros((shape.rows, shape.matched), np.float32)
        source = np.full((shape.rows, shape.matched), -1, np.int32)
        for b, row in enumerate(rows):
            s = t = k = 0
            for segment, i in enumerate(row, 1):
                matched = slice(self._matched_starts[i], self._matched_starts[i] + self._matched[i])
                out = slice(k, k + self._matched[i])
                targets[b, out] = self._targets[matched]
                weights[b, out] = self._weights[matched]
                source[b, out] = np.arange(matched.start, matched.stop)
                student.index[b, out] = self._student_at[matched] + s
                teacher.index[b, out] = self._teacher_at[matched] + t
                s = _place(student, self._student, i, b, s, segment)
                t = _place(teacher, self._teacher, i, b, t, segment)
                k = out.stop
        return Batch(student, teacher, targets, weights, source, _places(source, shape.kept) if shape.kept else None)


def alike(group: Sequence[Batches]) -> list[Batches]:
    """The same batches of several bakes, packed into rows of the same lengths: those of one step differ in rows only.

    All share one choice of `shapes`, made for the member that needs most rows at a step.
    """
    own = [batches.shapes[0] for batches in group]
    lengths = Shape(0, *(max(getattr(s, side) for s in own) for side in ("student", "teacher", "matched")))
    rows = sorted(max(len(b._pack(b.chosen(step), lengths)) for b in group) for step in range(_PREVIEW))
    largest = max(group, key=lambda batches: batches.batch_size)
    usual = sorted({round_up(n, largest._multiple) for n in rows[len(rows) // 2 :]})
    tried = [with_overflow(replace(lengths, rows=n), largest.batch_size, largest._multiple) for n in usual]
    shapes = min(tried, key=lambda shapes: cost([fit(shapes, n) for n in rows]))
    packed = [copy(batches) for batches in group]
    for batches in packed:
        batches._shapes = shapes
    return packed


def _places(source_BK: np.ndarray, count: int) -> np.ndarray:
    """So many places, int32: those of matched tokens, and then, as often as it takes, one of padding."""
    matched, padding = np.flatnonzero(source_BK >= 0), np.flatnonzero(source_BK < 0)
    return np.append(matched, np.repeat(padding[:1], count - matched.size)).astype(np.int32)


def _systematic(random: np.random.Generator, items: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A sample of sorted items, evenly spaced from a random start, and the rest."""
    at = ((np.arange(count) + random.random()) * (items.size / max(count, 1))).astype(int)
    return items[at], np.delete(items, at)


def _side(sequences: list[np.ndarray], hidden: list[int]) -> _Side:
    lengths = np.array([s.size - h for s, h in zip(sequences, hidden, strict=True)])
    tokens = np.concatenate([s[h:] for s, h in zip(sequences, hidden, strict=True)]).astype(np.int32)
    return _Side(tokens, np.cumsum(lengths) - lengths, lengths, np.array(hidden))


def empty_view(rows: int, length: int, matched: int) -> View:
    """A view of padding."""
    return View(*(np.zeros((rows, length), np.int32) for _ in range(4)), index=np.zeros((rows, matched), np.int32))


def _place(view: View, side: _Side, i: int, b: int, at: int, segment: int) -> int:
    """Writes example i into row b from `at` on; returns where it ends."""
    length, hidden, end = side.lengths[i], side.hidden[i], at + side.lengths[i]
    view.tokens[b, at:end] = side.tokens[side.starts[i] : side.starts[i] + length]
    view.positions[b, at:end] = np.arange(hidden, hidden + length)
    view.segments[b, at:end] = segment
    view.prefix[b, at:end] = hidden
    return end
