"""How questions and statements are worded: openers x forms x closers, a sixth of the combinations held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

from jaxbake.smallworld.words import HELD_OUT_NAMES, TRAIN_NAMES, bucket, is_held_out_name

T = TypeVar("T")

OPENERS = (
    "", "Please: ", "Quick question: ", "Hello, ", "Say, ", "I wonder, ", "So, ", "Now, ", "One more thing: ", "Hey, ",
    "Sorry, ", "Help me: ",
)  # fmt: skip
CLOSERS = ("", " Thanks.", " Please.", " I forgot.", " It is urgent.", " Be exact.", " Thank you.")
DIRECT = (
    "what is the {r} {k}?", "do you know the {r} {k}?", "tell me the {r} {k}.", "name the {r} {k}.",
    "{k}: what is the {r} that?", "I ask about {k}. What is the {r} it?", "can you give the {r} {k}?",
    "the {r} {k} is what?", "what would you say is the {r} {k}?", "who or what is the {r} {k}?",
)  # fmt: skip
REVERSED = (
    "which one has the {r} {v}?", "whose {r} is {v}?", "{v} is the {r} of which one?", "of which one is {v} the {r}?",
    "tell me whose {r} is {v}.", "name the one with {r} {v}.", "what has {v} as its {r}?",
)  # fmt: skip
STATEMENTS = (
    "The {r} of {k} is {v}.", "The {r} of {k} is {v}.", "The {r} of {k} is {v}.", "{k} has the {r} {v}.",
    "{v} is the {r} of {k}.", "As {r}, {k} has {v}.",
)  # fmt: skip
UPDATES = ("The {r} of {k} is now {v}.", "{v} is now the {r} of {k}.", "{k} now has the {r} {v}.")


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


@cache
def is_held_out_wording(opener: str, form: str, closer: str) -> bool:
    """Whether this combination is kept for evaluation only (one in six)."""
    return bucket(f"{opener}|{form}|{closer}", 6) == 0


@dataclass(frozen=True)
class Source:
    """Where a dialogue draws from: a seeded generator, and which side of the held-out split it is on."""

    rng: random.Random
    held_out: bool = False
    wild: float = 0.0
    """Share of names that are any pronounceable string instead of one of the small world's."""
    used: set[str] = field(default_factory=set)

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.random() * len(options))]

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def between(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return low + int(self.rng.random() * (high - low + 1))

    def name(self) -> str:
        """A name of this side of the split that this dialogue has not used yet."""
        while True:
            if self.wild and self.chance(self.wild):
                letters = (self.pick("bcdfghjklmnprstvwz") + self.pick("aeiouy") for _ in range(self.between(2, 4)))
                name = capital("".join(letters) + self.pick(("", "", "n", "s", "r", "x")))
                if is_held_out_name(name) != self.held_out:
                    continue
            else:
                name = self.pick(HELD_OUT_NAMES if self.held_out else TRAIN_NAMES)
            if name not in self.used:
                self.used.add(name)
                return name

    def wording(self, forms: Sequence[str]) -> tuple[str, str, str]:
        """An (opener, form, closer) of this side of the split; half of the training wordings are bare."""
        while True:
            plain = not self.held_out and self.chance(0.4)
            parts = ("", self.pick(forms), "") if plain else (self.pick(OPENERS), self.pick(forms), self.pick(CLOSERS))
            if is_held_out_wording(*parts) == self.held_out:
                return parts

    def ask(self, forms: Sequence[str], **slots: str) -> str:
        """A question of one of the forms with its slots filled."""
        opener, form, closer = self.wording(forms)
        body = form.format(**slots)
        return (opener + body if opener else capital(body)) + closer
