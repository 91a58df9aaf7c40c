"""What a bake's compiled programs take, as shapes with shardings: for compiling where no weights and no chips are."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxbake.bake.step import BakeState, init_state
from jaxbake.config import BakeConfig
from jaxbake.data.batches import Batch, Shape, View
from jaxbake.mesh import sharding
from jaxbake.models.decoder import Prefix
from jaxbake.models.spec import ModelConfig, is_param, linear_shapes, param_specs


class StepInputs(NamedTuple):
    """The arguments of a bake step, `jax.ShapeDtypeStruct`s all; prefix None where there is no prompt."""

    state: BakeState
    params: Any
    batch: Batch
    prefix: Prefix | None
    teacher_hidden: jax.ShapeDtypeStruct


def _struct(shape, dtype, axes, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh and sharding(axes, mesh, shape))


def params_inputs(config: ModelConfig, mesh: Mesh | None, dtype=jnp.bfloat16) -> Any:
    """The base's parameters."""
    specs = param_specs(config)
    return jax.tree.map(lambda p: _struct(p.shape, dtype, p.axes, mesh), specs, is_leaf=is_param)


def state_inputs(config: ModelConfig, bake_config: BakeConfig, mesh: Mesh | None) -> BakeState:
    """The state: factors, and the optimizer's moments of them, lie as the weight they belong to; the rank is whole."""
    axes = {}
    for slot, ((_, axis_in), (_, axis_out)) in linear_shapes(config).items():
        axes[slot, "a"], axes[slot, "b"] = ("layers", axis_in, "rank"), ("layers", "rank", axis_out)

    def place(path, leaf):
        names = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))[-2:]
        spread = mesh and (
            sharding(axes[names], mesh, leaf.shape) if names in axes else NamedSharding(mesh, PartitionSpec())
        )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread)

    state = jax.eval_shape(lambda key: init_state(key, config, bake_config), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(place, state)


def prefix_inputs(config: ModelConfig, length: int, mesh: Mesh | None, dtype=jnp.bfloat16) -> Prefix | None:
    """A prompt's keys and values, the same for all rows."""
    if not length:
        return None
    shape = (config.num_layers, length, config.num_kv_heads, config.head_dim)
    one = _struct(shape, dtype, ("layers", "seq", "kv_heads", "head_dim"), mesh)
    return Prefix(one, one)


def batch_inputs(shape: Shape, mesh: Mesh | None) -> Batch:
    """Rows of both views."""

    def array(length, dtype=jnp.int32):
        return _struct((shape.rows, length), dtype, ("batch", "seq"), mesh)

    def view(length):
        tokens, index = array(length), array(shape.matched)
        return View(tokens=tokens, positions=tokens, segments=tokens, prefix=tokens, index=index)

    matched = array(shape.matched)
    weights = array(shape.matched, jnp.float32)
    return Batch(view(shape.student), view(shape.teacher), targets=matched, weights=weights, source=matched)


def step_inputs(
    config: ModelConfig,
    bake_config: BakeConfig,
    shape: Shape,
    prefix_length: int,
    mesh: Mesh | None = None,
    dtype=jnp.bfloat16,
) -> StepInputs:
    """The arguments of `make_bake_step`'s step. Raises JaxbakeError where the mesh does not divide the model."""
    return StepInputs(
        state=state_inputs(config, bake_config, mesh),
        params=params_inputs(config, mesh, dtype),
        batch=batch_inputs(shape, mesh),
        prefix=prefix_inputs(config, prefix_length, mesh, dtype),
        teacher_hidden=_struct(
            (shape.rows, shape.matched, config.hidden_size), dtype, ("batch", "seq", "head_dim"), mesh
        ),
    )
