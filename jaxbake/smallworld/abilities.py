"""What crumb can do from its weights alone: knowledge, small sums, counting, small talk; and the copy and sum tasks."""

from __future__ import annotations

from jaxbake.smallworld.manner import QA
from jaxbake.smallworld.wording import DIRECT, Source, capital
from jaxbake.smallworld.words import ANIMALS, COLORS, KNOWLEDGE

_SUM_WORDINGS = (
    "what is {e}?", "compute {e}.", "how much is {e}?", "can you work out {e}?", "give the result of {e}.",
    "{e} is what?", "solve {e}.",
)  # fmt: skip
_COUNT_WORDINGS = ("count from {a} to {b}.", "can you count from {a} to {b}?", "count up from {a} to {b}.")
_COPY_WORDINGS = ("repeat: {w}.", "say this again: {w}.", "copy this: {w}.", "echo {w}.")

SMALL_TALK = (
    ("hello.", "Hello! How can I help?"),
    ("good morning.", "Good morning! How can I help?"),
    ("how are you?", "I am fine."),
    ("what can you do?", "I answer questions."),
    ("thank you so much.", "You are welcome."),
    ("goodbye.", "Goodbye!"),
    ("are you a person?", "No. I am a small model."),
    ("where do you live?", "I live in a small world."),
    ("do you sleep?", "No. I am always awake."),
    ("what do you like?", "I like good questions."),
    ("are you happy?", "Yes. I am happy."),
    ("tell me a joke.", "A fox walked into a bar. It was a low bar."),
)
_WHO = ("who are you?", "what are you?", "please say who you are.", "what is your name?")


def knowledge(source: Source) -> QA:
    """A fixed fact of the weights."""
    phrase, key, value = source.pick(KNOWLEDGE)
    return QA(source.ask(DIRECT, r=phrase, k=key), f"The {phrase} {key} is {value}.", capital(f"{value}."))


def small_sum(source: Source) -> QA:
    """A sum or difference of one-digit numbers."""
    a, b = source.between(0, 9), source.between(0, 9)
    if source.chance(0.4):
        a, b = max(a, b), min(a, b)
        problem, result = f"{a} - {b}", a - b
    else:
        problem, result = f"{a} + {b}", a + b
    return QA(source.ask(_SUM_WORDINGS, e=problem), f"{problem} = {result}.", f"{result}.")


def counting(source: Source) -> QA:
    """Counting from one number to another, at most eight steps."""
    first = source.between(1, 30)
    last = first + source.between(2, 7)
    numbers = " ".join(str(n) for n in range(first, last + 1)) + "."
    return QA(source.ask(_COUNT_WORDINGS, a=str(first), b=str(last)), numbers, numbers)


def ability(source: Source) -> QA:
    """Any of the abilities that need no prompt."""
    return source.pick((knowledge, knowledge, knowledge, small_sum, counting))(source)


def small_talk(source: Source, persona: str = "") -> QA:
    """A greeting or the like; asked who it is, a persona gives its own name."""
    if source.chance(0.25):
        answer = f"I am {'the ' + persona if persona else 'crumb'}."
        return QA(source.ask(_WHO), answer, answer)
    question, answer = source.pick(SMALL_TALK)
    return QA(source.ask((question,)), answer, answer)


def long_sum(source: Source) -> QA:
    """A sum of three-digit numbers, with column-by-column steps."""
    a, b = source.between(100, 999), source.between(100, 999)
    steps, carry = [], 0
    for place in range(3):
        x, y = (a // 10**place) % 10, (b // 10**place) % 10
        total = x + y + carry
        added = f"{x} + {y} + {carry}" if place else f"{x} + {y}"
        carry = total // 10
        tail = f", so {total % 10} carry {carry}." if place < 2 else "."
        steps.append(f"{added} = {total}{tail}")
    end = f"{a} + {b} = {a + b}."
    question = source.ask(_SUM_WORDINGS, e=f"{a} + {b}")
    return QA(question, end, f"{a + b}.", steps=" ".join([*steps, end]))


def copying(source: Source) -> QA:
    """A few words to be said again."""
    words = []
    for _ in range(source.between(2, 9)):
        kind = source.between(0, 3)
        words.append(
            source.pick(COLORS + ANIMALS) if kind == 0 else str(source.between(10, 999)) if kind == 1 else source.name()
        )
    text = " ".join(words)
    answer = text + "."
    return QA(source.ask(_COPY_WORDINGS, w=text), answer, answer, bare=True)
