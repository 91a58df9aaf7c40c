"""Deltas to and from Hugging Face PEFT adapter folders, bit-exact in both directions."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake import hosts
from jaxbake.config import LoraConfig
from jaxbake.deltas.lora import Delta, check_fits, delta_digest
from jaxbake.errors import JaxbakeError
from jaxbake.files import AnyPath, as_path, local_copy, read_json, whole_folder
from jaxbake.models.families import FAMILIES
from jaxbake.models.spec import hf_module, linear_shapes

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
METADATA_KEY = "jaxbake"  # in the header of the safetensors file, which peft and vLLM do not look at

# Where the layers stand inside the torch model: in a language model, and in a multimodal one around it.
PLAIN, WRAPPED = "model.layers", "model.language_model.layers"


def save_peft(delta: Delta, base, path: str | AnyPath, card=None) -> AnyPath:
    """Writes the delta as an adapter folder that `peft` and vLLM load; whole or not at all. Returns the folder.

    All processes call it, process 0 writes; of the model nothing but the delta is looked at.

    A strength (`with_strength`) is kept in `lora_alpha`; the factors are written as they are, in their own dtype.
    Args:
      base: the `models.base.Base` the delta belongs to.
      card: its `bakery.card.Card`, written beside it and into the README.
    Raises JaxbakeError where the delta does not fit the base or the card is another delta's.
    """
    path, delta = as_path(path), hosts.fetch(delta)
    check_fits(delta, base.config, str(path))
    digest = delta_digest(delta)
    if card is not None and card.delta_digest != digest:
        raise JaxbakeError(f"{path}: the card '{card.name}' is of another delta (`bakery.card.for_delta` adapts one)")
    layers = layers_path(base)
    adapter = _adapter_config(delta, base, layers)
    notes = {"lora": asdict(delta.config), "base": base.name, "base_digest": base.digest, "delta_digest": digest}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(notes)}

    def write() -> None:
        with whole_folder(path, last=CONFIG_FILE) as work:
            _save_file(_to_tensors(delta, layers), work / WEIGHTS_FILE, metadata)
            (work / CONFIG_FILE).write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")
            (work / "README.md").write_text(_readme(base, card, notes), encoding="utf-8")
            if card is not None:
                card.save(work / "card.json")

    hosts.first(write)
    return path


def load_peft(path: str | AnyPath, base, *, any_base: bool = False) -> Delta:
    """Reads an adapter folder, made by `save_peft` or by `peft`, as a delta of `base`. The inverse of `save_peft`.

    Raises JaxbakeError for a folder that is missing or damaged, an adapter that is not plain LoRA of one rank on the
    linear layers of every block (naming the field or the tensors), one that does not fit the base, and one that
    `save_peft` wrote for another base (unless `any_base`).
    """
    path = as_path(path)
    if not path.is_dir():
        raise JaxbakeError(f"{path}: there is no such folder; give a PEFT adapter folder (with {CONFIG_FILE})")
    if not (path / CONFIG_FILE).exists():
        raise JaxbakeError(f"{path}: is no PEFT adapter folder, it has no {CONFIG_FILE}")
    adapter = read_json(path / CONFIG_FILE)
    _refuse_unsupported(adapter, path / CONFIG_FILE)
    tensors, metadata = read_tensors(path / WEIGHTS_FILE)
    factors = _to_factors(tensors, base.config, path / WEIGHTS_FILE)
    ranks = {factor["a"].shape[-1] for factor in factors.values()}
    if ranks != {adapter["r"]}:
        raise JaxbakeError(f"{path / CONFIG_FILE}: r is {adapter['r']}, but the tensors have rank {sorted(ranks)}")
    notes = _notes(metadata, path / WEIGHTS_FILE)
    if notes and notes.get("base_digest") != base.digest and not any_base:
        raise JaxbakeError(
            f"{path}: this adapter was baked on '{notes.get('base')}' (digest {str(notes.get('base_digest'))[:12]}), "
            f"not on '{base.name}' (digest {base.digest[:12]}); load that base"
        )
    rslora = bool(adapter.get("use_rslora"))
    scale = adapter["lora_alpha"] / (math.sqrt(adapter["r"]) if rslora else adapter["r"])
    if notes:
        lora = lora_from_dict(notes.get("lora"), f"{path / WEIGHTS_FILE}: '{METADATA_KEY}' in its header")
    else:
        lora = LoraConfig(adapter["r"], float(adapter["lora_alpha"]), _targets(factors, base.config), rslora)
    delta = Delta(jax.tree.map(jnp.asarray, factors), jnp.float32(scale), lora)
    check_fits(delta, base.config, str(path))
    return delta


def layers_path(base) -> str:
    """Torch module path of the base's decoder layers: another one where it is part of a multimodal model."""
    family = FAMILIES.get(base.config.family)
    return WRAPPED if family is not None and family.wrapped else PLAIN


def _adapter_config(delta: Delta, base, layers: str) -> dict[str, Any]:
    """The fields of peft's LoraConfig that are not at their defaults."""
    ranks = {factor["a"].shape[-1] for factor in delta.factors.values()}
    if len(ranks) != 1:
        raise JaxbakeError(f"delta: PEFT export needs one rank for all layers, this delta has {sorted(ranks)}")
    rank, scale, lora = ranks.pop(), np.float32(delta.scale), delta.config
    alpha = lora.alpha
    if rank != lora.rank or np.float32(lora.scale) != scale:  # another strength: exact, float64 holds the product
        alpha = float(scale) * (math.sqrt(rank) if lora.rslora else rank)
    slots = [slot for slot in linear_shapes(base.config) if slot in delta.factors]
    if layers == PLAIN:
        modules: list[str] | str = slots
    else:  # short names would also match the vision tower's layers
        names = "|".join(slots)
        modules = rf"{re.escape(layers)}\.\d+\.(self_attn|mlp)\.({names})"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base_path(base),
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": lora.rslora,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _base_path(base) -> str:
    """What transformers can load the base by: its hub name, or the folder it was read from."""
    local = base.name == "crumb" or Path(base.name).exists()
    return str(base.folder) if local else base.name


def is_hub_name(name: str) -> bool:
    """Whether a base's name is one of the Hugging Face hub (owner/model), not a folder here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _to_tensors(delta: Delta, layers: str) -> dict[str, np.ndarray]:
    """PEFT's tensors: per layer lora_A [R, I] and lora_B [O, R]."""
    tensors = {}
    for slot, factor in delta.factors.items():
        for name, letter in (("a", "A"), ("b", "B")):
            stacked = np.asarray(jax.device_get(factor[name]))
            for i, matrix in enumerate(stacked):
                key = f"base_model.model.{layers}.{i}.{hf_module(slot)}.lora_{letter}.weight"
                tensors[key] = np.ascontiguousarray(matrix.T)
    return tensors


_KEY = re.compile(
    r"base_model\.model\.(?:model|model\.language_model|language_model\.model)\.layers\.(?P<layer>\d+)"
    r"\.(?P<module>(?:self_attn|mlp)\.(?P<slot>\w+))\.lora_(?P<letter>[AB])\.weight"
)


def _to_factors(tensors: dict[str, np.ndarray], config, file: AnyPath) -> dict:
    """The stacked factors of every slot the tensors cover. Raises JaxbakeError listing keys that have no place."""
    shapes, found, strange = linear_shapes(config), {}, []
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["slot"] not in shapes or hf_module(match["slot"]) != match["module"]:
            strange.append(key)
            continue
        found.setdefault(match["slot"], {}).setdefault(match["letter"].lower(), {})[int(match["layer"])] = value
    if strange:
        kinds = sorted({re.sub(r"\.lora_[AB]\.weight$", "", re.sub(r"\.\d+\.", ".*.", key)) for key in strange})
        raise JaxbakeError(
            f"{file}: {len(strange)} tensors have no place in this base, as {', '.join(kinds[:7])}; "
            f"its linear layers are {', '.join(shapes)}"
        )
    factors = {}
    for slot in (slot for slot in shapes if slot in found):
        factors[slot] = {}
        for name in ("a", "b"):
            layers = found[slot].get(name, {})
            if set(layers) != set(range(config.num_layers)):
                wrong = sorted(set(layers) ^ set(range(config.num_layers)))
                raise JaxbakeError(
                    f"{file}: {slot} lora_{name.upper()} must cover layers 0 to {config.num_layers - 1} of the base; "
                    f"missing or too many: {', '.join(map(str, wrong))}"
                )
            if any(x.ndim != 2 or x.shape != layers[0].shape for x in layers.values()):
                ragged = sorted({str(list(x.shape)) for x in layers.values()})
                raise JaxbakeError(f"{file}: {slot} lora_{name.upper()} differs between layers: {', '.join(ragged)}")
            factors[slot][name] = np.stack([layers[i].T for i in range(config.num_layers)])
    if not factors:
        raise JaxbakeError(f"{file}: holds no tensors")
    return factors


# Fields of adapter_config.json that do not change what the adapter computes; r, lora_alpha, use_rslora are read.
_HARMLESS = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "lora_dropout", "layers_pattern",
    "megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config", "corda_config", "lora_ga_config",
    "runtime_config", "loftq_config", "init_lora_weights", "bias",
})  # fmt: skip
# Initialisations that change the base's own weights: the adapter alone does not hold the difference.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def _refuse_unsupported(adapter: dict, file: AnyPath) -> None:
    """Raises JaxbakeError naming the first field that says something a `Delta` cannot hold."""
    if adapter.get("peft_type") != "LORA":
        raise JaxbakeError(f"{file}: peft_type is {adapter.get('peft_type')!r}; only 'LORA' can be read")
    for name, kinds in (("r", int), ("lora_alpha", int | float)):
        if not isinstance(adapter.get(name), kinds) or isinstance(adapter[name], bool):
            raise JaxbakeError(f"{file}: {name} is {adapter.get(name)!r}; it must be a number")
    if adapter["r"] < 1:
        raise JaxbakeError(f"{file}: r is {adapter['r']}; it must be at least 1")
    if adapter.get("bias", "none") != "none":
        raise JaxbakeError(f"{file}: bias is {adapter['bias']!r}; only adapters without biases ('none') can be read")
    init = adapter.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise JaxbakeError(
            f"{file}: init_lora_weights is '{init}', which also changes the base's weights; "
            "save it with peft's path_initial_model_for_weight_conversion to make it a plain adapter"
        )
    modules = adapter.get("target_modules")
    names = [modules] if isinstance(modules, str) else modules or []
    if embeddings := [n for n in names if str(n).split(".")[-1] in ("embed_tokens", "lm_head")]:
        raise JaxbakeError(
            f"{file}: target_modules has {', '.join(embeddings)}; only linear layers of blocks can be read"
        )
    for name, value in adapter.items():
        if name not in _HARMLESS and value:
            raise JaxbakeError(f"{file}: {name} is {str(value)[:80]}; only plain LoRA of one rank can be read")


def read_tensors(file: AnyPath) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a safetensors file and its metadata. Raises JaxbakeError where it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        raise JaxbakeError(f"{file}: there is no such file; adapters are read from safetensors only")
    try:
        with local_copy(file) as local, safe_open(str(local), framework="np") as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise JaxbakeError(f"{file}: is damaged or truncated: {error}") from error


def _save_file(tensors: dict[str, np.ndarray], file: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, str(file), metadata)
    except SafetensorError as error:  # what safetensors raises for a full disk
        raise OSError(None, str(error)) from error


def _notes(metadata: dict[str, str], file: AnyPath) -> dict | None:
    """What `save_peft` noted in the file's header; None for an adapter made elsewhere."""
    if METADATA_KEY not in metadata:
        return None
    try:
        notes = json.loads(metadata[METADATA_KEY])
    except ValueError as error:
        raise JaxbakeError(f"{file}: is damaged: '{METADATA_KEY}' in its header is not JSON") from error
    if not isinstance(notes, dict):
        raise JaxbakeError(f"{file}: is damaged: '{METADATA_KEY}' in its header is no JSON object")
    return notes


def lora_from_dict(values: Any, source: str) -> LoraConfig:
    """A LoraConfig from its JSON form. Raises JaxbakeError naming `source` where that is damaged."""
    try:
        targets = values["targets"]
        return LoraConfig(**{**values, "targets": targets if isinstance(targets, str) else tuple(targets)})
    except (KeyError, TypeError) as error:
        raise JaxbakeError(f"{source}: is damaged: no settings of a delta ({error})") from error


def _targets(factors: dict, config) -> Any:
    return "all" if set(factors) == set(linear_shapes(config)) else tuple(factors)


def _readme(base, card, notes: dict) -> str:
    """The adapter's model card for the Hugging Face hub."""
    front = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "prompt-baking", "jaxbake"]}
    if is_hub_name(base.name):
        front["base_model"] = base.name
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in front.items()), "---", ""]
    if card is None:
        lora = notes["lora"]
        lines += [
            "# A baked delta",
            "",
            f"A low-rank adapter (LoRA, rank {lora['rank']}, alpha {lora['alpha']}) made with jaxbake.",
            "",
            f"- base: `{base.name}`, digest `{base.digest}`",
            f"- delta digest: `{notes['delta_digest']}`",
        ]
    else:
        lines += [card.to_markdown().rstrip()]
    example = base.name if is_hub_name(base.name) else "path/to/the/base"
    auto = "AutoModelForCausalLM"
    lines += [
        "",
        "## How to load",
        "",
        "The prompt is in the weights: leave it out of the conversation.",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'base = {auto}.from_pretrained("{example}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{example}")',
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        "```",
        "",
        "With jaxbake:",
        "",
        "```python",
        "import jaxbake as jb",
        "",
        f'base = jb.load("{base.name if is_hub_name(base.name) or base.name == "crumb" else example}")',
        'delta = jb.load_peft("path/to/this/folder", base)',
        'print(jb.sample(base, "Hello!", delta=delta))',
        "```",
    ]
    return "\n".join(lines) + "\n"
