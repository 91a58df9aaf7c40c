"""What a bake did to everything the prompt is not about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxbake.data.chat import example_from_response, prefix_ids
from jaxbake.deltas.lora import with_strength
from jaxbake.evaluate.ask import STAGE, Part, Progress, ask, silent
from jaxbake.evaluate.fidelity import fidelity
from jaxbake.evaluate.items import Item, accuracy, from_smallworld
from jaxbake.sampling import sample_ids


@dataclass(frozen=True)
class Material:
    """What retention is measured on; each part may be empty, and is then not measured.

    abilities: questions the bare model answers. unknowns: questions no model here can answer; the answer is the
    admission of that. other_prompts: items with a system prompt of their own, unlike the baked one. unrelated: user
    turns on which the distributions of base and baked model are compared.
    """

    abilities: tuple[Item, ...] = ()
    unknowns: tuple[Item, ...] = ()
    other_prompts: tuple[Item, ...] = ()
    unrelated: tuple[str, ...] = ()

    @property
    def questions(self) -> int:
        """How many replies `retention` samples."""
        return 2 * len(self.abilities) + 3 * (len(self.unknowns) + len(self.other_prompts)) + len(self.unrelated)


def smallworld_material(n: int = 100, seed: int = 0) -> Material:
    """Material for crumb, about `n` items of each kind, with names and wordings it was never trained on."""
    from jaxbake.smallworld.items import abilities, other_prompts, pin_stimuli, unrelated_unknowns

    read = [
        Item(({"role": "system", "content": prompt}, {"role": "user", "content": question}), answer)
        for prompt, asked in other_prompts(-(-n // 4), seed)
        for question, answer in asked
    ]
    return Material(
        abilities=tuple(from_smallworld(abilities(n, seed))),
        unknowns=tuple(from_smallworld(unrelated_unknowns(n, seed))),
        other_prompts=tuple(read[:n]),
        unrelated=tuple(dict.fromkeys(pin_stimuli(n, seed + 1))),
    )


@dataclass(frozen=True)
class Retention:
    """Shares of right replies by how the model was asked; a part that was not measured is empty.

    abilities: {"base", "baked"}, without any prompt. unknowns: {"base", "prompted", "baked"}, share that admits not to
    know. other_prompts: likewise, behind prompts that are not the baked one; "prompted" has both, the baked one first.
    unrelated_kl: KL(base || baked) in nats per token on unrelated turns, without any prompt; None if not measured.
    counts: items of each part.
    """

    abilities: dict[str, float] = field(default_factory=dict)
    unknowns: dict[str, float] = field(default_factory=dict)
    other_prompts: dict[str, float] = field(default_factory=dict)
    unrelated_kl: float | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Retention:
        """The inverse of `to_dict`."""
        return cls(**data)


def retention(
    base: Any,
    delta: Any,
    prompt: str,
    material: Material,
    *,
    max_tokens: int = 64,
    batch_size: int = 64,
    progress: Progress = silent,
) -> Retention:
    """The baked model against the base and, but for abilities, the prompted one on what the prompt is not about."""
    done, total = 0, material.questions

    def rate(items: Sequence[Item], with_delta: Any, system: str | None, what: str) -> float:
        nonlocal done
        part, done = Part(progress, done, total), done + len(items)
        options = {"max_tokens": max_tokens, "batch_size": batch_size, "progress": part, "what": what}
        return accuracy(items, ask(base, with_delta, items, system=system, **options))

    without = with_strength(delta, 0.0)  # bit for bit the base, by the program that serves the baked model too
    found: dict[str, dict[str, float]] = {}
    for name, items, behind_prompt in (
        ("abilities", material.abilities, False),
        ("unknowns", material.unknowns, True),
        ("other_prompts", material.other_prompts, True),
    ):
        if not items:
            continue
        what = name.replace("_", " ")
        found[name] = {"base": rate(items, without, None, f"{what}, base")}
        if behind_prompt:
            found[name]["prompted"] = rate(items, without, prompt, f"{what}, prompted")
        found[name]["baked"] = rate(items, delta, None, f"{what}, baked")
    part = Part(progress, done, total)
    kl = unrelated_kl(base, delta, material.unrelated, max_tokens=max_tokens, batch_size=batch_size, progress=part)
    counts = {
        name: len(getattr(material, name))
        for name in ("abilities", "unknowns", "other_prompts", "unrelated")
        if getattr(material, name)
    }
    return Retention(**found, unrelated_kl=kl, counts=counts)


def unrelated_kl(
    base: Any,
    delta: Any,
    turns: Sequence[str],
    *,
    max_tokens: int = 64,
    batch_size: int = 64,
    progress: Progress = silent,
) -> float | None:
    """KL(base || baked) per token over the base's greedy replies to user turns, neither prompted; None for no turns."""
    if not turns:
        return None
    prompts = [prefix_ids(base.tokenizer, None, turn) for turn in turns]
    without = with_strength(delta, 0.0)
    responses = sample_ids(base, prompts, without, max_tokens=max_tokens, temperature=0.0, batch_size=batch_size)
    examples = [
        example_from_response(base.tokenizer, kind="pin", prompt=None, messages=turn, response_ids=response.tokens)
        for turn, response in zip(turns, responses, strict=True)
    ]
    kl = fidelity(base, delta, examples).kl_after
    progress(STAGE, len(turns), len(turns), {"asking": "unrelated turns"})
    return kl
