"""Safetensors folders to stacked, sharded arrays and back; the digest that names a base."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (lets numpy read bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxbake import hosts
from jaxbake import mesh as meshes
from jaxbake.errors import JaxbakeError
from jaxbake.files import AnyPath, as_path, is_remote, read_json, upload, write_whole
from jaxbake.models import families
from jaxbake.models.quantised import Quantised, quantise
from jaxbake.models.spec import ModelConfig, Param, is_param, param_specs

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CHUNK = 1 << 26  # bytes hashed at a time


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file: `dtype` is safetensors' name, such as BF16."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """What the safetensors of a folder hold, from their headers alone. JaxbakeError names a missing or corrupt file."""
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():  # the order in which transformers looks
        where = read_json(folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise JaxbakeError(f"{folder / INDEX}: no 'weight_map' from tensor names to files")
        paths = [folder / name for name in sorted(set(where.values()))]
    else:
        where, paths = None, [folder / WEIGHTS]
    tensors: dict[str, Stored] = {}
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (it is no dict)
                part = file.get_slice(name)
                tensors[name] = Stored(path, name, part.get_dtype(), tuple(part.get_shape()))
    if where is not None and (lost := sorted(set(where) - set(tensors))):
        raise JaxbakeError(f"{folder / INDEX}: names {len(lost)} tensors its files do not hold: {_first(lost)}")
    return tensors


def stored_dtype(tensors: dict[str, Stored]) -> str:
    """The dtype most of the parameters are stored in: "bfloat16", "float32", ..."""
    count: dict[str, int] = {}
    for tensor in tensors.values():
        count[tensor.dtype] = count.get(tensor.dtype, 0) + math.prod(tensor.shape)
    code = max(count, key=count.get)
    if code not in _DTYPES:
        raise JaxbakeError(f"the weights are stored as {code}; only {', '.join(_DTYPES)} can be read")
    return _DTYPES[code]


def read_params(
    folder: Path, config: ModelConfig, dtype, mesh: jax.sharding.Mesh | None = None, quantize: str | None = None
) -> dict:
    """The parameters of a folder as `param_specs(config, quantize)` describes them, in `dtype`.

    Every leaf is assembled tensor by tensor in its final layout: beside the model at most one stacked leaf is held.
    With a mesh, only the slices that this process's devices keep are read. To be quantised, a weight is read one layer
    at a time, whole along its inputs; its floats never exist together. Raises one JaxbakeError that lists
    missing, unexpected and mis-shaped tensors.
    """
    dtype = np.dtype(dtype)
    with _Reader(folder, config) as reader:

        def placed(spec: Param, read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
            if mesh is None:
                return jnp.asarray(read(tuple(slice(0, size) for size in spec.shape)))
            known: dict[tuple, np.ndarray] = {}  # devices that keep the same slice share one reading

            def shard(index: tuple[slice, ...]) -> np.ndarray:
                bounds = tuple(part.indices(size)[:2] for part, size in zip(index, spec.shape, strict=True))
                if bounds not in known:
                    known[bounds] = read(tuple(slice(*b) for b in bounds))
                return known[bounds]

            return jax.make_array_from_callback(spec.shape, meshes.sharding(spec.axes, mesh, spec.shape), shard)

        def leaf(spec: Param | Quantised) -> jax.Array | Quantised:
            if isinstance(spec, Param):
                return placed(spec, lambda index: reader.block(spec, index, dtype))

            @cache
            def columns(start: int, stop: int) -> Quantised:
                """All layers' integers and scales for some outputs."""
                outs = [np.empty((*s.shape[:-1], stop - start), s.dtype) for s in (spec.values, spec.scales)]
                for layer in range(spec.values.shape[0]):
                    matrix = reader.part(spec.values, layer, (slice(start, stop), slice(None)))
                    one = quantise(_transpose(matrix, np.empty(matrix.shape[::-1], np.float32)), quantize)
                    outs[0][layer], outs[1][layer] = one.values, one.scales
                return Quantised(*outs)

            def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
                return getattr(columns(index[-1].start, index[-1].stop), name)[(*index[:-1], slice(None))]

            return Quantised(*(placed(getattr(spec, name), partial(read, name)) for name in ("values", "scales")))

        wanted = param_specs(config, quantize)
        return jax.tree.map(leaf, wanted, is_leaf=lambda x: is_param(x) or isinstance(x, Quantised))


def stream_params(folder: Path, config: ModelConfig, dtype) -> Iterator[dict]:
    """The parameters of a folder piece by piece, in `dtype`: first those outside the layers, then {name: [1, ...]} of
    one layer after the other. Raises JaxbakeError as `read_params` does."""
    dtype, specs = np.dtype(dtype), param_specs(config)
    with _Reader(folder, config) as reader:

        def read(spec: Param, *first: slice) -> jax.Array:
            rest = (slice(0, size) for size in spec.shape[len(first) :])
            return jnp.asarray(reader.block(spec, (*first, *rest), dtype))

        yield {name: read(spec) for name, spec in specs.items() if name != "layers"}
        for layer in range(config.num_layers):
            yield {name: read(spec, slice(layer, layer + 1)) for name, spec in specs["layers"].items()}


class _Reader(ExitStack):
    """The open files of a model's folder, once their tensors are known to be those of its architecture."""

    def __init__(self, folder: Path, config: ModelConfig):
        super().__init__()
        folder = Path(folder)
        self._tensors = {_canonical(name, config): tensor for name, tensor in stored_tensors(folder).items()}
        _check(folder, config, param_specs(config), self._tensors)
        self._files = {path: self.enter_context(_opened(path)) for path in {t.path for t in self._tensors.values()}}

    def part(self, spec: Param, layer: int | None, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one tensor, as it lies in its file."""
        stored = self._tensors[spec.hf.format(layer=layer)]
        return self._files[stored.path].get_slice(stored.name)[index]

    def block(self, spec: Param, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """A slice of one parameter, its layers stacked."""
        if spec.axes[0] != "layers":
            return self.part(spec, None, index).astype(dtype, copy=False)
        out = np.empty([bounds.stop - bounds.start for bounds in index], dtype)
        for i, layer in enumerate(range(index[0].start, index[0].stop)):
            if spec.transpose:
                _transpose(self.part(spec, layer, index[:0:-1]), out[i])
            else:
                out[i] = self.part(spec, layer, index[1:])
        return out


def write_params(
    params: dict, config: ModelConfig, folder: AnyPath, hf_config: dict, max_shard_size: int | str = "5GB"
) -> list[AnyPath]:
    """Writes a model in Hugging Face format: `config.json` and safetensors, sharded with an index where larger.

    Every file is written beside its place and then moved there, the index and `config.json` last. Of parameters on a
    mesh one tensor at a time is made whole; process 0 holds at most one file's worth in memory, and writes it. All
    processes call it.

    Args:
      params: a tree as `param_specs(config)` describes; stored in the dtype it has.
      hf_config: `config.json` of the model it came from; of a multimodal one the text part is written, on its own.
      max_shard_size: bytes, or a text such as "5GB" or "200MB".

    Returns the files written. Raises JaxbakeError where it cannot write.
    """
    folder = as_path(folder)
    names = [
        (spec.hf.format(layer=layer), path, layer, spec)
        for path, spec in jax.tree.flatten_with_path(param_specs(config), is_leaf=is_param)[0]
        for layer in (range(spec.shape[0]) if spec.axes[0] == "layers" else (None,))
    ]
    leaves = dict(jax.tree.flatten_with_path(params)[0])
    shards = _shards(names, leaves, _size_of(max_shard_size))
    count = len(shards)
    files = [WEIGHTS] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]

    def finish() -> None:
        if count > 1:
            total = sum(leaf.nbytes for leaf in leaves.values())
            where = {name: file for file, shard in zip(files, shards, strict=True) for name, *_ in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")
        (folder / (WEIGHTS if count > 1 else INDEX)).unlink(missing_ok=True)  # of an earlier, differently sharded model
        text = dict(families.text_fields(hf_config))
        text["torch_dtype" if "torch_dtype" in text else "dtype"] = params["embed_tokens"].dtype.name
        write_whole(folder / "config.json", json.dumps(text, indent=2) + "\n")

    for file, shard in zip(files, shards, strict=True):
        tensors = {}
        for name, path, layer, spec in shard:
            value = hosts.fetch(leaves[path] if layer is None else _layer(leaves[path], np.int32(layer)))
            if hosts.is_first():
                if spec.transpose:
                    value = _transpose(value, np.empty(value.shape[::-1], value.dtype))
                tensors[name] = np.ascontiguousarray(value)
        hosts.first(partial(_write_file, tensors, folder / file))
    hosts.first(finish)
    written = (*files, *([INDEX] if count > 1 else []), "config.json")
    return [folder / file for file in written]


@jax.jit
def _layer(stack: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)  # the index is traced: one program for all


def _write_file(tensors: dict[str, np.ndarray], path: AnyPath) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _beside(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise JaxbakeError(f"{path.parent}: cannot write the model ({error})") from None


def digest(folder: Path, config: ModelConfig | None = None) -> str:
    """What names a base: sha256 over the architecture and every stored tensor's name, dtype, shape and bytes.

    Independent of how tensors are spread over files, and of fields of `config.json` that do not change the computation.
    Several processes read a share of the tensors each, and tell each other.
    """
    folder = Path(folder)
    config = config or families.convert(read_json(folder / "config.json"))
    tensors = sorted(stored_tensors(folder).values(), key=lambda tensor: tensor.name)
    total = hashlib.sha256(json.dumps(_essence(config), sort_keys=True).encode())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
        shares = hosts.gather(list(pool.map(_hash, hosts.share(tensors))))
    for i, tensor in enumerate(tensors):
        content = shares[i % len(shares)][i // len(shares)]
        total.update(f"{tensor.name} {tensor.dtype} {list(tensor.shape)} {content}\n".encode())
    return total.hexdigest()


def _hash(tensor: Stored) -> str:
    """sha256 of a tensor's bytes, read in pieces."""
    content = hashlib.sha256()
    with _opened(tensor.path) as file:
        if not tensor.shape:
            content.update(file.get_tensor(tensor.name).tobytes())
            return content.hexdigest()
        part = file.get_slice(tensor.name)
        rows = max(1, _CHUNK // max(1, 4 * math.prod(tensor.shape[1:])))
        for start in range(0, tensor.shape[0], rows):
            piece = part[start : min(start + rows, tensor.shape[0])]
            content.update(np.ascontiguousarray(piece).view(np.uint8).data)
    return content.hexdigest()


def _essence(settings: Any) -> Any:
    """Settings as JSON, without those at their default: so new settings leave old digests alone."""
    if is_dataclass(settings):
        kept = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "init_range"}
        defaults = {f.name: f.default for f in fields(settings)}
        return {name: _essence(value) for name, value in kept.items() if value != defaults[name]}
    return [_essence(item) for item in settings] if isinstance(settings, tuple) else settings


def _transpose(matrix: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Writes the transpose into `out`, cast to its dtype, block by block to fit the cache, which is faster."""
    size = 256
    for i in range(0, matrix.shape[0], size):
        for j in range(0, matrix.shape[1], size):
            out[j : j + size, i : i + size] = matrix[i : i + size, j : j + size].T
    return out


def _opened(path: Path):
    """An open safetensors file, a context manager; JaxbakeError where it is missing or not whole."""
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError:
        raise JaxbakeError(f"{path}: no such file; models are read from safetensors only") from None
    except SafetensorError as error:
        raise JaxbakeError(f"{path}: corrupt or truncated, download or copy it again ({error})") from None
    except OSError as error:
        raise JaxbakeError(f"{path}: cannot be read ({error})") from None


def _canonical(name: str, config: ModelConfig) -> str:
    """A tensor's name as a plain language model has it, where it is stored as part of a multimodal one."""
    if families.FAMILIES[config.family].wrapped:
        name = re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name)
        name = name.removeprefix("language_model.")
    return name


def _ignored(name: str, config: ModelConfig) -> bool:
    """Tensors that are rightly left aside: rotary buffers, a tied head, other parts of a multimodal model."""
    if name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight"):
        return True
    parts = r"(model\.)?(vision_tower|multi_modal_projector)\."
    return families.FAMILIES[config.family].wrapped and re.match(parts, name) is not None


def _check(folder: Path, config: ModelConfig, specs: dict, tensors: dict[str, Stored]) -> None:
    """Raises a JaxbakeError that lists every difference between the stored tensors and the architecture's."""
    wanted = {}
    for spec in jax.tree.leaves(specs, is_leaf=is_param):
        stacked = spec.axes[0] == "layers"
        shape = spec.shape[1:] if stacked else spec.shape
        for layer in range(spec.shape[0]) if stacked else (None,):
            wanted[spec.hf.format(layer=layer)] = shape[::-1] if spec.transpose else shape
    found = {name: tensor for name, tensor in tensors.items() if name in wanted or not _ignored(name, config)}
    both = sorted(set(wanted) & set(found))
    problems = {
        "missing": sorted(set(wanted) - set(found)),
        "unexpected": sorted(set(found) - set(wanted)),
        "mis-shaped": [
            f"{name} {list(found[name].shape)} instead of {list(wanted[name])}"
            for name in both
            if found[name].shape != wanted[name]
        ],
        "not floating point": [f"{name} {found[name].dtype}" for name in both if found[name].dtype not in _DTYPES],
    }
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {what}: {_first(names)}" for what, names in problems.items() if names)
        raise JaxbakeError(f"{folder}: tensors do not fit the {config.family} model of config.json: {told}")


def _first(names: list[str], count: int = 10) -> str:
    return ", ".join(names[:count]) + (f", ... and {len(names) - count} more" if len(names) > count else "")


def _shards(names: list[tuple], leaves: dict, limit: int) -> list[list[tuple]]:
    """Tensors in order, divided so that no file exceeds `limit` bytes (a single larger tensor has its own)."""
    shards, room = [[]], limit
    for entry in names:
        _, path, layer, _ = entry
        size = leaves[path].nbytes // (1 if layer is None else leaves[path].shape[0])
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= size
    return shards


def _size_of(text: int | str) -> int:
    """Bytes of "5GB", "200MB", "64KB" (powers of ten, as transformers counts)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(text).strip().upper())
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if size < 1:
        raise JaxbakeError(f"max_shard_size: '{text}' is no size; write for example 5GB or 200MB")
    return size


@contextmanager
def _beside(path: AnyPath) -> Iterator[Path]:
    """A temporary name, moved to `path` once it is written, removed if that fails."""
    if is_remote(path):
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch, path.name)
            upload(Path(scratch, path.name), path)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
