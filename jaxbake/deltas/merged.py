"""Deltas merged into their base: in memory, and as a Hugging Face model folder."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxbake import hosts
from jaxbake.deltas import lora
from jaxbake.deltas.lora import Delta, check_fits, delta_digest
from jaxbake.deltas.peft import is_hub_name
from jaxbake.errors import JaxbakeError
from jaxbake.files import AnyPath, as_path, is_remote, read_json, whole_folder, write_whole
from jaxbake.models import checkpoint

# What goes along with the weights: tokenizer, chat template, sampling defaults, licence.
_COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def merge(base, delta: Delta):
    """A `Base` with the delta in its weights: computed in float32, kept in the base's dtype.

    Its digest is a new one that follows from those of base and delta. Raises JaxbakeError where the delta does not fit.
    """
    check_fits(delta, base.config, "delta")
    digest = delta_digest(delta)
    return replace(
        base,
        params=lora.merge(base.params, delta),
        digest=hashlib.sha256(f"merged {base.digest} {digest}".encode()).hexdigest(),
        name=f"{base.name} + delta {digest[:8]}",
    )


def save_merged(
    base, delta: Delta | None, path: str | AnyPath, max_shard_size: int | str = "5GB", *, dtype: Any = None, card=None
) -> AnyPath:
    """Writes base and delta as one model in Hugging Face format, whole or not at all. Returns the folder.

    Of a base on a mesh no more than one tensor at a time is made whole; all processes call it, process 0 writes. A
    quantised base is not written: the delta is added to the original weights, read again from the base's folder.

    Config, safetensors (sharded with an index where larger), tokenizer, generation settings and a README. Of a
    multimodal base the text part is written, as a model of its own.

    Args:
      delta: None writes the base as it is in memory.
      max_shard_size: bytes, or a text such as "5GB".
      dtype: by default as the base is stored: then merged weights are rounded to it, all others keep every bit.
      card: the delta's `bakery.card.Card`, for the README.
    Raises JaxbakeError where the delta does not fit, or the folder is not empty or cannot be written.
    """
    path, delta = as_path(path), hosts.fetch(delta)
    hosts.first(lambda: _check_new(path))
    if card is not None and delta is not None and card.delta_digest != delta_digest(delta):
        raise JaxbakeError(f"{path}: the card '{card.name}' is of another delta (`bakery.card.for_delta` adapts one)")
    if base.quantize:
        held = base.params["embed_tokens"].dtype
        params = checkpoint.read_params(Path(base.folder), base.config, held, base.mesh)
        base = replace(base, params=params, quantize=None)
    as_stored = dtype is None
    dtype = _dtype(base) if as_stored else _known_dtype(dtype)
    params, merged = base.params, set()
    if delta is not None:
        check_fits(delta, base.config, "delta")
        params, merged = lora.merge(params, delta), set(delta.factors)

    def cast(leaf: jax.Array, exact: bool) -> jax.Array:
        rounded = leaf.astype(dtype)  # some models store a few tensors, such as norms, in a wider dtype than the rest
        return leaf if exact and not bool(jnp.all(rounded.astype(leaf.dtype) == leaf)) else rounded

    params = {
        name: {k: cast(v, as_stored and k not in merged) for k, v in leaf.items()}
        if name == "layers"
        else cast(leaf, as_stored)
        for name, leaf in params.items()
    }
    hf_config = read_json(Path(base.folder, "config.json"))
    # In an object store, files of any size go straight to their place; config.json comes last and makes it a model.
    into = nullcontext(path) if is_remote(path) else whole_folder(path, last="config.json")
    with hosts.led(into) as work:
        work = as_path(work)
        hosts.first(lambda: _write_companions(base, delta, card, dtype, work))
        checkpoint.write_params(params, base.config, work, hf_config, max_shard_size)
    return path


def _check_new(path: AnyPath) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise JaxbakeError(f"{path}: is not an empty folder; a model is never overwritten, give a new one")


def _write_companions(base, delta: Delta | None, card, dtype: jnp.dtype, work: AnyPath) -> None:
    for pattern in _COMPANIONS:
        for file in sorted(Path(base.folder).glob(pattern)):
            if file.is_file():
                write_whole(work / file.name, file.read_bytes())
    write_whole(work / "README.md", _readme(base, delta, card, dtype))
    if card is not None:
        card.save(work / "card.json")


def _dtype(base) -> jnp.dtype:
    """The dtype the base is stored in, or that of its parameters where they hold less."""
    held = jnp.dtype(base.params["embed_tokens"].dtype)
    stored = jnp.dtype(checkpoint.stored_dtype(checkpoint.stored_tensors(Path(base.folder))))
    return stored if stored.itemsize <= held.itemsize else held


def _known_dtype(name: Any) -> jnp.dtype:
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise JaxbakeError(f"dtype: {name!r} must be float32, bfloat16 or float16")
    return dtype


def _readme(base, delta: Delta | None, card, dtype: jnp.dtype) -> str:
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["prompt-baking", "jaxbake"]}
    if is_hub_name(base.name):
        front["base_model"] = base.name
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in front.items()), "---", ""]
    if card is not None:
        lines += [card.to_markdown().rstrip()]
    else:
        lines += ["# A merged model", "", f"- base: `{base.name}`, digest `{base.digest}`"]
        lines += [f"- delta digest: `{delta_digest(delta)}`"] if delta is not None else []
    if delta is not None:
        lines += ["", f"The low-rank delta is merged into the weights: computed in float32, stored as {dtype.name}."]
        if card is not None and card.quantize:
            lines += [
                f"The delta was trained over this base held as {card.quantize}; here it is added to the original",
                "weights, with which it was not trained: measure the result.",
            ]
        if dtype.itemsize < 4:
            lines += [
                f"Storing {dtype.name} rounds: changes smaller than its spacing are lost, so the merged model may",
                "differ slightly from the base with the delta beside it.",
            ]
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
    ]
    return "\n".join(lines) + "\n"
