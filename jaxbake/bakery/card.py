"""The card of a bake: all that is needed to know what it is and to repeat it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from jaxbake.data.chat import has_template, template_hash
from jaxbake.deltas.lora import Delta, delta_digest
from jaxbake.errors import JaxbakeError, did_you_mean
from jaxbake.files import AnyPath, as_path, read_json, write_whole

FILE = "card.json"
PACKAGES = ("jaxbake", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


@dataclass(frozen=True)
class Card:
    """What was baked, into which base, how, and what came of it; plain JSON values only.

    base, base_digest: the base as the user named it, and the sha256 of its config and weights.
    quantize: "int8" or "int4" where the base's linear layers were held so while the delta was trained.
    prompt, prompt_sha256, template_sha256: the baked text, its hash and that of the base's chat template. Of several
      prompts there is the hash alone, of all in order.
    teacher, teacher_digest: another model that was imitated, as the user named it, and its digest.
    lora: the delta's own settings. config: the whole recipe or bake settings. seeds: every seed by name.
    parent_digest: digest of the delta this one was baked on top of. delta_digest: this delta's.
    environment: where it was made (`hosts.environment`). resumes: the runs that went on from an earlier one's work, as
      `runs.json` has them: "bitwise" in an environment that never changed, otherwise "numerical", naming what changed.
    metrics: the summary of the bake; numbers that are not finite are kept as null. created: UTC, ISO 8601.
    """

    name: str
    base: str
    base_digest: str
    delta_digest: str
    lora: dict[str, Any]
    prompt: str | None = None
    prompt_sha256: str | None = None
    template_sha256: str | None = None
    config: dict[str, Any] | None = None
    seeds: dict[str, Any] | None = None
    parent_digest: str | None = None
    quantize: str | None = None
    teacher: str | None = None
    teacher_digest: str | None = None
    metrics: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    resumes: list[Any] | None = None
    created: str | None = None

    def __post_init__(self):
        for field in fields(self):
            value = _plain(getattr(self, field.name), field.name)
            kind, optional = _TYPES[field.name]
            if not (isinstance(value, kind) or (optional and value is None)):
                raise JaxbakeError(f"card.{field.name}: {value!r} must be {_KIND_NAMES[kind]}")
            object.__setattr__(self, field.name, value)

    def to_json(self) -> str:
        """The card as JSON text; `from_json` is the exact inverse."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: dict, source: str = "card") -> Card:
        """A card from its JSON object. Raises JaxbakeError naming `source` and the missing, unknown or wrong field."""
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise JaxbakeError(f"{source}: unknown field '{name}'; {did_you_mean(name, known)}")
        if missing := sorted(name for name, (_, optional) in _TYPES.items() if not optional and name not in values):
            raise JaxbakeError(f"{source}: is damaged, lacks {', '.join(missing)}")
        try:
            card = cls(**values)
        except JaxbakeError as error:
            raise JaxbakeError(f"{source}: is damaged, {error}") from error
        if card.prompt is not None and sha256(card.prompt) != card.prompt_sha256:
            raise JaxbakeError(f"{source}: is damaged, prompt_sha256 is not the hash of the prompt")
        return card

    @classmethod
    def from_json(cls, text: str) -> Card:
        """A card from JSON text. Raises JaxbakeError where it is damaged."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise JaxbakeError(f"card: is damaged, not JSON: {error}") from error
        if not isinstance(values, dict):
            raise JaxbakeError(f"card: must hold one JSON object, holds a {type(values).__name__}")
        return cls.from_dict(values)

    def save(self, path: str | AnyPath) -> None:
        """Writes the card to a file, whole or not at all."""
        write_whole(as_path(path), self.to_json())

    @classmethod
    def load(cls, path: str | AnyPath) -> Card:
        """Reads a card's file. Raises JaxbakeError naming the file where it is missing or damaged."""
        return cls.from_dict(read_json(as_path(path)), str(path))

    def to_markdown(self) -> str:
        """The card for a person to read."""
        lines = [f"# {self.name}", ""]
        if self.prompt is not None:
            lines += ["The prompt baked into the weights:", "", *_fenced(self.prompt), ""]
        lora, targets = self.lora, self.lora.get("targets", "")
        rows = [
            ("base", f"`{self.base}`"),
            ("base digest", f"`{self.base_digest}`"),
            ("base held as", self.quantize),
            ("teacher", self.teacher and f"`{self.teacher}`"),
            ("teacher digest", self.teacher_digest and f"`{self.teacher_digest}`"),
            ("delta digest", f"`{self.delta_digest}`"),
            ("parent delta", self.parent_digest and f"`{self.parent_digest}`"),
            ("prompt sha256", self.prompt_sha256 and f"`{self.prompt_sha256}`"),
            ("chat template sha256", self.template_sha256 and f"`{self.template_sha256}`"),
            ("rank, alpha", f"{lora.get('rank')}, {lora.get('alpha')}{' (rsLoRA)' if lora.get('rslora') else ''}"),
            ("layers", targets if isinstance(targets, str) else ", ".join(targets)),
            ("seeds", ", ".join(f"{k} {v}" for k, v in (self.seeds or {}).items())),
            ("created", self.created),
            ("environment", _listed(self.environment)),
            ("resumed", "; ".join(map(_resume, self.resumes or []))),
            ("made with", ", ".join(f"{k} {v}" for k, v in (self.versions or {}).items())),
        ]
        lines += ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows if v)]
        if self.metrics:
            lines += ["", "| metric | value |", "|---|---|"]
            lines += [f"| {k} | {_short(v)} |" for k, v in self.metrics.items()]
        if self.config:
            lines += ["", "Settings:", "", "```json", json.dumps(self.config, indent=2, ensure_ascii=False), "```"]
        return "\n".join(lines) + "\n"


_TYPES: dict[str, tuple[type, bool]] = {
    "name": (str, False),
    "base": (str, False),
    "base_digest": (str, False),
    "delta_digest": (str, False),
    "lora": (dict, False),
    "prompt": (str, True),
    "prompt_sha256": (str, True),
    "template_sha256": (str, True),
    "config": (dict, True),
    "seeds": (dict, True),
    "parent_digest": (str, True),
    "quantize": (str, True),
    "teacher": (str, True),
    "teacher_digest": (str, True),
    "metrics": (dict, True),
    "versions": (dict, True),
    "environment": (dict, True),
    "resumes": (list, True),
    "created": (str, True),
}
"""Each field's type, and whether it may be null."""

_KIND_NAMES = {str: "a text", dict: "an object", list: "a list"}


def _plain(value: Any, where: str) -> Any:
    """The value as JSON would give it back. Raises JaxbakeError for what JSON cannot hold."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value), where)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "ndim", None) == 0:  # a numpy or jax scalar
        return _plain(value.item(), where)
    raise JaxbakeError(f"card.{where}: a {type(value).__name__} cannot be kept as JSON")


def _listed(values: dict[str, Any] | None) -> str:
    return ", ".join(f"{k} {v}" for k, v in (values or {}).items() if v is not None)


def _resume(run: dict[str, Any]) -> str:
    where = f"step {run['step']}" if run["step"] else f"{run['responses']} responses"
    return f"from {where}, {run['resume']}" + (f" (another {', '.join(run['changed'])})" if run["changed"] else "")


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _fenced(text: str) -> list[str]:
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", text, fence]


def sha256(text: str) -> str:
    """Hexadecimal sha256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what a bake's result depends on, the interpreter and the platform included."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # jaxbake itself, run from a checkout
            found[package] = _own_version() if package == "jaxbake" else "not installed"
    return {**found, "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}


def _own_version() -> str:
    import jaxbake

    return jaxbake.__version__


def make_card(
    base,
    delta: Delta,
    *,
    name: str,
    prompt: str | None = None,
    prompt_sha256: str | None = None,
    config: Any = None,
    seeds: dict[str, Any] | None = None,
    teacher: Any = None,
    parent: Delta | str | None = None,
    metrics: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    resumes: list[dict[str, Any]] | None = None,
) -> Card:
    """The card of a delta just made: hashes, digests, versions and the time are filled in.

    Args:
      base: the `models.base.Base` it was baked on.
      prompt_sha256: by default the hash of the prompt.
      config: a recipe or bake settings, as a dataclass or a dict.
      teacher: another model that was imitated, anything with a `name` and a `digest`.
      parent: the delta (or its digest) this one was baked on top of.
      environment, resumes: where it was made, and on what runs' work it went on.
    """
    return Card(
        name=name,
        base=base.name,
        base_digest=base.digest,
        delta_digest=delta_digest(delta),
        lora=asdict(delta.config),
        prompt=prompt,
        prompt_sha256=prompt_sha256 if prompt is None else sha256(prompt),
        template_sha256=template_hash(base.tokenizer) if has_template(base.tokenizer) else None,
        config=config,
        seeds=seeds,
        parent_digest=delta_digest(parent) if isinstance(parent, Delta) else parent,
        quantize=base.quantize,
        teacher=teacher and teacher.name,
        teacher_digest=teacher and teacher.digest,
        metrics=metrics,
        versions=versions(),
        environment=environment,
        resumes=resumes,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def for_delta(card: Card, delta: Delta) -> Card:
    """The same card for another form of its delta (another strength): digest and settings are the new delta's."""
    return replace(card, delta_digest=delta_digest(delta), lora=asdict(delta.config))
