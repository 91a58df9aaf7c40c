"""What the computation being traced will run on: read where a kernel is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax.sharding import AxisType


@dataclass(frozen=True)
class Chip:
    """platform: "tpu", "gpu" or "cpu"; kind: as jax names it ("TPU v5 lite"); alone: one device sees the whole arrays
    of this computation, so that a kernel, which the partitioner cannot split, may be called."""

    platform: str
    kind: str
    alone: bool


def chip() -> Chip:
    """The devices of the mesh in context (`jax.set_mesh`, `jax.shard_map`), else jax's default device.

    So a computation compiled ahead of time for chips that are not here takes their kernels.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        default = jax.config.jax_default_device or jax.devices()[0]
        platform = default if isinstance(default, str) else default.platform
        kind = platform if isinstance(default, str) else default.device_kind
    else:
        platform, kind = device.platform, device.device_kind
    alone = mesh.empty or mesh.size == 1 or all(t == AxisType.Manual for t in mesh.axis_types)
    return Chip({"cuda": "gpu", "rocm": "gpu"}.get(platform, platform), kind, alone)
