"""Device meshes, and the one table from logical axes to mesh axes."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxbake.errors import JaxbakeError, did_you_mean

AXES = ("replica", "fsdp", "tp")
"""Mesh axes: copies of the model (across slices), shards of parameters and batch, shards of heads, mlp, vocabulary."""

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tp",),
    "kv_heads": ("tp",),
    "mlp": ("tp",),
    "vocab": ("tp",),
}
"""Logical axis -> mesh axes it is split over; axes not named here (seq, head_dim, layers, rank) are never split."""


def make_mesh(text: str) -> Mesh:
    """A mesh from "fsdp=4,tp=2"; axes not named have size 1.

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
    if (wanted := math.prod(sizes.values())) != jax.device_count():
        raise JaxbakeError(f"mesh '{text}': makes {wanted} devices of the {jax.device_count()} there are")
    return jax.make_mesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sharding(axes: tuple[str | None, ...], mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """How an array of these logical axes and this shape lies on the mesh.

    Mesh axes of size 1, and rules for axes the mesh does not have, split nothing. Raises JaxbakeError where a size does
    not divide.
    """
    spec = []
    for name, size in zip(axes, shape, strict=True):
        split = tuple(axis for axis in RULES.get(name, ()) if mesh.shape.get(axis, 1) > 1)
        parts = math.prod(mesh.shape[axis] for axis in split)
        if size % parts:
            raise JaxbakeError(
                f"mesh axis {' x '.join(split)} of size {parts} does not divide the model's '{name}' axis, size {size}"
            )
        spec.append(split if len(split) > 1 else split[0] if split else None)
    return NamedSharding(mesh, PartitionSpec(*spec))
