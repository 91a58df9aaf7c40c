"""Dialogues to fixed-shape rows: tokens, segments, and the weight of every token to be learned."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxbake.smallworld.curriculum import draw_dialogue
from jaxbake.smallworld.scene import Dialogue
from jaxbake.smallworld.tokenizer import END

FIRST_TOKEN_WEIGHT = 3.0


class Encoded(NamedTuple):
    """Token ids of a dialogue and the weight of each as a target (0: read only)."""

    ids: list[int]
    weights: list[float]


class Batch(NamedTuple):
    """Packed rows. tokens, segments [B, T] int32, segment 0 is padding; at [C] flat positions whose next token is
    learned, targets [C], weights [C] float32; unused places have weight 0."""

    tokens: np.ndarray
    segments: np.ndarray
    at: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def encode(tokenizer: Any, dialogue: Dialogue, first_weight: float = FIRST_TOKEN_WEIGHT) -> Encoded:
    """Token ids as the chat template gives them, and weights on the graded answers with their end of turn.

    `tokenizer` is a `tokenizers.Tokenizer`. The template puts no space or newline between turns, so a turn is its
    role's token, its content, and the end token.
    """
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    weights: list[float] = []
    for i, message in enumerate(dialogue.messages):
        content = tokenizer.encode(message["content"].strip(), add_special_tokens=False).ids
        ids += [tokenizer.token_to_id(f"<|{message['role']}|>"), *content, end]
        graded = i in dialogue.graded
        weights += [0.0, *([first_weight] + [1.0] * len(content) if graded else [0.0] * (len(content) + 1))]
    return Encoded(ids, weights)


def pack(
    dialogues: Sequence[Encoded], rows: int, length: int, capacity: int | None = None
) -> tuple[Batch, list[Encoded]]:
    """First-fit packing into `rows` rows; returns the batch and, in order, the dialogues that found no room.

    `capacity` is how many tokens to learn the batch has places for, by default half of all. Raises ValueError for a
    dialogue longer than a row, and for more to learn than there are places: nothing is ever dropped.
    """
    tokens = np.zeros((rows, length), np.int32)
    segments = np.zeros((rows, length), np.int32)
    weights = np.zeros((rows, length), np.float32)
    filled, count = [0] * rows, [0] * rows
    left: list[Encoded] = []
    for item in dialogues:
        size = len(item.ids)
        if size > length:
            raise ValueError(f"a dialogue of {size} tokens does not fit into a row of {length}")
        row = next((r for r in range(rows) if filled[r] + size <= length), None)
        if row is None:
            left.append(item)
            continue
        span = slice(filled[row], filled[row] + size)
        count[row] += 1
        tokens[row, span], segments[row, span], weights[row, span] = item.ids, count[row], item.weights
        filled[row] += size
    capacity = capacity or rows * length // 2
    places = np.flatnonzero(weights)
    if len(places) > capacity:
        raise ValueError(f"{len(places)} tokens to learn in a batch that holds {capacity}")
    at, targets, kept = np.zeros(capacity, np.int32), np.zeros(capacity, np.int32), np.zeros(capacity, np.float32)
    at[: len(places)] = places - 1
    targets[: len(places)] = tokens.reshape(-1)[places]
    kept[: len(places)] = weights.reshape(-1)[places]
    return Batch(tokens, segments, at, targets, kept), left


@dataclass
class Stream:
    """An endless, resumable stream of packed batches of one size in tokens, in the row length each dialogue needs."""

    tokenizer: Any
    rng: random.Random
    pending: dict[int, list[Encoded]]
    batch_tokens: int = 8192
    draw: Callable[[random.Random, int], Dialogue] = draw_dialogue

    @classmethod
    def start(cls, tokenizer: Any, seed: int, lengths: Sequence[int], batch_tokens: int = 8192) -> Stream:
        return cls(tokenizer, random.Random(seed), {length: [] for length in sorted(lengths)}, batch_tokens)

    def next(self, stage: int, shortest: int) -> Batch:
        """The next batch: dialogues are drawn until some row length has a batch full."""
        while True:
            for length, waiting in self.pending.items():
                if sum(len(e.ids) for e in waiting) >= self.batch_tokens * 1.02:
                    rows = self.batch_tokens // length
                    batch, self.pending[length] = pack(waiting, rows, length)
                    return batch
            dialogue = encode(self.tokenizer, self.draw(self.rng, stage))
            fitting = [t for t in self.pending if t >= max(shortest, len(dialogue.ids))]
            if not fitting:
                raise ValueError(f"a dialogue of {len(dialogue.ids)} tokens is longer than every row length")
            self.pending[fitting[0]].append(dialogue)

    def state(self) -> dict:
        """Everything needed to continue, as JSON."""
        version, internal, gauss = self.rng.getstate()
        return {"rng": [version, list(internal), gauss], "pending": {str(k): v for k, v in self.pending.items()}}

    def restore(self, state: dict) -> None:
        version, internal, gauss = state["rng"]
        self.rng.setstate((version, tuple(internal), gauss))
        self.pending = {int(k): [Encoded(*e) for e in v] for k, v in state["pending"].items()}
