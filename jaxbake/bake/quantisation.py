"""What holding a base as small integers costs: its divergence from the original, one layer in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake.bake.others import default_contexts
from jaxbake.data.chat import Example, prefix_ids
from jaxbake.errors import JaxbakeError
from jaxbake.files import read_json
from jaxbake.models import families
from jaxbake.models.base import Base, find_folder, load_tokenizer, parameter_dtype
from jaxbake.models.checkpoint import stream_params
from jaxbake.models.decoder import forward_kv, unembedding
from jaxbake.models.layer import rms_norm
from jaxbake.models.quantised import check_kind, quantise_params
from jaxbake.models.spec import ModelConfig, is_param, linear_shapes, param_specs
from jaxbake.objectives import fused_metrics

_ROWS, _LONGEST = 8, 512  # rows computed together; tokens of a text that are looked at


@dataclass(frozen=True)
class QuantisationReport:
    """KL(original || quantised) of the next token in nats, mean over `tokens`; and what the weights take in memory.

    agreement: share of tokens with the same most likely next token. bytes, original_bytes: all parameters, in the
    dtype they are loaded in.
    """

    kind: str
    kl: float
    agreement: float
    tokens: int
    bytes: int
    original_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def quantisation_report(
    model: str | Path, quantize: str, texts: Sequence[str] | None = None, *, dtype: Any = None
) -> QuantisationReport:
    """Compares a model held as integers with the original, at every token of some texts.

    Both are computed side by side, layer by layer, straight from the model's files: neither is ever held whole.

    Args:
      model: as in `jaxbake.load`; quantize: "int8" or "int4".
      texts: user turns, put into the model's chat template; by default shipped prompts with their questions.
      dtype: of activations and of what is not quantised, as in `jaxbake.load`.

    Raises JaxbakeError as `jaxbake.load`, and for a model without tokenizer or no texts.
    """
    folder = find_folder(str(model))
    config = families.convert(read_json(folder / "config.json"))
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise JaxbakeError(f"{model}: has no tokenizer, so no text can be read")
    turns = [(None, text) for text in texts] if texts is not None else default_contexts(folder)
    rows = [prefix_ids(tokenizer, prompt, text)[:_LONGEST] for prompt, text in turns]
    if not rows:
        raise JaxbakeError("quantisation report: there are no texts to compare on")
    counted = [np.ones(row.size, bool) for row in rows]
    return _compare(folder, config, quantize, rows, counted, parameter_dtype(dtype, folder, None))


def quantised_kl(base: Base, examples: Sequence[Example]) -> dict[str, float]:
    """{"quantised_kl", "quantised_agreement"} of a quantised base, over what its prompted self is to be matched at."""
    rows, counted = [], []
    for example in examples:
        rows.append(np.concatenate([example.teacher_prefix, example.tail]))
        at = np.zeros(rows[-1].size, bool)
        at[np.flatnonzero(example.mask) + example.teacher_prefix.size - 1] = True  # the tokens that predict those
        counted.append(at)
    found = _compare(base.folder, base.config, base.quantize, rows, counted, base.params["norm"].dtype)
    return {"quantised_kl": found.kl, "quantised_agreement": found.agreement}


@partial(jax.jit, static_argnames="config")
def _layer(x_BTD: jax.Array, layer: dict, segments_BT: jax.Array, norm: jax.Array, config: ModelConfig) -> jax.Array:
    """One layer of the decoder; hidden states stand in for the embeddings of so many different tokens."""
    b, t, d = x_BTD.shape
    params = {"embed_tokens": x_BTD.reshape(b * t, d), "layers": layer, "norm": norm}
    tokens = jnp.arange(b * t, dtype=jnp.int32).reshape(b, t)
    return forward_kv(params, None, tokens, config=config, segment_ids=segments_BT, final_norm=False)[0]


def _compare(
    folder: Path, config: ModelConfig, kind: str, rows: list[np.ndarray], counted: list[np.ndarray], dtype
) -> QuantisationReport:
    check_kind(kind)
    segments, tokens, weights = _padded([np.ones_like(r) for r in rows]), _padded(rows), _padded(counted)
    pieces = stream_params(folder, config, dtype)
    outer = next(pieces)
    start = [outer["embed_tokens"][part] * jnp.asarray(config.embed_scale, dtype) for part in tokens]
    streams = {"original": start, kind: list(start)}
    for i, layer in enumerate(pieces):
        one = replace(
            config, num_layers=1, embed_scale=1.0, windows=config.windows[i : i + 1],
            layer_rope=config.layer_rope[i : i + 1],
        )  # fmt: skip
        rounded = quantise_params({"layers": layer}, kind, linear_shapes(config))["layers"]
        for name, weight in (("original", layer), (kind, rounded)):
            streams[name] = [
                _layer(x, weight, segment, outer["norm"], one)
                for x, segment in zip(streams[name], segments, strict=True)
            ]
    sums = np.zeros(3)
    for ours, theirs, weight in zip(streams[kind], streams["original"], weights, strict=True):
        found = _metrics(ours, theirs, outer, weight.astype(np.float32), config)
        sums += [float(found[name]) for name in ("kl", "agreement", "count")]
    kl, agreement, count = sums
    sizes = [_bytes(config, dtype, quantize) for quantize in (kind, None)]
    return QuantisationReport(kind, kl / count, agreement / count, int(count), *sizes)


@partial(jax.jit, static_argnames="config")
def _metrics(ours, theirs, outer, weights, config: ModelConfig):
    ours, theirs = (rms_norm(x, outer["norm"], config.norm_eps, config.norm_offset) for x in (ours, theirs))
    return fused_metrics(ours, unembedding(outer), theirs, None, weights, softcap=config.logit_softcap)


def _padded(rows: list[np.ndarray]) -> list[np.ndarray]:
    """Rows in equal blocks [_ROWS, T], filled up with zeros."""
    longest = -(-max(row.size for row in rows) // 64) * 64
    table = np.zeros((-(-len(rows) // _ROWS) * _ROWS, longest), np.int32)
    for out, row in zip(table, rows, strict=False):
        out[: row.size] = row
    return list(table.reshape(-1, _ROWS, longest))


def _bytes(config: ModelConfig, dtype, quantize: str | None) -> int:
    specs = jax.tree.leaves(param_specs(config, quantize), is_leaf=is_param)
    return sum(math.prod(spec.shape) * jnp.dtype(spec.dtype or dtype).itemsize for spec in specs)
