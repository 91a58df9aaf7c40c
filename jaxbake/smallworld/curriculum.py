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
    "facts_1_3": 0.04, "facts_4_6": 0.07, "facts_7_12": 0.16, "facts_13_30": 0.01, "reversed": 0.12,
    "unknown": 0.10, "unknown_few": 0.05, "unknown_unprompted": 0.03, "persona": 0.02, "persona_facts": 0.14,
    "manner_facts": 0.05, "suffix": 0.01, "prefix": 0.01, "terse": 0.01, "two_styles": 0.01, "sum_steps": 0.045,
    "sum_plain": 0.005, "two_hop_steps": 0.02, "two_hop_plain": 0.01, "policy": 0.05, "tool_call": 0.02,
    "document": 0.015, "news": 0.015, "joined": 0.15, "mixed": 0.02, "told": 0.01, "correction": 0.01,
    "demonstration": 0.01, "drift": 0.002, "ability": 0.09, "small_talk": 0.01, "copy": 0.01,
}  # fmt: skip

STAGES = (_EASY, _FACTS, _EVERYTHING)
"""The stages: copying and a few facts; facts; everything."""

_FEWER_FACTS: Mix = {
    "copy": 0.08, "facts_1_3": 0.2, "facts_4_6": 0.2, "reversed_few": 0.15, "unknown_few": 0.08, "ability": 0.1,
    "persona": 0.04, "suffix": 0.03, "prefix": 0.03, "terse": 0.02, "unknown_unprompted": 0.03, "policy": 0.04,
}  # fmt: skip

_ALL_ALIKE: Mix = {
    "facts_1_3": 0.05, "facts_4_6": 0.06, "facts_7_12": 0.13, "facts_13_30": 0.025, "reversed": 0.08,
    "unknown": 0.05, "unknown_unprompted": 0.02, "persona": 0.02, "persona_facts": 0.09, "manner_facts": 0.06,
    "suffix": 0.01, "prefix": 0.01, "terse": 0.01, "two_styles": 0.015, "sum_steps": 0.04, "sum_plain": 0.005,
    "two_hop_steps": 0.02, "two_hop_plain": 0.015, "policy": 0.05, "tool_call": 0.025, "document": 0.03,
    "news": 0.03, "joined": 0.05, "mixed": 0.04, "told": 0.02, "correction": 0.02, "demonstration": 0.015,
    "drift": 0.005, "ability": 0.06, "small_talk": 0.015, "copy": 0.01,
}  # fmt: skip

CORPUS = (_EASY, _FEWER_FACTS, _ALL_ALIKE, _ALL_ALIKE)
"""What the tokenizer's corpus is drawn from, in turn. It must stay as it is, whatever becomes of the stages."""

_TURNS = {1: (0.3, 0.3, 0.2, 0.2, 0.0), 2: (0.2, 0.2, 0.25, 0.2, 0.15)}


def draw_from(rng: random.Random, mix: Mix) -> Dialogue:
    """A dialogue of a mixture, with one to five turns."""
    family = rng.choices(tuple(mix), tuple(mix.values()))[0]
    turns = rng.choices((1, 2, 3, 4, 5), _TURNS[2 if mix is _EVERYTHING or mix is _ALL_ALIKE else 1])[0]
    return make_dialogue(rng, family, turns=turns)


def draw_dialogue(rng: random.Random, stage: int) -> Dialogue:
    """One training dialogue of a stage."""
    return draw_from(rng, STAGES[stage])
