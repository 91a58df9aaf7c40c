"""Examples to batches: packed rows, a few fixed shapes, the prompt left out of the rows; a pure function of the step."""

from __future__ import annotations

import flax.struct
import numpy as np


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
    Student and teacher rows may differ in length T.
    """

    student: View
    teacher: View
    targets: np.ndarray
    weights: np.ndarray
