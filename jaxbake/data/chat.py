"""Messages to views: token ids of the teacher's and the student's prefix, and the tail both share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Example:
    """One tail seen behind two prefixes; all ids are int32 arrays of one dimension.

    kind: "bake" (teacher prompted, student not), "pin" (equal prefixes: do not change here) or "context" (another
      prompt o in both views, teacher [u + o], student [o]: keeps later prompts readable).
    tail: the tokens common to both views, after the prefixes.
    mask: bool over tail, the tokens to be matched: assistant tokens and the end-of-turn token.
    weight: how much each of its tokens counts.
    """

    kind: str
    teacher_prefix: np.ndarray
    student_prefix: np.ndarray
    tail: np.ndarray
    mask: np.ndarray
    weight: float = 1.0
