"""What vLLM would refuse or silently ignore in an adapter folder, found without vLLM.

The rules follow vLLM's own code: `lora/peft_helper.py` (fields), `lora/utils.py: parse_fine_tuned_lora_name` and
`lora/lora_model.py` (tensor names), `config/lora.py` (ranks).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from jaxbake.deltas.peft import CONFIG_FILE, WEIGHTS_FILE, read_tensors
from jaxbake.errors import JaxbakeError
from jaxbake.files import read_json
from jaxbake.models.families import FAMILIES, convert
from jaxbake.models.spec import linear_shapes

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as `--max-lora-rank`; an adapter of a rank between is served at the next one."""
DEFAULT_MAX_RANK = 16
MODULES = frozenset({
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
})  # fmt: skip
"""Linear layers vLLM's dense decoders have, packed or not (it packs q/k/v and gate/up by itself, also when partial)."""


@dataclass(frozen=True)
class Finding:
    """One thing vLLM would do otherwise than meant. "refused": it does not load; "ignored": it loads, but serves
    something else than was baked, without an error; "note": it works, given what `fix` says."""

    severity: Literal["refused", "ignored", "note"]
    field: str
    message: str
    fix: str


def check_vllm(path: str | Path, base: str | Path | None = None) -> list[Finding]:
    """Findings about an adapter folder, gravest first; empty when vLLM would serve it as it is.

    Args:
      base: folder of the base, to check the tensors' names against its architecture; by default the adapter's
        `base_model_name_or_path` where that is a local folder.
    Raises JaxbakeError where there is no such folder, or a file in it is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise JaxbakeError(f"{path}: there is no such folder; give a PEFT adapter folder")
    if not (path / CONFIG_FILE).is_file():
        return [_no_adapter(path)]
    adapter = read_json(path / CONFIG_FILE)
    findings = [*_check_fields(adapter)]
    if (path / WEIGHTS_FILE).is_file():
        tensors, _ = read_tensors(path / WEIGHTS_FILE)
        findings += [*_check_names(tensors, _base_config(base, adapter)), *_check_tensors(tensors, adapter)]
    else:
        findings.append(_no_weights(path))
    order = ("refused", "ignored", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _no_adapter(path: Path) -> Finding:
    if (path / "config.json").is_file():
        message = f"there is no {CONFIG_FILE}: this is a whole model, not an adapter"
        return Finding("refused", CONFIG_FILE, message, f"serve it by itself: vllm serve {path}")
    fix = "export one with `jaxbake export peft`"
    if (path / "peft" / CONFIG_FILE).is_file():
        fix = f"give the adapter inside it: {path / 'peft'}"
    return Finding("refused", CONFIG_FILE, f"there is no {CONFIG_FILE}", fix)


def _no_weights(path: Path) -> Finding:
    for name in ("adapter_model.bin", "adapter_model.pt"):
        if (path / name).is_file():
            message = f"the weights are a pickle ({name}); vLLM reads it, nothing in it was checked here"
            return Finding("note", WEIGHTS_FILE, message, "save the adapter as safetensors")
    return Finding("refused", WEIGHTS_FILE, f"there is no {WEIGHTS_FILE}", "export the adapter again")


def _check_fields(adapter: dict):
    if adapter.get("peft_type", "LORA") != "LORA":
        message = f"the adapter is {adapter['peft_type']}, vLLM serves LORA only"
        yield Finding("refused", "peft_type", message, "merge it into the base and serve the merged model")
    for name in ("r", "lora_alpha", "target_modules"):
        if adapter.get(name) is None:
            yield Finding("refused", name, f"{name} is missing, vLLM requires it", f"set {name} in {CONFIG_FILE}")
    yield from _check_rank(adapter.get("r"))
    if adapter.get("use_dora"):
        yield Finding("refused", "use_dora", "vLLM does not serve DoRA", "train plain LoRA, or serve the merged model")
    if adapter.get("modules_to_save"):
        message = f"vLLM refuses fully trained modules ({', '.join(map(str, adapter['modules_to_save']))})"
        yield Finding("refused", "modules_to_save", message, "serve the merged model")
    if adapter.get("bias", "none") != "none" or adapter.get("lora_bias"):
        field = "lora_bias" if adapter.get("lora_bias") else "bias"
        yield Finding("refused", field, "vLLM does not serve adapters with biases", "train with bias 'none'")
    for name, what in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if adapter.get(name):
            message = f"vLLM scales every layer by lora_alpha / r: {name} is ignored, those layers come out wrong"
            yield Finding("ignored", name, message, f"use one {what} for all layers, or serve the merged model")
    init = adapter.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(("pissa", "olora", "loftq", "corda", "lora_ga")):
        message = f"'{init}' also changed the base's weights, vLLM serves the unchanged base under the adapter"
        yield Finding("ignored", "init_lora_weights", message, "convert it to a plain adapter when saving with peft")
    for name in ("alora_invocation_tokens", "layer_replication", "trainable_token_indices", "target_parameters"):
        if adapter.get(name):
            yield Finding("ignored", name, f"{name} is not read by vLLM's LoRA loader", "serve the merged model")


def _check_rank(rank):
    if not isinstance(rank, int) or isinstance(rank, bool):
        if rank is not None:
            yield Finding("refused", "r", f"r is {rank!r}, not a whole number", f"set r in {CONFIG_FILE}")
        return
    if not 1 <= rank <= MAX_RANKS[-1]:
        message = f"rank {rank} is outside of what vLLM serves (1 to {MAX_RANKS[-1]})"
        yield Finding("refused", "r", message, "bake with a lower rank, or serve the merged model")
        return
    room = next(size for size in MAX_RANKS if size >= rank)
    if room > DEFAULT_MAX_RANK:
        message = f"rank {rank} is above vLLM's default of {DEFAULT_MAX_RANK}, without the flag it is refused"
        yield Finding("note", "r", message, f"vllm serve --max-lora-rank {room}")
    elif rank != room:
        message = f"rank {rank} is none of vLLM's sizes ({', '.join(map(str, MAX_RANKS))}), it takes the room of {room}"
        yield Finding("note", "r", message, f"bake with rank {room}: it costs the same to serve")


_PREFIX = "base_model.model."
_PLAIN = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+")
_WRAPPED = re.compile(r"(model\.language_model|language_model\.model)\.layers\.\d+\.(self_attn|mlp)\.\w+")


def _check_names(tensors: dict[str, np.ndarray], base: dict | None):
    """Names against what vLLM can read and, by the base's `config.json` where it is known, against its modules."""
    wrapped = None if base is None else isinstance(base.get("text_config"), dict)
    linear = _linear_layers(base)
    unreadable, unknown, heads, bare, lost, multimodal = [], set(), [], [], [], []
    for key in tensors:
        match = re.fullmatch(r"(.+)\.(?:lora_[AB]\.weight|lora_embedding_[AB])", key)
        if match is None:
            unreadable.append(key)
            continue
        module = match[1].replace(_PREFIX, "")
        name = module.rsplit(".", 1)[-1]
        right = _WRAPPED if wrapped else _PLAIN
        if name in ("embed_tokens", "lm_head"):
            heads.append(key)
        elif name not in linear:
            unknown.add(name)
        elif wrapped is None and _WRAPPED.fullmatch(module):
            multimodal.append(key)
        elif not right.fullmatch(module):
            lost.append(key)
        elif not key.startswith(_PREFIX):
            bare.append(key)
    if unreadable:
        message = f"vLLM cannot read {len(unreadable)} names, as {unreadable[0]}"
        yield Finding("refused", WEIGHTS_FILE, message, "names must end in .lora_A.weight or .lora_B.weight")
    if unknown:
        message = f"the model has no linear layer {', '.join(sorted(unknown))} in vLLM"
        yield Finding("refused", "target_modules", message, f"use {', '.join(sorted(linear))}")
    if heads:
        message = f"most of vLLM's models refuse adapters on the embedding or the head ({heads[0]})"
        yield Finding(
            "refused", "target_modules", message, "leave embed_tokens and lm_head out, or serve the merged model"
        )
    if lost:
        layers = "model.language_model.layers" if wrapped else "model.layers"
        message = f"{len(lost)} names match no module of the model, as {lost[0]}: vLLM silently serves the base there"
        yield Finding("ignored", WEIGHTS_FILE, message, f"names must begin with {_PREFIX}{layers}.")
    if bare:
        message = f"{len(bare)} names lack '{_PREFIX}', as {bare[0]}: older vLLM and peft do not find their modules"
        yield Finding("ignored", WEIGHTS_FILE, message, f"names must begin with {_PREFIX}")
    if multimodal:
        message = "the names are those of a multimodal model; on a text-only base vLLM silently serves the base"
        yield Finding("note", WEIGHTS_FILE, message, "serve it on the multimodal model it was made for")
    if not tensors:
        yield Finding("ignored", WEIGHTS_FILE, "it holds no tensors: vLLM serves the base", "export the adapter again")


def _check_tensors(tensors: dict[str, np.ndarray], adapter: dict):
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", key):
            pairs.setdefault(match[1], {})[match[2]] = value
    if halves := [module for module, pair in pairs.items() if len(pair) < 2]:
        missing = "B" if "A" in pairs[halves[0]] else "A"
        message = f"{len(halves)} layers lack a factor, as {halves[0]} (no lora_{missing})"
        yield Finding("refused", WEIGHTS_FILE, message, "export the adapter again")
    whole = {module: (pair["A"], pair["B"]) for module, pair in pairs.items() if len(pair) == 2}
    flat = [m for m, (a, b) in whole.items() if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]]
    if flat:
        a, b = (list(x.shape) for x in whole[flat[0]])
        message = f"{len(flat)} layers have factors that do not fit together, as {flat[0]}: A {a}, B {b}"
        yield Finding("refused", WEIGHTS_FILE, message, "A must be [r, in], B [out, r]")
    ranks = {a.shape[0] for m, (a, _) in whole.items() if m not in flat}
    stated = adapter.get("r")
    if isinstance(stated, int) and ranks - {stated}:
        message = f"r is {stated}, the tensors have rank {', '.join(map(str, sorted(ranks)))}"
        fix = "use one rank for all layers and state it"
        room = next((size for size in MAX_RANKS if size >= stated), MAX_RANKS[-1])
        if max(ranks) > room:
            yield Finding("refused", "r", f"{message}: they do not fit the room vLLM makes for r", fix)
        else:
            yield Finding("ignored", "r", f"{message}: vLLM scales by the stated r", fix)
    kinds = {value.dtype.name for value in tensors.values()}
    if strange := sorted(kind for kind in kinds if "float" not in kind):
        message = f"the tensors are {', '.join(strange)}: vLLM casts the integers as they are, without their scales"
        yield Finding("ignored", "dtype", message, "store them as float32, bfloat16 or float16")
    elif kinds & {"float32", "float64"}:
        message = "the tensors are float32; vLLM rounds them to the base's dtype (--lora-dtype auto)"
        yield Finding("note", "dtype", message, "nothing to do; a merged model in float32 has no such rounding")


def _base_config(base: str | Path | None, adapter: dict) -> dict | None:
    """The base's `config.json`, where its folder is given or the adapter names a local one."""
    folder = base if base is not None else adapter.get("base_model_name_or_path")
    if isinstance(folder, str | Path) and Path(folder, "config.json").is_file():
        return read_json(Path(folder, "config.json"))
    if base is not None:
        raise JaxbakeError(f"{base}: has no config.json; give the base's folder")
    return None


def _linear_layers(base: dict | None) -> frozenset[str]:
    if base is None or base.get("model_type") not in FAMILIES:  # then only what no dense decoder has is found
        return MODULES
    return frozenset(linear_shapes(convert(base)))
