"""Requests for responses, the responses, and the folder they are kept in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["bake", "pin", "context"]
Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Request:
    """One response to be drawn from the prompted model. `seed` alone decides its random draws.

    context: another prompt that stands after the baked one ("context" rows only).
    """

    index: int
    kind: Kind
    stimulus: str
    context: str | None
    temperature: float
    seed: int
    split: Split


@dataclass(frozen=True)
class Trajectory:
    """A request and its response. response_ids: the sampled ids, the stop token included when it was drawn.

    logprob: sum of the tokens' log-probabilities under the untempered prompted model; finished: a stop token was drawn.
    """

    index: int
    kind: Kind
    stimulus: str
    context: str | None
    temperature: float
    seed: int
    split: Split
    response: str
    response_ids: tuple[int, ...]
    logprob: float
    finished: bool
