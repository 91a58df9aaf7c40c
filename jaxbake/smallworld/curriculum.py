"""Which dialogues crumb learns from, and when: the mixture of every stage of training."""

from __future__ import annotations

import random

from jaxbake.smallworld.scene import Dialogue
from jaxbake.smallworld.world import make_dialogue

Mix = dict[str, float]
"""Relative share of dialogues of each family."""

_EASY: Mix = {"copy": 0.35, "facts_1_3": 0.3, "reversed_few": 0.15, "unknown_few": 0.1, "ability": 0.1}
_FACTS: Mix = {
    "copy": 0.06, "facts_1_3": 0.16, "facts_4_6": 0.24, "facts_7_12": 0.08, "reversed_few": 0.14,
    "unknown_few": 0.08, "ability": 0.08, "persona_facts": 0.05, "persona": 0.03, "suffix": 0.02, "prefix": 0.02,
    "terse": 0.01, "unknown_unprompted": 0.03,
}  # fmt: skip
_EVERYTHING: Mix = {
    "facts_1_3": 0.02, "facts_4_6": 0.05, "facts_7_12": 0.13, "facts_13_30": 0.02, "reversed": 0.13, "unknown": 0.11,
    "unknown_unprompted": 0.03, "persona": 0.015, "persona_facts": 0.09, "manner_facts": 0.04, "suffix": 0.008,
    "prefix": 0.008, "terse": 0.012, "two_styles": 0.012, "sum_steps": 0.025, "sum_plain": 0.005,
    "two_hop_steps": 0.015, "two_hop_plain": 0.015, "policy": 0.07, "tool_call": 0.02, "document": 0.04, "news": 0.025,
    "joined": 0.2, "mixed": 0.02, "told": 0.01, "correction": 0.015, "demonstration": 0.01, "drift": 0.002,
    "ability": 0.08, "small_talk": 0.01, "copy": 0.01,
}  # fmt: skip

STAGES = (_EASY, _FACTS, _EVERYTHING)
"""The stages: copying and a few facts; facts; everything."""

_TURNS = {1: (0.3, 0.3, 0.2, 0.2, 0.0), 2: (0.2, 0.2, 0.25, 0.2, 0.15)}


def draw_from(rng: random.Random, mix: Mix) -> Dialogue:
    """A dialogue of a mixture, with one to five turns."""
    family = rng.choices(tuple(mix), tuple(mix.values()))[0]
    turns = rng.choices((1, 2, 3, 4, 5), _TURNS[2 if mix is _EVERYTHING else 1])[0]
    return make_dialogue(rng, family, turns=turns)


def draw_dialogue(rng: random.Random, stage: int) -> Dialogue:
    """One training dialogue of a stage."""
    return draw_from(rng, STAGES[stage])
