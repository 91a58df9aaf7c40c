"""The few shapes that batches have, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, order=True)
class Shape:
    """Shape of a batch: rows B, row lengths T of student and teacher, matched tokens a row K, and how many of all of
    them are projected to the vocabulary, N (0: all, as on several devices, each of which projects its own rows')."""

    rows: int
    student: int
    teacher: int
    matched: int
    kept: int = 0

    @property
    def projected(self) -> int:
        return self.kept or self.rows * self.matched


def bucket(length: int) -> int:
    """The next row length: a multiple of 8, from 128 on with eight steps an octave, from 1024 on a multiple of 128."""
    step = min(max(8, (1 << max(length - 1, 1).bit_length()) >> 4), 128)
    return -(-length // step) * step


def round_up(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple


def with_overflow(shape: Shape, examples: int, multiple: int) -> tuple[Shape, ...]:
    """A shape, and at most three for batches that do not fit it: they project all, or have more rows too, a multiple;
    in the largest each of so many examples could have a row of its own."""
    most, whole = round_up(examples, multiple), replace(shape, kept=0)
    eighths = (9,) if shape.kept else (9, 12)
    more = {min(round_up(-(-shape.rows * n // 8), multiple), most) for n in eighths} | {most}
    more = (replace(whole, rows=rows) for rows in sorted(more) if rows > shape.rows)
    return (shape, *((whole,) if shape.kept else ()), *more)


def fit(shapes: Sequence[Shape], rows: int, matched: int = 0) -> Shape:
    """The first that has so many rows, and projects so many matched tokens."""
    return next(shape for shape in shapes if shape.rows >= rows and shape.projected >= matched)


def cost(used: Sequence[Shape]) -> float:
    """Relative cost of batches of these shapes: every further shape is compiled once more, and must save 3 %."""
    return sum(map(_cost, used)) * (1 + 0.03 * len(set(used)))


def _cost(shape: Shape) -> float:
    """Relative cost of a shape: row tokens, the student's thrice (forward, backward); the vocabulary projection of the
    matched ones; and attention, which grows with the row's length and keeps rows short where that costs nothing."""
    tokens = 3 * shape.student * (1 + shape.student / 4096) + shape.teacher * (1 + shape.teacher / 4096)
    return shape.rows * tokens + shape.projected / 2
