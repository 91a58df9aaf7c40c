"""What is to be planned: a model's shape, a bake, a topology, a mesh and the sizes of a step."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxbake.config import BakeConfig, Recipe
from jaxbake.errors import JaxbakeError
from jaxbake.files import read_json

PROGRAMS = ("online", "cached", "decode")
"""The step with the teacher's pass in it, the step with the teacher's targets known, and the sampler's loop."""


@dataclass(frozen=True)
class Sizes:
    """What a step computes, in tokens: `rows` rows of question and response, behind a prompt that all of them share."""

    rows: int = 64
    question: int = 64
    response: int = 448
    prompt: int = 2048

    def __post_init__(self):
        for name in ("rows", "question", "response"):
            if getattr(self, name) < 1:
                raise JaxbakeError(f"plan: {name} is {getattr(self, name)}; must be at least 1")
        if self.prompt < 0:
            raise JaxbakeError(f"plan: a prompt of {self.prompt} tokens; must be 0 (none) or more")


@dataclass(frozen=True)
class Request:
    """One plan. model: the fields of a Hugging Face config.json; mesh: as `jaxbake.mesh` reads it, or "auto"."""

    name: str
    model: dict[str, Any]
    topology: str
    slices: int = 1
    mesh: str = "auto"
    sizes: Sizes = Sizes()
    bake: BakeConfig = field(default_factory=BakeConfig)
    dtype: str = "bfloat16"
    programs: tuple[str, ...] = PROGRAMS

    def with_micro_batches(self, count: int) -> Request:
        """The same step in so many parts."""
        return replace(self, bake=replace(self.bake, optimizer=replace(self.bake.optimizer, accumulate=count)))

    def with_remat(self) -> Request:
        """The same step, each layer's activations computed again in the backward pass."""
        return replace(self, bake=replace(self.bake, train=replace(self.bake.train, remat=True)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which `from_dict` reads back."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Request:
        """From what `to_dict` gave, by way of JSON."""
        from pydantic import TypeAdapter

        return TypeAdapter(Request).validate_python(data)


def read_model(name: str) -> dict[str, Any]:
    """The fields of a config.json: of crumb, a local folder, the file itself, or a hub name; weights are not read.

    Only a hub name may contact the network, for that one file. Raises JaxbakeError where there is none.
    """
    path = Path(name).expanduser()
    if name == "crumb":
        from jaxbake.smallworld import CRUMB

        return read_json(CRUMB / "config.json")
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        fields = read_json(path)
        if not isinstance(fields, dict) or "model_type" not in fields:
            raise JaxbakeError(f"{path}: no 'model_type' in it; name the config.json of a model in Hugging Face format")
        return fields
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".json"):
        raise JaxbakeError(f"'{name}': no such folder or config.json, and no hub name (owner/model)")
    from huggingface_hub import hf_hub_download

    try:
        return read_json(Path(hf_hub_download(name, "config.json")))
    except Exception as error:  # the hub raises many kinds: offline, gated, unknown
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JaxbakeError(f"{name}: its config.json could not be had from the hub ({reason})") from None


def request_for(
    topology: str,
    *,
    recipe: Recipe | None = None,
    model: str | None = None,
    mesh: str | None = None,
    slices: int = 1,
    rows: int | None = None,
    question: int | None = None,
    response: int | None = None,
    prompt: int | None = None,
) -> Request:
    """A plan for a recipe, for a model, or for a recipe with another model; mesh and sizes not given are the recipe's.

    Without a recipe: rank 32 on all linear layers, recomputation, and the sizes of `Sizes`. The recipe's prompt is not
    counted in tokens (there may be no tokenizer): say how long it is with `prompt`.
    Raises JaxbakeError where neither is given.
    """
    if recipe is None and model is None:
        raise JaxbakeError("plan: give a recipe, or --model with a hub name, a folder or a config.json")
    usual = Sizes()
    if recipe is None:
        bake = BakeConfig()
        bake = replace(bake, train=replace(bake.train, remat=True))
    else:
        bake, model = recipe.bake, model or recipe.model
        usual = Sizes(bake.train.batch_size, usual.question, bake.sampling.max_tokens, usual.prompt)
    given = {"rows": rows, "question": question, "response": response, "prompt": prompt}
    return Request(
        name=model,
        model=read_model(model),
        topology=topology,
        slices=slices,
        mesh=mesh or bake.mesh or "auto",
        sizes=replace(usual, **{key: value for key, value in given.items() if value is not None}),
        bake=bake,
        dtype=(recipe and recipe.dtype) or "bfloat16",
    )


def check_compiler() -> None:
    """Raises JaxbakeError where the TPU compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise JaxbakeError("plan: needs the TPU compiler (no TPU); install it with: pip install 'jaxbake[plan]'")
