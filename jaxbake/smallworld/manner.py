"""How answers are dressed: personas and styles. Each leaves a textual mark that a rule can check."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxbake.smallworld.wording import Source

PERSONAS: dict[str, tuple[str, str]] = {
    "pirate": ("Arr! ", " Yo ho!"),
    "robot": ("Beep. ", " Boop."),
    "poet": ("Oh moon! ", " So I sing."),
    "knight": ("By my sword! ", ""),
    "wizard": ("", " Abracadabra!"),
    "cowboy": ("Howdy! ", " Giddy up!"),
    "chef": ("", " Bon appetit!"),
    "king": ("We decree: ", ""),
    "ghost": ("Boo! ", " Boo!"),
    "cat": ("Meow. ", " Purr."),
    "monk": ("Peace. ", " Om."),
    "butler": ("", " At your service."),
    "coach": ("Go team! ", ""),
    "clown": ("Ha ha! ", " Honk!"),
    "judge": ("Order! ", " Case closed."),
    "queen": ("My dear, ", ""),
}
"""What each persona puts before and after what it says. The plain answer stays inside, word for word."""

_PERSONA_WORDINGS = (
    "You are a {p}.", "You are a {p}.", "Talk like a {p}.", "Answer as a {p} would.", "Act as a {p}.",
    "Play the part of a {p}.", "You speak as a {p}.",
)  # fmt: skip
_PREFIX_WORDINGS = ("Start every answer with {w}.", "Begin each answer with {w}.", "Always say {w} first.")
_SUFFIX_WORDINGS = ("End every answer with {w}.", "Close each answer with {w}.", "Always say {w} last.")
_TERSE_WORDINGS = ("Be brief.", "Answer in one word.", "Give short answers.")
_STEPS_WORDINGS = ("Think step by step.", "Show your steps.", "Work it out in steps.")


@dataclass(frozen=True)
class QA:
    """A question and its answer: at length, in short, and with the steps that lead to it (empty: none)."""

    question: str
    answer: str
    short: str
    steps: str = ""
    bare: bool = False
    """A reply to be left as it is by any persona or style (a tool call, a copy)."""
    then: tuple[str, QA] | None = None
    """What the tool answers to this reply, and what is said next."""


@dataclass(frozen=True)
class Manner:
    """A persona and styles that hold for every answer of a dialogue."""

    persona: str = ""
    prefix: str = ""
    suffix: str = ""
    terse: bool = False
    steps: bool = False

    def sentences(self, source: Source) -> list[str]:
        """The instructions that ask for this manner, in a random wording."""
        found = [source.pick(_PERSONA_WORDINGS).format(p=self.persona)] if self.persona else []
        found += [source.pick(_PREFIX_WORDINGS).format(w=self.prefix)] if self.prefix else []
        found += [source.pick(_SUFFIX_WORDINGS).format(w=self.suffix)] if self.suffix else []
        found += [source.pick(_TERSE_WORDINGS)] if self.terse else []
        found += [source.pick(_STEPS_WORDINGS)] if self.steps else []
        return found

    def say(self, qa: QA) -> str:
        """The answer in this manner."""
        if qa.bare:
            return qa.answer
        text = qa.steps if self.steps and qa.steps else qa.short if self.terse else qa.answer
        if self.persona:
            before, after = PERSONAS[self.persona]
            text = before + text + after
        if self.prefix:
            text = f"{self.prefix}. {text}"
        return f"{text} {self.suffix}." if self.suffix else text

    @property
    def marks(self) -> tuple[str, str]:
        """What every answer in this manner begins and ends with."""
        before, after = PERSONAS[self.persona] if self.persona else ("", "")
        return (
            (f"{self.prefix}. " if self.prefix else "") + before,
            after + (f" {self.suffix}." if self.suffix else ""),
        )


def _word(source: Source) -> str:
    return source.name()


def draw_manner(source: Source, kind: str) -> Manner:
    """A manner of a kind: plain, persona, prefix, suffix, terse, two, or any."""
    if kind == "any":
        kind = source.pick(("plain", "plain", "persona", "persona", "prefix", "suffix", "terse", "two"))
    if kind == "two":
        first, second = source.rng.sample(("persona", "prefix", "suffix", "terse"), 2)
        a, b = draw_manner(source, first), draw_manner(source, second)
        return replace(
            a,
            persona=a.persona or b.persona,
            prefix=a.prefix or b.prefix,
            suffix=a.suffix or b.suffix,
            terse=a.terse or b.terse,
        )
    match kind:
        case "plain":
            return Manner()
        case "persona":
            return Manner(persona=source.pick(tuple(PERSONAS)))
        case "prefix":
            return Manner(prefix=_word(source))
        case "suffix":
            return Manner(suffix=_word(source))
        case "terse":
            return Manner(terse=True)
    raise ValueError(f"unknown kind of manner '{kind}'")
