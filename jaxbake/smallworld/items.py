"""Questions with known answers from the held-out side of the small world: what evaluation and bakes are scored on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxbake.smallworld import abilities as know
from jaxbake.smallworld import blocks
from jaxbake.smallworld.manner import PERSONAS, Manner
from jaxbake.smallworld.scene import Dialogue, Message, Scene, prompt_text
from jaxbake.smallworld.wording import Source
from jaxbake.smallworld.world import FAMILIES, make_dialogue

EVAL_FAMILIES = (*FAMILIES, "tool_answer", "multi_turn")
"""Families of `evaluation_items`: the world's, the reply after a tool's answer, and the last of several turns."""


@dataclass(frozen=True)
class Item:
    """A dialogue that ends before an answer, the answer, and the rule it is scored by.

    check: "exact" (the whole answer), "contains" (the answer somewhere in the reply), or "persona:NAME" (the reply
    carries that persona's marks).
    """

    family: str
    messages: tuple[Message, ...]
    answer: str
    check: str = "exact"


def is_correct(item: Item, text: str) -> bool:
    """Whether a reply passes the item's rule; surrounding white space does not count."""
    text = text.strip()
    if item.check == "exact":
        return text == item.answer
    if item.check == "contains":
        return item.answer in text
    if item.check.startswith("persona:"):
        return has_persona(text, item.check.removeprefix("persona:"))
    raise ValueError(f"unknown check '{item.check}'")


def has_persona(text: str, persona: str) -> bool:
    """Whether a reply begins and ends as the persona's do."""
    before, after = (mark.strip() for mark in PERSONAS[persona])
    return text.strip().startswith(before) and text.strip().endswith(after)


def _rng(name: str, seed: int) -> random.Random:
    return random.Random(f"smallworld {name} {seed}")


def _item(dialogue: Dialogue, family: str, after: str = "user") -> Item:
    """The last graded answer to a user (or tool) turn."""
    at = max(i for i in dialogue.graded if dialogue.messages[i - 1]["role"] == after)
    return Item(family, dialogue.messages[:at], dialogue.messages[at]["content"])


def evaluation_items(family: str, n: int, seed: int = 0) -> list[Item]:
    """`n` items of a family, with names and question wordings never seen in training."""
    rng, items = _rng(family, seed), []
    while len(items) < n:
        if family == "tool_answer":
            dialogue = make_dialogue(rng, "tool_call", held_out=True)
            if len(dialogue.graded) == 2:
                items.append(_item(dialogue, family, after="tool"))
        elif family == "multi_turn":
            items.append(_item(make_dialogue(rng, "mixed", held_out=True, turns=5), family))
        else:
            items.append(_item(make_dialogue(rng, family, held_out=True), family))
    return items


def _asked(n: int, seed: int, name: str, ask: Callable[[Source], know.QA], check: str) -> list[Item]:
    rng, items = _rng(name, seed), []
    for _ in range(n):
        qa = ask(Source(rng, held_out=True))
        items.append(Item(name, ({"role": "user", "content": qa.question},), qa.answer, check))
    return items


def abilities(n: int, seed: int = 0) -> list[Item]:
    """Questions that the weights alone answer, without a system prompt. Scored by "contains", so that a baked persona
    around the answer does not count against it."""
    return _asked(n, seed, "ability", know.ability, "contains")


def unrelated_unknowns(n: int, seed: int = 0) -> list[Item]:
    """Questions about names no prompt mentions, without a system prompt; the answer holds "I do not know."."""
    asked = _asked(n, seed, "unknown_unprompted", lambda s: blocks.ask_unknown(s, []), "contains")
    return [replace(item, answer=blocks.UNKNOWN) for item in asked]


def with_system(items: list[Item], prompt: str) -> list[Item]:
    """The items with a system prompt in front."""
    return [Item(i.family, ({"role": "system", "content": prompt}, *i.messages), i.answer, i.check) for i in items]


def context_prompts(n: int, seed: int = 0, questions: int = 4, held_out: bool = False) -> list[tuple[str, list[str]]]:
    """`n` system prompts of facts, each with questions on it: material for context-retention rows."""
    return [(p, [q for q, _ in asked]) for p, asked in _prompts(n, seed, questions, held_out, "context")]


def other_prompts(n: int, seed: int = 0, questions: int = 4) -> list[tuple[str, list[tuple[str, str]]]]:
    """`n` system prompts of held-out facts with (question, answer) pairs: does a baked model still read a prompt?"""
    return _prompts(n, seed, questions, True, "other")


def _prompts(n: int, seed: int, questions: int, held_out: bool, name: str):
    rng, found = _rng(name, seed), []
    for _ in range(n):
        source = Source(rng, held_out)
        scene = Scene(source, Manner(), [blocks.draw_facts(source, source.between(3, 8))])
        asked = [scene.ask(source.pick(("direct", "direct", "reversed"))) for _ in range(questions)]
        found.append((prompt_text(source, Manner(), scene.blocks), [(qa.question, qa.answer) for qa in asked]))
    return found


def pin_stimuli(n: int, seed: int = 0) -> list[str]:
    """User turns unrelated to any prompt: abilities, small talk, and questions nobody can answer; training wordings."""
    rng, found = _rng("pins", seed), []
    for _ in range(n):
        source = Source(rng)
        kind = source.pick(("ability", "ability", "talk", "unknown"))
        if kind == "unknown":
            found.append(blocks.ask_unknown(source, []).question)
        else:
            found.append((know.ability(source) if kind == "ability" else know.small_talk(source)).question)
    return found


@dataclass(frozen=True)
class PromptSet:
    """A system prompt with training questions, and held-out questions with the answers it asks for."""

    prompt: str
    questions: tuple[str, ...]
    items: tuple[Item, ...]


def prompt_set(
    facts: blocks.Facts, manner: Manner, prompt: str, questions: int, items: int, seed: int = 0
) -> PromptSet:
    """Questions on a prompt of facts and a manner: direct, reversed, and some on what it does not say.

    Training questions have training wordings; items have held-out ones and no system prompt (`with_system` adds it).
    """

    def ask(source: Source, kind: str):
        return Scene(source, manner, [facts]).ask(kind)

    kinds = ("direct", "direct", "direct", "reversed", "reversed", "unknown", "ability")
    rng = _rng("questions", seed)
    asked: list[str] = []
    while len(asked) < questions:
        question = ask(Source(rng), rng.choice(kinds)).question
        asked += [question] if question not in asked else []
    rng, scored = _rng("items", seed), []
    while len(scored) < items:
        qa = ask(Source(rng, held_out=True), rng.choice(("direct", "direct", "reversed")))
        item = Item("prompt", ({"role": "user", "content": qa.question},), manner.say(qa))
        scored += [item] if item not in scored else []
    return PromptSet(prompt, tuple(asked), tuple(scored))
