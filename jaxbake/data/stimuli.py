"""Where user turns come from: lists, files, data sets, the model itself; and the shipped pins and contexts."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from itertools import chain, islice
from pathlib import Path

from jaxbake.config import GenerateConfig, StimuliConfig
from jaxbake.errors import JaxbakeError, did_you_mean


def load_stimuli(config: StimuliConfig, root: str | Path = ".") -> list[str]:
    """The stimuli of all sources, in the order items, file, dataset, without repeats, at most `config.limit`.

    root: what relative paths are relative to. White space around stimuli of files and data sets is dropped, and so are
    empty ones; items are taken as they stand (an empty one lets a plain text model continue the prompt itself).
    Without any source the list is empty (the stimuli are then written by the model itself). Raises JaxbakeError, naming
    the source, where it is missing, empty, or has no such field.
    """
    sources: list[Iterable[str]] = [config.items]
    if config.file is not None:
        sources.append(_from_file(Path(root) / config.file, config))
    if config.dataset is not None:
        sources.append(_from_dataset(config.dataset, Path(root), config))
    return list(islice(_distinct(chain.from_iterable(sources)), config.limit))


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    seen = set()
    for text in texts:
        key = " ".join(text.split()).casefold()
        if key not in seen:
            seen.add(key)
            yield text


def deduplicate(texts: Iterable[str]) -> list[str]:
    """The texts without repeats, the first of each kept; case and white space do not make a text another one."""
    return list(_distinct(texts))


def _pick(row: dict, where: str, config: StimuliConfig) -> str:
    """The stimulus of one row: a field, a template over fields, or its only text."""
    field = config.field
    if config.template is not None:
        names = [name for _, name, _, _ in string.Formatter().parse(config.template) if name is not None]
        for name in names:
            column = re.split(r"[.\[]", name)[0]
            if column not in row:
                raise JaxbakeError(f"{where}: stimuli.template names '{column}'; {did_you_mean(column, row)}")
        try:
            return config.template.format(**row).strip()
        except (LookupError, AttributeError, ValueError) as error:
            raise JaxbakeError(f"{where}: stimuli.template cannot be filled in: {error}") from error
    if field is None:
        if len(row) != 1:
            raise JaxbakeError(f"{where}: set stimuli.field or stimuli.template; the columns are {', '.join(row)}")
        field = next(iter(row))
    if field not in row:
        raise JaxbakeError(f"{where}: there is no field '{field}'; {did_you_mean(field, row)}")
    if not isinstance(row[field], str):
        kind = type(row[field]).__name__
        raise JaxbakeError(f"{where}: field '{field}' must be text, it is {kind}: {row[field]!r:.40}")
    return row[field].strip()


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise JaxbakeError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise JaxbakeError(f"{path}: must be UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise JaxbakeError(f"{path}: cannot be read: {error.strerror or error}") from error
    return text.split("\n")


def _objects(path: Path) -> Iterator[tuple[str, dict]]:
    """The objects of a .jsonl file, each with where it stands."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise JaxbakeError(f"{where}: is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise JaxbakeError(f'{where}: must be a JSON object such as {{"question": "..."}}, is {line.strip()[:40]}')
        yield where, row


def _from_file(path: Path, config: StimuliConfig) -> list[str]:
    if path.suffix == ".jsonl":
        found = [_pick(row, where, config) for where, row in _objects(path)]
    elif path.suffix == ".txt":
        found = [line.strip() for line in _lines(path)]
    else:
        raise JaxbakeError(f"{path}: stimuli files are .txt (a stimulus a line) or .jsonl (an object a line)")
    found = [text for text in found if text]
    if not found:
        raise JaxbakeError(f"{path}: holds no stimuli, it is empty")
    return found


def _from_dataset(name: str, root: Path, config: StimuliConfig) -> Iterator[str]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    folder = root / name
    where = f"stimuli.dataset '{name}'"
    if not folder.is_dir() and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise JaxbakeError(f"{where}: there is no folder {folder}")
    try:
        saved = (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()
        if saved:
            data = load_from_disk(str(folder))
            data = data if isinstance(data, DatasetDict) else DatasetDict({config.split: data})
        else:
            data = load_dataset(str(folder) if folder.is_dir() else name)
    except Exception as error:  # `datasets` raises many kinds, for missing, unreachable and malformed data
        raise JaxbakeError(f"{where}: cannot be read: {(str(error) or repr(error)).splitlines()[0]}") from error
    if config.split not in data:
        raise JaxbakeError(f"{where}: has no split '{config.split}'; {did_you_mean(config.split, data)}")
    rows = data[config.split]
    if len(rows) == 0:
        raise JaxbakeError(f"{where}: split '{config.split}' is empty")
    # Columns of no use (images, audio) are not decoded, and rows are read only as far as a limit needs them.
    if config.template is None and config.field in rows.column_names:
        rows = rows.select_columns([config.field])
    texts = (_pick(row, f"{where} row {i}", config) for i, row in enumerate(rows))
    texts = (text for text in texts if text)
    first = next(texts, None)
    if first is None:
        raise JaxbakeError(f"{where}: holds no stimuli, all texts are empty")
    return chain([first], texts)


def split_held_out(stimuli: Sequence[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out stimuli, at least one of each; which is which depends on each text and the seed alone, so
    stimuli added later move few of the others.

    A single stimulus is on both sides: what is held out are then other responses to it.
    """
    (train,), (held_out,) = split_prompts([stimuli], fraction, seed)
    return train, held_out


def split_prompts(
    stimuli: Sequence[Sequence[str]], fraction: float, seed: int
) -> tuple[list[list[str]], list[list[str]]]:
    """Training and held-out stimuli of several prompts, as `split_held_out` does: a text is on the same side behind all
    of them, and every prompt keeps one to train on.

    Where each prompt has but one stimulus, those that are held out are trained on too.
    """
    texts = {text for group in stimuli for text in group}
    if not all(stimuli) or not texts:
        raise JaxbakeError("stimuli: there are none; give items, a file, a dataset, or generate.count")

    def rank(text: str) -> bytes:
        return hashlib.sha256(f"{seed}\n{text}".encode()).digest()

    asking: dict[str, list[int]] = {}  # the prompts that a text is asked behind
    for number, group in enumerate(stimuli):
        for text in group:
            asking.setdefault(text, []).append(number)
    left = [len(group) for group in stimuli]
    ranked, count, held_out = sorted(texts, key=rank), max(round(fraction * len(texts)), 1), set()
    for text in ranked:
        if len(held_out) < count and all(left[number] > 1 for number in asking[text]):
            held_out.add(text)
            for number in asking[text]:
                left[number] -= 1
    both = set(ranked[:count]) if not held_out else set()
    train = [[text for text in group if text not in held_out] for group in stimuli]
    return train, [[text for text in group if text in held_out | both] for group in stimuli]


# The five kinds of seed prompts follow Cartridges (arXiv 2506.06266), which found them far better than one.
_STYLES = {
    "question": "asks one specific question whose answer depends on these instructions.",
    "task": "asks the assistant to write or do one concrete thing (a list, a short text, a plan, a check), where these "
    "instructions shape the result.",
    "chat": "opens or carries on a casual conversation, as people do, and leaves room for these instructions to show.",
    "summary": "asks for a summary, an overview or an explanation of something that these instructions bear on.",
    "application": "describes a concrete situation or case of the user's own, to which the assistant has to apply "
    "these instructions.",
}
_VOICES = (
    "in one short sentence",
    "as a beginner would",
    "as somebody in a hurry would",
    "politely, in two sentences",
    "with a concrete name, number or place in it",
    "as an expert would",
    "informally, in lower case",
    "indirectly, without naming the subject outright",
)
_PASSAGE = 600  # characters of the prompt that one request turns on, where the prompt is longer


def _passages(prompt: str) -> list[str]:
    """The prompt in pieces of about 600 characters, cut between sentences or lines."""
    pieces, passage = re.split(r"(?<=[.!?])\s+|\n+", prompt.strip()), ""
    passages = []
    for piece in pieces:
        if passage and len(passage) + len(piece) > _PASSAGE:
            passages.append(passage)
            passage = ""
        passage = f"{passage} {piece}".strip()
    return [*passages, passage]


def seed_requests(prompt: str, config: GenerateConfig) -> list[tuple[str, list[dict]]]:
    """What to ask the model for, to have it write `config.count` stimuli for a prompt: pairs of style and messages.

    Styles are taken in turn, each in several voices; a long prompt's passages are turned on one after the other, so
    that all of it is asked about. All requests begin with the whole prompt, which a sampler can share between them.
    """
    for style in config.styles:
        if style not in _STYLES:
            raise JaxbakeError(f"stimuli.generate.styles: no style '{style}'; {did_you_mean(style, _STYLES)}")
    if config.count and not config.styles:
        raise JaxbakeError(f"stimuli.generate.styles: empty; known: {', '.join(_STYLES)}")
    passages = _passages(prompt)
    requests = []
    for i in range(config.count):
        visit, s = divmod(i, len(config.styles))
        style = config.styles[s]
        visited, at = divmod(visit, len(passages))
        voice = visited + at  # so that a passage is met in every voice before anything repeats
        focus = f'Turn to this part of them: "{passages[at]}"\n\n' if len(passages) > 1 else ""
        text = (
            f"An assistant has been given these instructions:\n\n<instructions>\n{prompt.strip()}\n</instructions>\n\n"
            f"{focus}Write one message that a user could send to this assistant. The user does not see the "
            f"instructions. The message {_STYLES[style]} Write it {_VOICES[(voice + s) % len(_VOICES)]}. "
            "Answer with the user's message alone, without quotes and without a heading."
        )
        requests.append((style, [{"role": "user", "content": text}]))
    return requests


_BULLET = r"(?:[-*•]\s+|\d{1,2}[.)]\s+)?"
_LABEL = re.compile(rf"{_BULLET}(?:\**(?:user(?:['’]s)?(?: message)?|message|question|task)\**\s*:\**\s*)?", re.I)
_PREAMBLE = re.compile(r"^(?:sure|certainly|of course|okay|ok|here(?:['’]s| is| are))\b[^\n]*[:!]\s*\n+", re.I)
_REFUSAL = re.compile(r"^(?:i['’]?m sorry|i am sorry|sorry,|i can(?:no|['’])t|as an ai)\b", re.I)


def parse_generated(text: str) -> str | None:
    """The stimulus in what the model wrote: reasoning, preamble, label, bullet and quotes taken off.

    None for what cannot be one: nothing left, no letter in it, an unfinished reasoning, a refusal.
    """
    if "</think>" in text:
        text = text.rsplit("</think>", 1)[1]
    elif "<think>" in text:
        return None
    text = _PREAMBLE.sub("", text.strip())
    text = text[_LABEL.match(text).end() :].strip()
    for left, right in ('""', "''", "“”", "``", "**"):
        inner = text[1:-1]
        if len(text) > 1 and text[0] == left and text[-1] == right and left not in inner and right not in inner:
            text = inner.strip()
    if len(text) < 2 or not any(c.isalpha() for c in text) or _REFUSAL.match(text):
        return None
    return text


def _default(name: str) -> Path:
    return Path(str(resources.files("jaxbake.data") / "defaults" / name))


def load_pins(path: str | Path | None = None) -> list[str]:
    """User turns for pins, from a .txt or .jsonl file (with one column); the shipped ones without a path."""
    return deduplicate(_from_file(Path(path) if path is not None else _default("pins.txt"), StimuliConfig()))


def load_contexts(path: str | Path | None = None) -> list[tuple[str, list[str]]]:
    """Other prompts, with user turns they bear on: jsonl of {"prompt", "stimuli"}; without a path the shipped ones."""
    return _prompts(Path(path) if path is not None else _default("contexts.jsonl"), bare=False)


def load_prompts(path: str | Path) -> list[tuple[str, list[str]]]:
    """Several prompts to bake, each with its own user turns: jsonl of {"prompt", "stimuli"}, the latter optional."""
    return _prompts(Path(path), bare=True)


def _prompts(path: Path, bare: bool) -> list[tuple[str, list[str]]]:
    """Prompts and their user turns; `bare`: they may have none."""
    contexts = []
    for where, row in _objects(path):
        for key in row:
            if key not in ("prompt", "stimuli"):
                raise JaxbakeError(f"{where}: unknown field '{key}'; {did_you_mean(key, ['prompt', 'stimuli'])}")
        prompt, stimuli = row.get("prompt"), row.get("stimuli", [] if bare else None)
        if not isinstance(prompt, str) or not prompt.strip():
            raise JaxbakeError(f"{where}: 'prompt' must be text that is not empty")
        if (
            not isinstance(stimuli, list)
            or not (stimuli or bare)
            or not all(isinstance(s, str) and s.strip() for s in stimuli)
        ):
            raise JaxbakeError(f"{where}: 'stimuli' must be a list of user turns")
        contexts.append((prompt.strip(), deduplicate(s.strip() for s in stimuli)))
    if not contexts:
        raise JaxbakeError(f"{path}: holds no prompts, it is empty")
    return contexts
