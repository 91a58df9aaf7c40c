"""What is to be baked: everything that can be wrong about it is found here, before any work is done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from jaxbake.bake.other import Other
from jaxbake.bake.others import Contexts, contexts_for, pins_for
from jaxbake.bakery.card import sha256
from jaxbake.config import BakeConfig, GenerateConfig, StimuliConfig
from jaxbake.data.chat import prefix_ids, template_hash
from jaxbake.data.stimuli import deduplicate, load_stimuli
from jaxbake.deltas.lora import init_delta
from jaxbake.errors import JaxbakeError
from jaxbake.files import AnyPath
from jaxbake.models.base import Base

Prompts = Sequence[tuple[str, Sequence[str]]]
"""Texts to bake, each with user turns to be asked behind it."""


@dataclass(frozen=True)
class Job:
    """A bake that is known to be possible.

    prompts: with the user turns that were given; generate: how many more the model is to write for each, or None.
    other: the model that teaches in the base's stead, or None. folder: None writes nothing.
    identity: what makes this bake this one and no other.
    """

    config: BakeConfig
    prompts: Prompts
    generate: GenerateConfig | None
    pins: Sequence[str]
    contexts: Contexts
    other: Other | None
    folder: AnyPath | None
    identity: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        return [text for text, _ in self.prompts]

    @property
    def digest(self) -> str:
        """What names the prompt, or several in order."""
        return _hash(self.texts)


def make_job(
    base: Base,
    prompt: str | None,
    prompts: Prompts | None,
    stimuli: Sequence[str] | StimuliConfig | None,
    config: BakeConfig,
    *,
    other: Other | None,
    pins: Sequence[str] | None,
    contexts: Contexts | None,
    folder: AnyPath | None,
    root: Path,
) -> Job:
    """The job that the arguments of `bake` describe. Raises JaxbakeError where it cannot be done."""
    pairs, generate = _prompts(base, prompt, prompts, stimuli, config, root)
    pins = pins_for(base, config, root) if pins is None else pins
    if contexts is None:
        contexts = contexts_for(base, max((text for text, _ in pairs), key=len), config, root)
    identity = _identity(base, pairs, generate, pins, contexts, config, other)
    return Job(config, pairs, generate, pins, contexts, other, folder, identity)


def _prompts(
    base: Base, prompt: str | None, prompts: Prompts | None, stimuli: Any, config: BakeConfig, root: Path
) -> tuple[list[tuple[str, list[str]]], Any]:
    """What is baked, each text with the user turns there already are; and how many more the model is to write for each
    (a GenerateConfig) or None."""
    if prompts is None:
        text = _check(base, prompt, config)
        given, generate = _given(stimuli, root)
        return [(text, given)], generate
    if prompt is not None:
        raise JaxbakeError("prompt: is given beside prompts; give one of them")
    common, generate = ([], None) if stimuli is None else _given(stimuli, root, needed=False)
    found = []
    for number, pair in enumerate(prompts):
        where = f"prompts[{number}]"
        if isinstance(pair, str) or len(pair) != 2 or isinstance(pair[1], str):
            raise JaxbakeError(f"{where}: must be a text and a list of its user turns, is {pair!r:.60}")
        try:
            turns = _given([*pair[1], *common], root, needed=generate is None)[0]
            found.append((_check(base, pair[0], config), turns))
        except JaxbakeError as error:
            raise JaxbakeError(f"{where}: {error}") from error
    if not found:
        raise JaxbakeError("prompts: there are none; give at least one text with its user turns")
    return found, generate


def _check(base: Base, prompt: str | None, config: BakeConfig) -> str:
    """The prompt, once prompt, model and settings are known to fit each other."""
    if base.tokenizer is None:
        raise JaxbakeError(f"{base.name}: has no tokenizer, so no prompt can be baked into it")
    if not isinstance(prompt, str) or not prompt.strip():
        raise JaxbakeError("prompt: is missing or empty; give the text to bake")
    length = len(prefix_ids(base.tokenizer, prompt, ""))
    if length >= base.config.max_positions:
        raise JaxbakeError(
            f"prompt: {length} tokens are longer than the model's context of {base.config.max_positions}; shorten it"
        )
    jax.eval_shape(lambda key: init_delta(key, base.config, config.lora), jax.random.key(0))  # rank and targets fit
    return prompt


def _given(stimuli: Any, root: Path, needed: bool = True) -> tuple[list[str], Any]:
    """Stimuli there already are, and how many the model is to write (a GenerateConfig) or None."""
    if stimuli is None or isinstance(stimuli, str):
        raise JaxbakeError("stimuli: give a list of user turns, or a StimuliConfig that says where they come from")
    if isinstance(stimuli, StimuliConfig):
        given = load_stimuli(stimuli, root)
        generate = stimuli.generate if stimuli.generate.count else None
    else:
        given, generate = list(stimuli), None
        if not all(isinstance(text, str) for text in given):
            raise JaxbakeError("stimuli: each must be a text, a user turn")
        given = deduplicate(given)
    if needed and not given and not generate:
        raise JaxbakeError("stimuli: there are none; give items, a file, a dataset, or generate.count")
    return given, generate


def _identity(
    base: Base, prompts: Prompts, generate, pins, contexts: Contexts, config: BakeConfig, other: Other | None
) -> dict[str, Any]:
    """What makes a bake this one and no other."""
    texts, turns = zip(*prompts, strict=True)
    given = list(turns) if len(prompts) > 1 else turns[0]
    return {
        "prompt": _hash(texts),
        "base": base.digest,
        "quantize": base.quantize,
        "template": template_hash(base.tokenizer),
        "stimuli": sha256(json.dumps(given)),
        "generate": asdict(generate) if generate else None,
        "pins": sha256(json.dumps(list(pins))),
        "contexts": sha256(json.dumps([[text, list(turns)] for text, turns in contexts])),
        "config": decisive(config),
        **({"teacher": other.digest} if other else {}),
    }


def _hash(texts: Sequence[str]) -> str:
    """What names a prompt, or several in order."""
    return sha256(texts[0]) if len(texts) == 1 else sha256(json.dumps(list(texts)))


def decisive(config: BakeConfig) -> dict[str, Any]:
    """The settings that the delta depends on."""
    settings = asdict(config)
    del settings["mesh"], settings["teacher"]["model"]  # of a teacher, its digest counts
    for name in ("checkpoint_every", "tensorboard", "teacher_device_gb", "teacher_host_gb", "teacher_disk_gb"):
        del settings["train"][name]
    for name in ("pin_stimuli", "contexts_file"):  # what they hold counts, not where
        del settings["retention"][name]
    return settings
