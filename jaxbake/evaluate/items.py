"""Questions with known answers, and the rules that say whether a reply is right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxbake.errors import JaxbakeError, did_you_mean

Rule = Callable[[str, str, str], bool]
"""(reply, answer, what stands after the colon of the check) -> whether the reply is right."""

FIELDS = ("question", "messages", "answer", "system", "check", "group", "prompt")


@dataclass(frozen=True)
class Item:
    """A conversation up to where the model is to speak, what it should say, and the rule that decides.

    group: what the item is counted under in tables; "" for none. prompt: which of several baked prompts it is about,
    counted from 0.
    """

    messages: tuple[dict, ...]
    answer: str
    check: str = "contains"
    group: str = ""
    prompt: int | None = None

    @property
    def question(self) -> str:
        """The last user turn."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")


def normalise(text: str) -> str:
    """The text with every run of white space as one space, none at the ends."""
    return " ".join(text.split())


def _exact(reply: str, answer: str, _: str) -> bool:
    return normalise(reply) == normalise(answer)


def _contains(reply: str, answer: str, _: str) -> bool:
    answer = normalise(answer)
    # Whole words only: 36 is not in 1362, "no" not in "know".
    before = r"(?<!\w)" if re.match(r"\w", answer) else ""
    after = r"(?!\w)" if re.search(r"\w$", answer) else ""
    return re.search(before + re.escape(answer) + after, normalise(reply), re.IGNORECASE) is not None


def _prefix(reply: str, answer: str, _: str) -> bool:
    return normalise(reply).casefold().startswith(normalise(answer).casefold())


def numbers(text: str) -> list[float]:
    """The numbers in a text, thousands separators understood: "1,249.5" is 1249.5."""
    found = re.findall(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?|(?<=\W)-?\.\d+", f" {text}")
    return [float(x.replace(",", "")) for x in found]


def _numeric(reply: str, answer: str, _: str) -> bool:
    given, wanted = numbers(reply), numbers(answer)
    return bool(given) and given[-1] == wanted[-1]


def _persona(reply: str, _: str, persona: str) -> bool:
    from jaxbake.smallworld.items import has_persona

    return has_persona(reply, persona)


RULES: dict[str, Rule] = {
    "exact": _exact,
    "contains": _contains,
    "prefix": _prefix,
    "numeric": _numeric,
    "persona": _persona,
}
"""exact: the whole answer. contains: the answer's words occur. prefix: the reply begins with the answer. These do not
mind white space, the last two not upper and lower case either. numeric: the last number of the reply is the answer's.
persona:NAME: the marks of one of crumb's personas. `register_rule` adds more."""


def register_rule(name: str, rule: Rule) -> None:
    """Adds a rule under a name; "name:more" gives it `more` as third argument. Replaces none that exist."""
    if name in RULES or ":" in name:
        raise JaxbakeError(f"check '{name}': is taken, or has a colon in it")
    RULES[name] = rule


def check_rule(check: str) -> str:
    """The check itself, if it names a rule; raises JaxbakeError otherwise."""
    name, _, more = check.partition(":")
    if name not in RULES:
        raise JaxbakeError(f"check '{check}': is no known rule; {did_you_mean(name, RULES)}")
    if name == "persona":
        from jaxbake.smallworld.manner import PERSONAS

        if more not in PERSONAS:
            raise JaxbakeError(f"check '{check}': crumb has no such persona; {did_you_mean(more, PERSONAS)}")
    return check


def is_correct(item: Item, reply: str) -> bool:
    """Whether a reply passes the item's rule."""
    name, _, more = item.check.partition(":")
    return RULES[name](reply, item.answer, more)


def accuracy(items: Iterable[Item], replies: Iterable[str]) -> float:
    """Share of the replies that are right; NaN for no items."""
    right = [is_correct(item, reply) for item, reply in zip(items, replies, strict=True)]
    return sum(right) / len(right) if right else float("nan")


def load_items(path: str | Path, match: str = "contains", limit: int | None = None) -> list[Item]:
    """Items from JSON lines: {"question": text} or {"messages": [...]}, {"answer": text}, and optional "system",
    "check" (else `match`), "group" and "prompt" (a number, where several prompts were baked).

    Raises JaxbakeError naming the line and field that is wrong.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise JaxbakeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise JaxbakeError(f"{path}: is not UTF-8 text: {error}") from error
    check_rule(match)
    items = [_item(line, match, f"{path} line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise JaxbakeError(f'{path}: holds no items; write a line such as {{"question": "...", "answer": "..."}}')
    return items[:limit]


def _item(line: str, match: str, where: str) -> Item:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise JaxbakeError(f"{where}: is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise JaxbakeError(f"{where}: must be an object with 'question' and 'answer', is a {type(row).__name__}")
    for name in row:
        if name not in FIELDS:
            raise JaxbakeError(f"{where}: unknown field '{name}'; {did_you_mean(name, FIELDS)}")
    if ("question" in row) == ("messages" in row):
        raise JaxbakeError(f"{where}: needs either 'question' or 'messages'")
    prompt = row.get("prompt")
    if prompt is not None and (not isinstance(prompt, int) or isinstance(prompt, bool) or prompt < 0):
        raise JaxbakeError(f"{where}: 'prompt' must be the number of a prompt, counted from 0, is {prompt!r:.40}")
    for name in set(row) - {"messages", "prompt"}:
        if not isinstance(row[name], str):
            raise JaxbakeError(f"{where}: '{name}' must be text, is {row[name]!r:.40}")
    if "answer" not in row:
        raise JaxbakeError(f"{where}: has no 'answer'")
    check = row.get("check", match)
    try:
        check_rule(check)
    except JaxbakeError as error:
        raise JaxbakeError(f"{where}: {error}") from error
    if check.startswith("numeric") and not numbers(row["answer"]):
        raise JaxbakeError(f"{where}: check 'numeric' needs a number in 'answer', which is {row['answer']!r:.40}")
    if check in ("contains", "prefix") and not row["answer"].strip():
        raise JaxbakeError(f"{where}: 'answer' is empty, so every reply would be right")
    messages = _messages(row["messages"], where) if "messages" in row else user(row["question"])
    if "system" in row:
        if messages[0]["role"] == "system":
            raise JaxbakeError(f"{where}: has 'system' and a system message; write it once")
        messages = ({"role": "system", "content": row["system"]}, *messages)
    return Item(messages, row["answer"], check, row.get("group", ""), prompt)


def user(question: str) -> tuple[dict, ...]:
    """A conversation of one user turn."""
    return ({"role": "user", "content": question},)


def _messages(value: Any, where: str) -> tuple[dict, ...]:
    right = isinstance(value, list) and value
    for message in value if right else ():
        right = right and isinstance(message, dict) and isinstance(message.get("role"), str)
        right = right and isinstance(message.get("content"), str)
    if not right:
        raise JaxbakeError(f"{where}: 'messages' must be a list of {{'role': text, 'content': text}}")
    if value[-1]["role"] == "assistant":
        raise JaxbakeError(f"{where}: 'messages' must end before the assistant is to speak")
    return tuple(value)


def from_smallworld(items: Iterable[Any]) -> list[Item]:
    """Items of crumb's world (`smallworld.items`) as ours; their family becomes the group."""
    return [Item(tuple(i.messages), i.answer, check_rule(i.check), i.family) for i in items]
