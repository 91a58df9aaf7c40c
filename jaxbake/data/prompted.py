"""What a teacher is given: rows of examples grouped by the prompt they stand behind, in one shape for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jaxbake.data.batches import View, empty_view, left_out, shared_prefix
from jaxbake.data.chat import Example

_OPEN = 32  # rows that are not full yet, among which a place is looked for


def prompts_of(examples: Sequence[Example]) -> tuple[np.ndarray, ...]:
    """What the teacher's rows begin with, int32 [P], by `Example.prompt`: see `shared_prefix`."""
    groups: dict[int, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.prompt, []).append(example)
    return tuple(shared_prefix(groups.get(number, [])) for number in range(max(groups, default=-1) + 1))


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()


class TeacherRows:
    """The teacher's view of examples: packed into rows, every batch of rows behind one prompt, all of one shape.

    Args:
      examples: at least one.
      prompts: token prefixes by `Example.prompt`; what an example begins with of its own is left out of its row.
      batch_size: a batch has about as many tokens as so many examples, or fewer where most prompts have fewer.
      rows_multiple, tokens_multiple: what the number of rows and their length are multiples of.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        prompts: Sequence[np.ndarray],
        *,
        batch_size: int,
        rows_multiple: int = 1,
        tokens_multiple: int = 1,
    ):
        self._examples = tuple(examples)
        self._prompt = np.array([e.prompt for e in examples])
        self._left_out = np.array([left_out(e, prompts[e.prompt]) for e in examples])
        self._lengths = np.array([e.teacher_prefix.size + e.tail.size for e in examples]) - self._left_out
        self._matched = np.array([int(e.mask.sum()) for e in examples])
        self._starts = np.cumsum(self._matched) - self._matched

        total, longest = int(self._lengths.sum()), int(self._lengths.max())
        # Powers of two, so that other examples of like length have the same shape; longer rows hold examples better.
        self.length = -(-_power_of_two(longest + longest // 2) // tokens_multiple) * tokens_multiple
        per_row = round(1.1 * self.length * int(self._matched.sum()) / total)
        self.matched = min(_power_of_two(max(int(self._matched.max()), per_row)), self.length)
        needed = np.bincount(self._prompt, self._lengths)
        usual = np.median(np.ceil(needed[needed > 0] / self.length))
        rows = _power_of_two(min(-(-batch_size * total // (len(examples) * self.length)), int(usual)))
        self.rows = -(-rows // rows_multiple) * rows_multiple

    def groups(self, which: np.ndarray) -> Iterator[tuple[int, int, Iterator[tuple[View, np.ndarray]]]]:
        """For each prompt that these examples stand behind: its number, how many of its tokens are seen at most, and
        batches of its rows: the view and, int32 [B, K], which of all examples' matched tokens (counted in order) it
        is, -1 for padding."""
        for number in np.unique(self._prompt[which]):
            mine = which[self._prompt[which] == number]
            yield int(number), int(self._left_out[mine].max()), self._batches(mine)

    def _batches(self, which: np.ndarray) -> Iterator[tuple[View, np.ndarray]]:
        rows = self._pack(which)
        for at in range(0, len(rows), self.rows):
            yield self._assemble(rows[at : at + self.rows])

    def _pack(self, which: np.ndarray) -> list[list[int]]:
        """Rows of examples: the first of the open ones that has room, longest example first."""
        rows: list[list[int]] = []
        open_rows: list[list[int]] = []  # [row, tokens left, matched tokens left]
        for i in which[np.argsort(-self._lengths[which], kind="stable")]:
            length, matched = int(self._lengths[i]), int(self._matched[i])
            found = next((r for r in open_rows if length <= r[1] and matched <= r[2]), None)
            if found is None:
                found = [len(rows), self.length, self.matched]
                rows.append([])
                open_rows.append(found)
                if len(open_rows) > _OPEN:
                    open_rows.remove(min(open_rows, key=lambda r: r[1]))
            rows[found[0]].append(int(i))
            found[1] -= length
            found[2] -= matched
        return rows

    def _assemble(self, rows: list[list[int]]) -> tuple[View, np.ndarray]:
        view = empty_view(self.rows, self.length, self.matched)
        source = np.full((self.rows, self.matched), -1, np.int32)
        for b, row in enumerate(rows):
            t = k = 0
            for segment, i in enumerate(row, 1):
                example, hidden, length = self._examples[i], int(self._left_out[i]), int(self._lengths[i])
                here, out = slice(t, t + length), slice(k, k + int(self._matched[i]))
                view.tokens[b, here] = np.concatenate([example.teacher_prefix[hidden:], example.tail])
                view.positions[b, here] = np.arange(hidden, hidden + length)
                view.segments[b, here] = segment
                view.prefix[b, here] = hidden
                view.index[b, out] = t + example.teacher_prefix.size - hidden - 1 + np.flatnonzero(example.mask)
                source[b, out] = self._starts[i] + np.arange(out.stop - out.start)
                t, k = here.stop, out.stop
        return view, source
