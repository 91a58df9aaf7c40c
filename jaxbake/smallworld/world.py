"""The families of dialogues.

Every dialogue draws its facts anew, so that they can only be read from its prompt. Generation is plain Python,
seeded, and knows nothing of models or tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from jaxbake.smallworld import blocks
from jaxbake.smallworld.blocks import Block, Fact, Policy, Tools
from jaxbake.smallworld.manner import QA, Manner, draw_manner
from jaxbake.smallworld.scene import Dialogue, Scene, prompt_text
from jaxbake.smallworld.wording import DIRECT, UPDATES, Source, capital

WILD = 0.1
"""Share of names in training that are any pronounceable string."""


def _draw_block(source: Source, most: int) -> Block:
    match source.between(0, 9):
        case 0:
            return blocks.draw_policy(source)
        case 1:
            return blocks.draw_tools(source)
        case 2:
            return blocks.draw_news(source, source.between(2, max(2, most // 2)))
        case 3:
            return blocks.draw_document(source, source.between(3, max(3, most)))
    return blocks.draw_facts(source, source.between(1, most))


def _scene(source: Source, manner: str | Manner, parts: list[Block]) -> Scene:
    manner = draw_manner(source, manner) if isinstance(manner, str) else manner
    scene = Scene(source, manner, parts)
    text = prompt_text(source, manner, parts)
    if text:
        scene.system(text)
    elif source.chance(0.1):
        scene.system(source.pick(("You are a helpful assistant.", "Be helpful.", "Answer the user.")))
    return scene


def _turns(scene: Scene, first: str, turns: int) -> Scene:
    scene.turn(scene.ask(first))
    for _ in range(turns - 1):
        scene.turn(scene.ask(scene.source.pick(scene.kinds())))
    return scene


def _facts(low: int, high: int, kind: str = "direct", manner: str = "plain"):
    def make(source: Source, turns: int) -> Scene:
        return _turns(_scene(source, manner, [blocks.draw_facts(source, source.between(low, high))]), kind, turns)

    return make


def _manner(manner: str):
    def make(source: Source, turns: int) -> Scene:
        return _turns(_scene(source, manner, []), source.pick(("ability", "ability", "talk", "unknown")), turns)

    return make


def _mannered_facts(low: int, high: int, manners: tuple[str, ...]):
    def make(source: Source, turns: int) -> Scene:
        scene = _scene(source, source.pick(manners), [blocks.draw_facts(source, source.between(low, high))])
        return _turns(scene, source.pick(("direct", "direct", "reversed", "unknown", "ability")), turns)

    return make


def _two_hop(steps: bool):
    def make(source: Source, turns: int) -> Scene:
        block = blocks.draw_facts(source, source.between(2, 8))
        while blocks.ask_two_hop(source, block) is None:
            source.used.clear()
            block = blocks.draw_facts(source, source.between(2, 8))
        return _turns(_scene(source, Manner(steps=steps), [block]), "two_hop", turns)

    return make


def _long_sum(steps: bool):
    def make(source: Source, turns: int) -> Scene:
        scene = _scene(source, Manner(steps=steps), [])
        for _ in range(turns):
            scene.turn(scene.ask("long_sum"))
        return scene

    return make


def _with_block(draw: Callable[[Source], Block], kinds: tuple[str, ...], manners: tuple[str, ...] = ("plain",)):
    def make(source: Source, turns: int) -> Scene:
        return _turns(_scene(source, source.pick(manners), [draw(source)]), source.pick(kinds), turns)

    return make


def _free(kind: str):
    def make(source: Source, turns: int) -> Scene:
        scene = _scene(source, "plain", [])
        for i in range(turns):
            scene.turn(scene.ask(kind if i == 0 else source.pick((kind, "unknown", "talk", "ability"))))
        return scene

    return make


def _joined(source: Source, turns: int) -> Scene:
    """Two or three prompts one after another; at most one says how to answer."""
    count = source.pick((2, 2, 2, 3))
    parts = [_draw_block(source, 8) for _ in range(count)]
    for kind in (Policy, Tools):  # one policy and one set of tools at most, else a question has two answers
        for extra in [b for b in parts if isinstance(b, kind)][1:]:
            parts[parts.index(extra)] = blocks.draw_facts(source, source.between(1, 6))
    manner = draw_manner(source, source.pick(("plain", "any")))
    at = source.between(0, count - 1)
    scene = Scene(source, manner, list(parts))
    scene.system("\n\n".join(prompt_text(source, manner if i == at else Manner(), [b]) for i, b in enumerate(parts)))
    return _turns(scene, source.pick([k for k in scene.kinds() if k != "talk"]), turns)


def _mixed(source: Source, turns: int) -> Scene:
    """Any manner with any blocks."""
    parts = [_draw_block(source, 8)] if source.chance(0.7) else []
    scene = _scene(source, "any", parts)
    return _turns(scene, source.pick(scene.kinds()), turns)


def _told(source: Source, turns: int) -> Scene:
    """Facts told in a user turn instead of the system prompt."""
    scene = _scene(source, source.pick(("plain", "any")), [])
    block = blocks.draw_facts(source, source.between(1, 6))
    scene.turn(QA(block.text, "Noted.", "Noted."))
    scene.blocks.append(block)
    return _turns(scene, source.pick(("direct", "direct", "reversed", "unknown")), turns)


_CORRECTIONS = ("No. {s}", "That is wrong. {s}", "Correction: {s}", "Not any more. {s}")


def _correction(source: Source, turns: int) -> Scene:
    """The user corrects an answer; the correction holds from then on."""
    block = blocks.draw_facts(source, source.between(1, 5))
    scene = _scene(source, source.pick(("plain", "any")), [block])
    fact = source.pick(block.facts)
    qa = QA(source.ask(DIRECT, r=f"{fact.relation} of", k=fact.key), fact.sentence(), capital(f"{fact.value}."))
    scene.turn(qa)
    new = fact
    while new.value == fact.value:
        new = Fact(fact.key, fact.relation, blocks.draw_value(source, fact.relation))
    said = capital(source.pick(UPDATES).format(r=new.relation, k=new.key, v=new.value))
    scene.turn(QA(source.pick(_CORRECTIONS).format(s=said), "Thank you. " + new.sentence(), capital(f"{new.value}.")))
    facts = tuple(new if f == fact else f for f in block.facts)
    scene.blocks[0] = replace(block, facts=facts, focus=(new,), stale=frozenset((fact.value,)))
    return _turns(scene, "direct", turns)


def _demonstration(source: Source, turns: int) -> Scene:
    """Earlier answers show a style that no instruction names; the first is not learned (nothing announces it)."""
    scene = Scene(source, draw_manner(source, source.pick(("prefix", "suffix", "terse", "persona"))))
    for i in range(source.between(2, 4) + turns):
        scene.turn(scene.ask(source.pick(("ability", "ability", "unknown"))), graded=i >= 1)
    return scene


def _drift(source: Source, turns: int) -> Scene:
    """Many turns under one manner."""
    scene = _scene(source, source.pick(("persona", "persona", "suffix", "prefix")), [])
    if source.chance(0.5):
        scene = _scene(source, scene.manner, [blocks.draw_facts(source, source.between(2, 8))])
    for _ in range(source.between(6, 20)):
        scene.turn(scene.ask(source.pick(scene.kinds())))
    return scene


_SIMPLE_MANNERS = ("persona", "persona", "persona", "suffix", "prefix", "terse", "two")

FAMILIES: dict[str, Callable[[Source, int], Scene]] = {
    "facts_1_3": _facts(1, 3),
    "facts_4_6": _facts(4, 6),
    "facts_7_12": _facts(7, 12),
    "facts_13_30": _facts(13, 30),
    "reversed": _facts(1, 12, "reversed"),
    "unknown": _facts(1, 12, "unknown"),
    "unknown_unprompted": _free("unknown"),
    "persona": _manner("persona"),
    "persona_facts": _mannered_facts(5, 10, ("persona",)),
    "manner_facts": _mannered_facts(1, 8, _SIMPLE_MANNERS),
    "suffix": _manner("suffix"),
    "prefix": _manner("prefix"),
    "terse": _manner("terse"),
    "two_styles": _manner("two"),
    "sum_steps": _long_sum(True),
    "sum_plain": _long_sum(False),
    "two_hop_steps": _two_hop(True),
    "two_hop_plain": _two_hop(False),
    "policy": _with_block(blocks.draw_policy, ("policy",)),
    "tool_call": _with_block(blocks.draw_tools, ("tool",)),
    "document": _with_block(
        lambda s: blocks.draw_document(s, s.between(5, 10)),
        ("direct", "direct", "reversed", "unknown"),
        ("plain", "any"),
    ),
    "news": _with_block(
        lambda s: blocks.draw_news(s, s.between(2, 8)), ("direct", "direct", "direct", "reversed", "unknown")
    ),
    "joined": _joined,
    "mixed": _mixed,
    "told": _told,
    "correction": _correction,
    "demonstration": _demonstration,
    "drift": _drift,
    "ability": _free("ability"),
    "small_talk": _free("talk"),
    "copy": _free("copy"),
}  # fmt: skip
"""Every family of dialogues: (source, turns) -> scene."""

_FEW = {"reversed_few": ("reversed", _facts(1, 4, "reversed")), "unknown_few": ("unknown", _facts(1, 4, "unknown"))}


def make_dialogue(rng: random.Random, family: str, *, held_out: bool = False, turns: int = 1) -> Dialogue:
    """One dialogue of a family. With `held_out`, names and question wordings are those never seen in training."""
    name, make = _FEW[family] if family in _FEW else (family, FAMILIES[family])
    source = Source(rng, held_out, 0.0 if held_out else WILD)
    return make(source, turns).done(name)
