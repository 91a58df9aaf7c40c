"""What a bake is to leave alone: user turns for pins, and other prompts with their turns for context rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxbake.config import BakeConfig
from jaxbake.data.chat import prefix_ids
from jaxbake.data.stimuli import load_contexts, load_pins
from jaxbake.models.base import Base
from jaxbake.smallworld import CRUMB
from jaxbake.smallworld.items import context_prompts, pin_stimuli

Contexts = Sequence[tuple[str, Sequence[str]]]

_CRUMBS = 600  # turns, and prompts, drawn for crumb


def is_crumb(base: Base) -> bool:
    """Whether this is the model that ships with jaxbake, which makes nothing of plain English."""
    return _is_crumb(base.folder)


def _is_crumb(folder: Path) -> bool:
    return folder.resolve() == CRUMB.resolve()


def default_contexts(folder: Path) -> list[tuple[str, str]]:
    """Shipped prompts, each with each of its user turns, in the language that the folder's model knows."""
    contexts = context_prompts(_CRUMBS // 4) if _is_crumb(folder) else load_contexts()
    return [(text, turn) for text, turns in contexts for turn in turns]


def pins_for(base: Base, config: BakeConfig, root: Path) -> Sequence[str]:
    """Unrelated user turns: those of the recipe's file, else shipped ones in the language that the model knows."""
    if not config.retention.pins:
        return []
    if config.retention.pin_stimuli is not None:
        return load_pins(root / config.retention.pin_stimuli)
    return pin_stimuli(_CRUMBS) if is_crumb(base) else load_pins()


def contexts_for(base: Base, prompt: str, config: BakeConfig, root: Path) -> Contexts:
    """Other prompts with their turns: those of the recipe's file, else the shipped ones that leave room for the prompt
    and a response in the model's context."""
    if not config.retention.contexts:
        return []
    if config.retention.contexts_file is not None:
        return load_contexts(root / config.retention.contexts_file)
    contexts = context_prompts(_CRUMBS) if is_crumb(base) else load_contexts()
    room = base.config.max_positions - config.sampling.max_tokens - len(prefix_ids(base.tokenizer, prompt, ""))
    longest = {text: max(turns, key=len) for text, turns in contexts}
    return [(text, turns) for text, turns in contexts if len(prefix_ids(base.tokenizer, text, longest[text])) < room]
