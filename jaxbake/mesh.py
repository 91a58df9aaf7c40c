"""Device meshes, and the one table from logical axes to mesh axes.

    mesh = jb.mesh("fsdp=4,tp=2")        # or jb.mesh("auto"), or a jax.sharding.Mesh of your own
    base = jb.load("Qwen/Qwen3-8B", mesh=mesh)

What is computed from arrays that lie on a mesh is laid out by this table too: `models.decoder.forward` and the
objectives look where the weights lie, so that no function has to be told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxbake.errors import JaxbakeError, did_you_mean
from jaxbake.rooms import make_callable

AXES = ("replica", "fsdp", "context", "tp")
"""Mesh axes: copies of the model (across slices); shards of parameters and batch; shards of the rows' tokens (long
documents); shards of heads, mlp and vocabulary. Neighbours on the last axis talk most."""

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp"),
    "seq": ("context",),
    "prefix": ("fsdp", "context"),
    "embed": ("fsdp",),
    "heads": ("tp",),
    "kv_heads": ("tp",),
    "mlp": ("tp",),
    "vocab": ("tp",),
}
"""Logical axis -> mesh axes it is split over; axes not named here (head_dim, layers, rank, ...) are never split."""

AnyMesh = Mesh | AbstractMesh


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh from "fsdp=4,tp=2"; axes not named have size 1. `devices`: by default all there are.

    Raises JaxbakeError for unknown axes, sizes that are no whole numbers, or a product other than the device count.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES:
            raise JaxbakeError(f"mesh '{text}': no axis '{name}'; {did_you_mean(name, AXES)}")
        if not size.isdecimal() or int(size) < 1:
            raise JaxbakeError(f"mesh '{text}': {name} = '{size}' is no size; write for example fsdp=4,tp=2")
        if name in sizes:
            raise JaxbakeError(f"mesh '{text}': names {name} twice")
        sizes[name] = int(size)
    return _make(sizes, devices, text)


def _make(sizes: Mapping[str, int], devices: Sequence[Any] | None, said: str) -> Mesh:
    devices = jax.devices() if devices is None else list(devices)
    if (wanted := math.prod(sizes.values())) != len(devices):
        raise JaxbakeError(f"mesh '{said}': makes {wanted} devices of the {len(devices)} there are")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and sizes.get("replica", 1) % slices:
        raise JaxbakeError(
            f"mesh '{said}': there are {slices} slices; replica must be a multiple of it, for only copies of the model "
            "may be so far apart"
        )
    if slices > 1:  # whole slices lie along replica, the first axis
        devices = sorted(devices, key=lambda device: device.slice_index)
        per = len(devices) // slices
        inner = (shape[0] // slices, *shape[1:])
        grids = [_make_grid(inner, devices[at : at + per]) for at in range(0, len(devices), per)]
        return Mesh(np.concatenate(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Mesh(_make_grid(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _make_grid(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices so that the last axes lie along the shortest ways between chips.

    A side of the chips' torus may be shared by two axes (fsdp=8,tp=2 on 4x4), which `jax.make_mesh` refuses on most.
    """
    return mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)


def adopt(mesh: Mesh, names: Mapping[str, str] | None = None) -> Mesh:
    """A person's own mesh as jaxbake takes it: axes are taken by name, in any order, all of them of type Auto.

    names: what other names stand for, as {"data": "fsdp", "model": "tp"}. Raises JaxbakeError for an axis that has
    devices along it and no name jaxbake knows: nothing would be split over it.
    """
    named = [(names or {}).get(str(axis), str(axis)) for axis in mesh.axis_names]
    for axis in named:
        if axis not in AXES and mesh.devices.shape[named.index(axis)] > 1:
            raise JaxbakeError(
                f"mesh: nothing is split over an axis '{axis}'; {did_you_mean(axis, AXES)}, or say what it stands for: "
                f"jb.mesh(mesh, names={{'{axis}': 'fsdp'}})"
            )
    if len(set(named)) < len(named):
        raise JaxbakeError(f"mesh: two axes of one name among {', '.join(named)}")
    return Mesh(mesh.devices, tuple(named), axis_types=(AxisType.Auto,) * len(named))


def auto_sizes(
    count: int, config: Any = None, rows: int | None = None, slices: int = 1, most: int | None = None
) -> dict[str, int]:
    """Sizes of the axes for `count` devices in so many slices.

    The rule: replica is the number of slices; tp is the smallest size with which the model divides (heads, kv heads,
    mlp, vocabulary by tp; the width by fsdp), no more rows are computed at once than a step has (`rows`, where known),
    and fsdp is not beyond `most` (see `widest_gather`); fsdp is the rest. Splitting weights and rows alone costs least,
    as long as every device has a row. Where no tp gives every device a row, the one that comes nearest is taken.

    Raises JaxbakeError where no sizes divide the model.
    """
    if count % slices:
        raise JaxbakeError(f"mesh 'auto': {count} devices do not divide into {slices} slices")
    each = count // slices
    possible = [tp for tp in range(1, each + 1) if each % tp == 0 and _fits(config, each // tp, tp)]
    if not possible:
        raise JaxbakeError(
            f"mesh 'auto': no fsdp x tp of {each} devices divides the model (width {config.hidden_size}, "
            f"{config.num_heads} heads, {config.num_kv_heads} kv heads, mlp {config.intermediate_size}, vocabulary "
            f"{config.vocab_size}); name a mesh of fewer devices"
        )
    enough = [tp for tp in possible if (rows is None or count // tp <= rows) and each // tp <= (most or each)]
    tp = enough[0] if enough else possible[-1]
    return {"replica": slices, "fsdp": each // tp, "tp": tp}


def widest_gather(devices: Sequence[Any]) -> int | None:
    """Over how many chips of a slice weights may be gathered; None where over all.

    From 64 chips on, joined in three directions (v5p), XLA makes sums of gathers over all of them: each chip fills a
    whole weight with zeros but for its part, at more than twice the cycles of a step (`jaxbake plan` of a 70B on
    v5p:4x4x4, `--mesh fsdp=64` beside `fsdp=32,tp=2`). Gathers over half of the chips stay what they are, and so do all
    on v5e and v6e (libtpu 0.0.42).
    """
    coords = {tuple(getattr(device, "coords", ())) for device in devices}
    three = all(len(set(side)) > 1 for side in zip(*coords, strict=True)) and len(min(coords)) == 3
    return len(coords) // 2 if three and len(coords) >= 64 else None


def _fits(config: Any, fsdp: int, tp: int) -> bool:
    if config is None:
        return tp == 1
    sizes = (config.num_heads, config.num_kv_heads, config.intermediate_size, config.vocab_size)
    return config.hidden_size % fsdp == 0 and all(size % tp == 0 for size in sizes)


def mesh(
    asked: str | Mapping[str, int] | Mesh,
    config: Any = None,
    rows: int | None = None,
    *,
    devices: Sequence[Any] | None = None,
    names: Mapping[str, str] | None = None,
) -> Mesh:
    """A mesh from "fsdp=4,tp=2", {"fsdp": 4, "tp": 2}, "auto" (see `auto_sizes`), or a `jax.sharding.Mesh`.

    Args:
      config: the `ModelConfig` that it is for. "auto" chooses by it; every other mesh is checked against it.
      rows: examples a step, for "auto".
      devices: by default all there are.
      names: see `adopt`.

    Raises JaxbakeError for a mesh that is wrongly written, that does not use all devices, or that does not divide the
    model.
    """
    if isinstance(asked, Mesh):
        made = adopt(asked, names)
    elif isinstance(asked, Mapping):
        made = make_mesh(",".join(f"{name}={size}" for name, size in asked.items()), devices)
    elif not isinstance(asked, str):
        raise JaxbakeError(f"mesh: {asked!r} is neither a text such as fsdp=4,tp=2 nor a jax.sharding.Mesh")
    elif asked.strip() == "auto":
        devices = jax.devices() if devices is None else list(devices)
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        sizes = auto_sizes(len(devices), config, rows, slices, widest_gather(devices))
        made = _make(sizes, devices, "auto")
    else:
        made = make_mesh(asked, devices)
    if config is not None:
        check(config, made)
    return made


def check(config: Any, mesh: AnyMesh) -> None:
    """Raises JaxbakeError where a mesh cannot hold a model: an axis that does not divide its heads.

    Key and value heads that tp does not divide are not split: every device has them all. Other sizes are checked where
    each parameter is laid out (`sharding`).
    """
    tp = mesh.shape.get("tp", 1)
    if config.num_heads % tp:
        raise JaxbakeError(f"mesh axis tp of size {tp} does not divide the model's {config.num_heads} attention heads")


def describe(mesh: AnyMesh | None) -> str:
    """As `make_mesh` reads it: "fsdp=4,tp=2"; "1 device" where nothing is split."""
    sizes = {} if mesh is None else {axis: size for axis, size in mesh.shape.items() if size > 1}
    return ",".join(f"{axis}={size}" for axis, size in sizes.items()) or "1 device"


def split_over(name: str | None, mesh: AnyMesh | None) -> tuple[str, ...]:
    """The axes of this mesh, larger than 1, that a logical axis is split over."""
    if mesh is None or name is None:
        return ()
    automatic = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(a for a in RULES.get(name, ()) if mesh.shape.get(a, 1) > 1 and automatic[a] == AxisType.Auto)


def parts(name: str | None, mesh: AnyMesh | None) -> int:
    """In how many parts a logical axis lies on the mesh."""
    return math.prod(mesh.shape[axis] for axis in split_over(name, mesh))


def spec(axes: Sequence[str | None], mesh: AnyMesh | None) -> PartitionSpec:
    """The `PartitionSpec` of logical axes."""
    split = (split_over(name, mesh) for name in axes)
    return PartitionSpec(*(s if len(s) > 1 else s[0] if s else None for s in split))


def sharding(axes: Sequence[str | None], mesh: AnyMesh, shape: tuple[int, ...]) -> NamedSharding:
    """How an array of these logical axes and this shape lies on the mesh.

    Mesh axes of size 1, and rules for axes the mesh does not have, split nothing. Raises JaxbakeError where a size does
    not divide.
    """
    for name, size in zip(axes, shape, strict=True):
        if size % parts(name, mesh):
            whose = {"batch": "batch", "seq": "batch", "prefix": "prompt"}.get(name, "model")
            raise JaxbakeError(
                f"mesh axis {' x '.join(split_over(name, mesh))} of size {parts(name, mesh)} does not divide the "
                f"{whose}'s '{name}' axis, size {size}"
            )
    return NamedSharding(mesh, spec(axes, mesh))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Every device has all of it."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_of(tree: Any) -> AnyMesh | None:
    """The mesh of several devices that the first array of a tree lies on, inside `jax.jit` too; None for one device."""
    leaf = next(iter(jax.tree.leaves(tree)), None)
    if leaf is None:
        return None
    inside = isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array)
    lies = jax.typeof(leaf).sharding if inside else leaf.sharding
    mesh = getattr(lies, "mesh", None)
    return None if mesh is None or mesh.empty or mesh.size == 1 else mesh


def in_context(mesh: AnyMesh | None) -> AbstractContextManager[Any]:
    """Makes the mesh the one in context, so that `chip.chip` tells what a computation being traced will run on."""
    if mesh is None:
        return nullcontext()
    return jax.sharding.use_abstract_mesh(mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh)


def constrain(x: jax.Array, axes: Sequence[str | None], mesh: AnyMesh | None) -> jax.Array:
    """`x`, laid out by its logical axes; an axis whose size does not divide (one token a row, say) is not split."""
    if mesh is None:
        return x
    axes = [name if size % parts(name, mesh) == 0 else None for name, size in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, mesh)))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(x: jax.Array, axes: tuple[str | None, ...], mesh: AnyMesh | None) -> jax.Array:
    """A parameter with its "embed" axis whole, as a layer needs it; its gradient is summed into shards."""
    return constrain(x, [None if name == "embed" else name for name in axes], mesh)


gathered.defvjp(
    lambda x, axes, mesh: (gathered(x, axes, mesh), None),
    lambda axes, mesh, _, cotangent: (constrain(cotangent, axes, mesh),),
)


def put(x: Any, axes: Sequence[str | None], mesh: AnyMesh | None) -> jax.Array:
    """A host array, the same in every process, as one array on the mesh; each process passes on its own part only."""
    if mesh is None:
        return jax.device_put(x)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding(axes, mesh, x.shape), lambda index: x[index])


make_callable(__name__, mesh)
