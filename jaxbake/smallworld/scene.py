"""A dialogue being made: what holds in it, what has been said, and what can be asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxbake.smallworld import abilities, blocks
from jaxbake.smallworld.blocks import Block, Facts, Policy, Tools
from jaxbake.smallworld.manner import QA, Manner
from jaxbake.smallworld.wording import Source

Message = dict[str, str]


@dataclass(frozen=True)
class Dialogue:
    """Messages with roles; `graded` are the indices of the assistant turns that are learned or scored."""

    family: str
    messages: tuple[Message, ...]
    graded: tuple[int, ...]
    manner: Manner = Manner()


@dataclass
class Scene:
    """A dialogue being made: what holds in it (manner, blocks), and what has been said."""

    source: Source
    manner: Manner = Manner()
    blocks: list[Block] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    graded: list[int] = field(default_factory=list)

    @property
    def facts(self) -> list[Facts]:
        return [b for b in self.blocks if isinstance(b, Facts)]

    def system(self, text: str) -> None:
        self.messages.append({"role": "system", "content": text})

    def user(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def assistant(self, text: str, graded: bool = True) -> None:
        if graded:
            self.graded.append(len(self.messages))
        self.messages.append({"role": "assistant", "content": text})

    def turn(self, qa: QA, graded: bool = True) -> None:
        """One question and its answer, through a tool where the answer calls one."""
        self.user(qa.question)
        self.assistant(self.manner.say(qa), graded)
        if qa.then:
            result, reply = qa.then
            self.messages.append({"role": "tool", "content": result})
            self.assistant(self.manner.say(reply), graded)

    def ask(self, kind: str) -> QA:
        """A question of a kind; falls back on a direct or unknown one where the prompt offers none of the kind."""
        source, facts = self.source, self.facts
        found: QA | None = None
        if kind in ("direct", "reversed", "two_hop") and facts:
            block = source.pick(facts)
            if kind == "reversed":
                found = blocks.ask_reversed(source, block, [b for b in facts if b is not block])
            elif kind == "two_hop":
                found = blocks.ask_two_hop(source, block)
            found = found or blocks.ask_direct(source, block)
        elif kind == "policy":
            found = blocks.ask_policy(source, next(b for b in self.blocks if isinstance(b, Policy)))
        elif kind == "tool":
            found = blocks.ask_tools(source, next(b for b in self.blocks if isinstance(b, Tools)))
        elif kind in _FREE:
            found = _FREE[kind](source)
        elif kind == "talk":
            found = abilities.small_talk(source, self.manner.persona)
        return found or blocks.ask_unknown(source, facts)

    def kinds(self) -> list[str]:
        """Kinds of questions that make sense here, by weight."""
        found = ["ability", "talk", "unknown"]
        for block in self.blocks:
            if isinstance(block, Facts):
                found += ["direct"] * 5 + ["reversed"] * 3 + ["unknown"] * 3 + ["two_hop"]
            elif isinstance(block, Policy):
                found += ["policy"] * 7
            else:
                found += ["tool"] * 6
        return found

    def done(self, family: str) -> Dialogue:
        return Dialogue(family, tuple(self.messages), tuple(self.graded), self.manner)


_FREE: dict[str, Callable[[Source], QA]] = {
    "ability": abilities.ability,
    "long_sum": abilities.long_sum,
    "copy": abilities.copying,
}


def prompt_text(source: Source, manner: Manner, parts: list[Block]) -> str:
    """One prompt: the manner's sentences and the blocks, in either order."""
    how = " ".join(manner.sentences(source))
    texts = [b.text for b in parts]
    texts = texts if not how else [*texts, how] if source.chance(0.3) else [how, *texts]
    return source.pick((" ", " ", "\n", "\n\n")).join(texts)
