"""What a bake's compiled programs take: shapes and shardings, for compiling without weights or chips, and the placing
of real batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake.bake.step import BakeState, init_state, state_axes
from jaxbake.bake.targets import columns, kept_form
from jaxbake.config import BakeConfig
from jaxbake.data.batches import Batch, View
from jaxbake.data.shapes import Shape
from jaxbake.mesh import AnyMesh, check, put, sharding
from jaxbake.models.cache import PREFIX_AXES, Prefix
from jaxbake.models.spec import ModelConfig, is_param, param_specs

_ROWS, _MATCHED = ("batch", "seq"), ("batch", "matched")
_VIEW = View(tokens=_ROWS, positions=_ROWS, segments=_ROWS, prefix=_ROWS, index=_MATCHED)
BATCH_AXES = Batch(student=_VIEW, teacher=_VIEW, targets=_MATCHED, weights=_MATCHED, source=_MATCHED)
"""Logical axes of every array of a batch."""

HIDDEN_AXES = ("batch", "matched", None)
"""Logical axes of the teacher's hidden states [B, K, D]."""


def put_batch(batch: Batch, mesh: AnyMesh | None) -> Batch:
    """A batch, with a teacher's view or without, on the mesh, its rows over replica and fsdp; on the device where there
    is none. Every process gives the whole and passes on its own rows, which are projected where they lie."""
    batch = batch if mesh is None else batch.replace(kept=None)
    axes = BATCH_AXES if batch.teacher is not None else BATCH_AXES.replace(teacher=None)
    axes = axes if batch.kept is None else axes.replace(kept=(None,))
    return jax.tree.map(lambda x, axes: put(x, axes, mesh), batch, axes)


def put_view(view: View, mesh: AnyMesh | None) -> View:
    """A teacher's view, likewise."""
    return jax.tree.map(lambda x, axes: put(x, axes, mesh), view, BATCH_AXES.teacher)


class StepInputs(NamedTuple):
    """The arguments of a bake step, `jax.ShapeDtypeStruct`s all; prefix None where there is no prompt. known: what is
    kept of the teacher where it is asked once."""

    state: BakeState
    params: Any
    batch: Batch
    prefix: Prefix | None
    known: Any


def _struct(shape, dtype, axes, mesh: AnyMesh | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh and sharding(axes, mesh, shape))


def params_inputs(config: ModelConfig, mesh: AnyMesh | None, dtype=jnp.bfloat16, quantize: str | None = None) -> Any:
    """The base's parameters."""
    specs = param_specs(config, quantize)
    return jax.tree.map(lambda p: _struct(p.shape, p.dtype or dtype, p.axes, mesh), specs, is_leaf=is_param)


def state_inputs(config: ModelConfig, bake_config: BakeConfig, mesh: AnyMesh | None) -> BakeState:
    """The state: factors, and the optimizer's moments of them, lie as the weight they belong to; the rank is whole."""
    state = jax.eval_shape(lambda key: init_state(key, config, bake_config), jax.random.key(0))
    return jax.tree.map(lambda x, axes: _struct(x.shape, x.dtype, axes, mesh), state, state_axes(state, config))


def prefix_inputs(config: ModelConfig, length: int, mesh: AnyMesh | None, dtype=jnp.bfloat16) -> Prefix | None:
    """A prompt's keys and values, the same for all rows; split over tokens, and gathered layer by layer."""
    if not length:
        return None
    shape = (config.num_layers, length, config.num_kv_heads, config.head_dim)
    axes = PREFIX_AXES
    if config.num_kv_heads % (1 if mesh is None else mesh.shape.get("tp", 1)):
        axes = tuple(None if axis == "kv_heads" else axis for axis in axes)  # every device has all of them
    one = _struct(shape, dtype, axes, mesh)
    return Prefix(one, one)


def batch_inputs(shape: Shape, mesh: AnyMesh | None) -> Batch:
    """Rows of both views."""

    def view(length):
        row = jax.ShapeDtypeStruct((shape.rows, length), jnp.int32)
        return View(row, row, row, row, matched)

    matched = jax.ShapeDtypeStruct((shape.rows, shape.matched), jnp.int32)
    weights = jax.ShapeDtypeStruct(matched.shape, jnp.float32)
    plain = Batch(view(shape.student), view(shape.teacher), matched, weights, matched)
    return jax.tree.map(lambda x, axes: _struct(x.shape, x.dtype, axes, mesh), plain, BATCH_AXES)


def known_inputs(config: ModelConfig, bake_config: BakeConfig, shape: Shape, mesh: AnyMesh | None, dtype) -> Any:
    """What is kept of the teacher at a batch's matched tokens."""
    form = kept_form(bake_config, config, dtype)
    said = columns(np.empty(*form.layout(1, config.hidden_size, dtype)))
    rows = (shape.rows, shape.matched)
    return jax.tree.map(lambda x: _struct(rows + x.shape[1:], x.dtype, HIDDEN_AXES[: x.ndim + 1], mesh), said)


def step_inputs(
    config: ModelConfig,
    bake_config: BakeConfig,
    shape: Shape,
    prefix_length: int,
    mesh: AnyMesh | None = None,
    dtype=jnp.bfloat16,
    quantize: str | None = None,
) -> StepInputs:
    """The arguments of `make_bake_step`'s step; `mesh` may be abstract, or of devices that are only described:

        inputs = step_inputs(config, bake_config, Shape(64, 512, 512, 448), 2048, mesh)
        make_bake_step(config, bake_config).trace(inputs.state, inputs.params, inputs.batch, inputs.prefix).lower(...)

    Raises JaxbakeError where the mesh does not divide the model, the rows or the row lengths.
    """
    if mesh is not None:
        check(config, mesh)
    return StepInputs(
        state=state_inputs(config, bake_config, mesh),
        params=params_inputs(config, mesh, dtype, quantize),
        batch=batch_inputs(shape, mesh),
        prefix=prefix_inputs(config, prefix_length, mesh, dtype),
        known=known_inputs(config, bake_config, shape, mesh, dtype),
    )
