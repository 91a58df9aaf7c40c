"""A base: a frozen model with its tokenizer, and how one is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake import mesh as meshes
from jaxbake.cache import keep_compiled
from jaxbake.errors import JaxbakeError
from jaxbake.files import read_json
from jaxbake.models import checkpoint, families
from jaxbake.models.decoder import forward, logits_from
from jaxbake.models.quantised import check_kind
from jaxbake.models.spec import ModelConfig, is_param, param_specs
from jaxbake.smallworld import CRUMB

_DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Base:
    """A frozen model and what goes with it.

    params: as `models.spec.param_specs(config)` describes; tokenizer: a transformers tokenizer, or None.
    digest: sha256 over architecture and weights as stored: deltas name their base by it.
    name: what the user called it; folder: where it was read from.
    quantize: "int8" or "int4" where the linear layers' weights are held so; the digest is that of the stored weights.
    eos_ids: tokens that end a response; pad_id: the token rows are filled with.
    """

    params: Any
    config: ModelConfig
    tokenizer: Any
    digest: str
    name: str
    folder: Path
    eos_ids: tuple[int, ...]
    pad_id: int
    mesh: jax.sharding.Mesh | None = None
    quantize: str | None = None


def load(
    name: str | Path,
    *,
    dtype: Any = None,
    mesh: str | jax.sharding.Mesh | None = None,
    rows: int | None = None,
    quantize: str | None = None,
) -> Base:
    """Loads a model in Hugging Face format. From then on jax keeps what it compiles (see `cache.keep_compiled`).

    Args:
      name: "crumb" (the model inside jaxbake), a local folder, or a hub name such as Qwen/Qwen3-0.6B, which alone may
        contact the network.
      dtype: "float32", "bfloat16" or "float16"; by default as stored, but float32 on CPU.
      mesh: "fsdp=4,tp=2", "auto", or a device mesh with axes named as in `jaxbake.mesh`; parameters are read straight
        into their shards.
      rows: how many rows are to be computed at once, for "auto".
      quantize: "int8" or "int4" holds the weights of the linear layers as integers with scales (a fourth or an eighth
        of float32, a half or a quarter of bfloat16); norms, embeddings and the head stay as `dtype` says. They are
        rounded while they are read: the float model never exists. `jaxbake.quantisation_report` says what it costs.

    Raises JaxbakeError for a folder or hub model that is not there, an unsupported architecture, weights that do not
    fit it or are corrupt, and a mesh that does not divide it.
    """
    keep_compiled()
    folder = find_folder(str(name))
    if not (folder / "config.json").is_file():
        raise JaxbakeError(f"{folder}: no config.json; a model folder in Hugging Face format has one")
    hf_config = read_json(folder / "config.json")
    config = families.convert(hf_config)
    if quantize is not None:
        check_kind(quantize)
    mesh = None if mesh is None else meshes.mesh(mesh, config, rows)
    params = checkpoint.read_params(folder, config, parameter_dtype(dtype, folder, mesh), mesh, quantize)
    tokenizer = load_tokenizer(folder)
    generation = folder / "generation_config.json"
    settings = [
        read_json(generation) if generation.exists() else {},
        hf_config,
        families.text_fields(hf_config),
    ]
    eos_ids = _token_ids(config, [s.get("eos_token_id") for s in settings], tokenizer and tokenizer.eos_token_id)
    pad_ids = _token_ids(config, [tokenizer and tokenizer.pad_token_id], *[s.get("pad_token_id") for s in settings])
    return Base(
        params=params,
        config=config,
        tokenizer=tokenizer,
        digest=checkpoint.digest(folder, config),
        name=str(name),
        folder=folder,
        eos_ids=eos_ids,
        pad_id=(*pad_ids, *eos_ids, 0)[0],
        mesh=mesh,
        quantize=quantize,
    )


def on_mesh(base: Base, mesh: str | jax.sharding.Mesh | None, rows: int | None = None) -> Base:
    """The base with its parameters on a mesh (as for `load`), by way of the host, each process for its own devices;
    the same base where None is asked, or it lies there already.

    Raises JaxbakeError where it lies on another mesh, or the mesh does not divide it.
    """
    if mesh is None or (base.mesh is not None and isinstance(mesh, str) and mesh.strip() == "auto"):
        return base
    mesh = meshes.mesh(mesh, base.config, rows)
    if base.mesh is not None:
        if meshes.describe(mesh) != meshes.describe(base.mesh):
            raise JaxbakeError(
                f"mesh: {meshes.describe(mesh)} is asked for, but {base.name} lies on {meshes.describe(base.mesh)}; "
                "leave one of them out"
            )
        return base
    return replace(base, params=put_params(base.params, base.config, mesh, base.quantize), mesh=mesh)


def put_params(params: Any, config: ModelConfig, mesh: jax.sharding.Mesh, quantize: str | None = None) -> Any:
    """Parameters that every process holds whole, on a mesh."""
    specs = param_specs(config, quantize)
    return jax.tree.map(lambda p, x: meshes.put(x, p.axes, mesh), specs, params, is_leaf=is_param)


def logits(base: Base, tokens_BT: Any, delta: Any = None) -> jax.Array:
    """Next-token logits [B, T, V] in float32 of whole rows of tokens, for inspection."""
    tokens = jnp.asarray(tokens_BT, jnp.int32)
    return _logits(base.params, delta, tokens, base.config)


@jax.jit(static_argnums=3)
def _logits(params, delta, tokens, config):
    return logits_from(params, forward(params, delta, tokens, config=config), config=config)


def find_folder(name: str) -> Path:
    """The local folder of a model; a hub name is downloaded first. Raises JaxbakeError where there is none."""
    if name == "crumb":
        if not (CRUMB / checkpoint.WEIGHTS).is_file():
            raise JaxbakeError(
                f"crumb: this installation has no weights of the embedded model in {CRUMB}; install jaxbake again"
            )
        return CRUMB
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if name and folder.exists():
        raise JaxbakeError(f"{name}: is a file; name the model's folder")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise JaxbakeError(f"'{name}': no such folder, and no hub name (owner/model); 'crumb' is the embedded model")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOADED, ignore_patterns=["*/*", "consolidated*"]))
    except GatedRepoError:
        raise JaxbakeError(f"{name}: needs its licence accepted on the hub and a login (hf auth login)") from None
    except RepositoryNotFoundError:
        raise JaxbakeError(f"{name}: no such folder here, and no such model on the hub (or it is private)") from None
    except LocalEntryNotFoundError:
        raise JaxbakeError(
            f"{name}: no such folder here, not in the local cache, and the hub cannot be reached"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise JaxbakeError(f"{name}: download failed ({str(error).splitlines()[0]})") from None


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None where it has none. Nothing is downloaded and no code of the folder is run."""
    if not any((folder / file).exists() for file in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer shows itself as anything from KeyError to a bare Exception
        raise JaxbakeError(f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error})") from error


def parameter_dtype(asked: Any, folder: Path, mesh: jax.sharding.Mesh | None) -> np.dtype:
    """The dtype a model is held in: the one asked for, else as stored, but float32 on CPU."""
    if asked is None:
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        return np.dtype("float32" if platform == "cpu" else checkpoint.stored_dtype(checkpoint.stored_tensors(folder)))
    try:
        dtype = jnp.dtype(asked)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in _DTYPES:
        raise JaxbakeError(f"dtype: '{asked}' is not one of {', '.join(_DTYPES)}")
    return dtype


def _token_ids(config: ModelConfig, *found: Any) -> tuple[int, ...]:
    """All valid token ids in nested lists, in order, each once."""
    ids: list[int] = []
    for item in found:
        ids.extend(_token_ids(config, *item) if isinstance(item, list) else [item] if isinstance(item, int) else [])
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < config.vocab_size))
