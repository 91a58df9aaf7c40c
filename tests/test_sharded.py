"""Meshes: eight fake devices, a real model's step lowered for chips that are not there, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from test_step import all_jaxprs

from jaxbake import mesh as meshes
from jaxbake.bake.abstract import step_inputs
from jaxbake.bake.step import make_bake_step
from jaxbake.config import BakeConfig, LoraConfig
from jaxbake.data.shapes import Shape
from jaxbake.errors import JaxbakeError
from jaxbake.models import families
from jaxbake.models.spec import ModelConfig, num_params

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
LLAMA = ModelConfig(
    family="llama", vocab_size=104, hidden_size=48, intermediate_size=56, num_layers=3, num_heads=8, num_kv_heads=2,
    head_dim=12,
)  # fmt: skip


def abstract(**sizes: int) -> AbstractMesh:
    shape = tuple(sizes.get(axis, 1) for axis in meshes.AXES)
    return AbstractMesh(shape, meshes.AXES, axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.slow
def test_on_eight_devices():
    """All of `eight_devices.py`, in a process that has eight."""
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:xdist", "tests/eight_devices.py"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 16}, {"fsdp": 4, "tp": 4}, {"replica": 2, "fsdp": 8, "context": 2, "tp": 2}]
)
def test_a_real_step_lowers_for_chips_that_are_not_there(real_dir, sizes):
    """The 8B Llama's bake step, to StableHLO for TPU, without weights, chips or libtpu."""
    config = families.convert(json.loads((real_dir / "configs/llama3.1-8b/config.json").read_text()))
    mesh, bake_config = abstract(**sizes), BakeConfig()
    inputs = step_inputs(config, bake_config, Shape(64, 512, 512, 448), 2048, mesh)
    traced = make_bake_step(config, bake_config).trace(inputs.state, inputs.params, inputs.batch, inputs.prefix)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert f"mhlo.num_partitions = {mesh.size} " in text
    held = sum(
        2 * jnp.prod(jnp.array(x.sharding.shard_shape(x.shape), jnp.float32)) for x in jax.tree.leaves(inputs.params)
    )
    split = mesh.shape["fsdp"] * mesh.shape["tp"]
    assert float(held) == pytest.approx(2 * num_params(config) / split, rel=0.01)  # norms are not split over tp


def stacks_of_weights(config: ModelConfig, mesh: AbstractMesh) -> list[tuple[int, ...]]:
    """Shapes of the stacked base weights among what any loop over the layers of a bake step puts out."""
    settings = BakeConfig(lora=LoraConfig(rank=2))
    inputs = step_inputs(config, settings, Shape(8, 16, 16, 5), 8, mesh)
    jaxpr = make_bake_step(config, settings).trace(*inputs[:4]).jaxpr.jaxpr
    shapes = {x.shape for x in jax.tree.leaves(inputs.params["layers"]) if x.ndim == 3}
    loops = [eqn for inner in all_jaxprs(jaxpr) for eqn in inner.eqns if eqn.primitive.name == "scan"]
    assert len(loops) >= 3  # teacher, student, and back
    return [out.aval.shape for eqn in loops for out in eqn.outvars if out.aval.shape in shapes]


def test_gathered_weights_are_not_kept_for_the_backward_pass(monkeypatch):
    """On a TPU all else is kept, without recomputation; the control keeps the gathered weights too."""
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2, abstract_device=tpu)
    assert stacks_of_weights(LLAMA, mesh) == []
    monkeypatch.setattr("jaxbake.models.decoder.recompute_gathers", jax.checkpoint_policies.everything_saveable)
    assert stacks_of_weights(LLAMA, mesh)


# What is refused


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 16}, "mesh axis tp of size 16 does not divide the model's 8 attention heads"),
        ({"fsdp": 32}, "mesh axis fsdp of size 32 does not divide the model's 'embed' axis, size 48"),
        (
            {"fsdp": 16, "replica": 3},
            "mesh axis replica x fsdp of size 48 does not divide the batch's 'batch' axis, size 8",
        ),
        ({"context": 3}, "mesh axis context of size 3 does not divide the batch's 'seq' axis, size 16"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(sizes, message):
    with pytest.raises(JaxbakeError) as caught:
        step_inputs(LLAMA, BakeConfig(lora=LoraConfig(rank=2)), Shape(8, 16, 16, 5), 0, abstract(**sizes))
    assert str(caught.value) == message


def test_a_mesh_of_ones_own():
    own = jax.make_mesh((1, 1), ("tp", "fsdp"))
    assert meshes.mesh(own, LLAMA).shape == {"tp": 1, "fsdp": 1}
    import jaxbake as jb

    assert set(jb.mesh(own, names={"tp": "fsdp", "fsdp": "replica"}).axis_names) == {"fsdp", "replica"}
    with pytest.raises(JaxbakeError, match="neither a text such as fsdp=4,tp=2"):
        jb.mesh(7)


@pytest.mark.parametrize(
    ("count", "rows", "slices", "sizes"),
    [
        (1, 16, 1, {"replica": 1, "fsdp": 1, "tp": 1}),
        (8, 16, 1, {"replica": 1, "fsdp": 8, "tp": 1}),
        (8, 4, 1, {"replica": 1, "fsdp": 4, "tp": 2}),
        (8, 1, 1, {"replica": 1, "fsdp": 4, "tp": 2}),  # two key heads: tp goes no further
        (16, 8, 2, {"replica": 2, "fsdp": 4, "tp": 2}),
        (32, None, 1, {"replica": 1, "fsdp": 16, "tp": 2}),  # 32 does not divide the width of 48
    ],
)
def test_auto_gives_every_device_a_row_with_the_least_tp(count, rows, slices, sizes):
    assert meshes.auto_sizes(count, LLAMA, rows, slices) == sizes


def test_auto_does_not_gather_over_all_chips_of_a_large_slice_in_three_directions():
    """v5p from 64 chips on, seen in plans; not smaller ones, nor chips in a plane, nor what has no place at all."""

    def chips(*sides):
        return [SimpleNamespace(coords=list(at)) for at in itertools.product(*map(range, sides))]

    known = {sides: meshes.widest_gather(chips(*sides)) for sides in ((4, 4, 4), (2, 4, 8), (2, 4, 4), (8, 8, 1))}
    assert known == {(4, 4, 4): 32, (2, 4, 8): 32, (2, 4, 4): None, (8, 8, 1): None}
    assert meshes.widest_gather(chips(4, 4, 4) * 2) == 32  # slices are alike
    assert meshes.widest_gather(jax.devices()) is None
    wide = replace(LLAMA, hidden_size=64)
    assert meshes.auto_sizes(64, wide, 64) == {"replica": 1, "fsdp": 64, "tp": 1}
    assert meshes.auto_sizes(64, wide, 64, most=32) == {"replica": 1, "fsdp": 32, "tp": 2}
    assert meshes.auto_sizes(128, wide, 128, 2, most=32) == {"replica": 2, "fsdp": 32, "tp": 2}


def test_auto_says_what_does_not_divide():
    with pytest.raises(
        JaxbakeError, match="no fsdp x tp of 7 devices divides the model .width 48, 8 heads, 2 kv heads"
    ):
        meshes.auto_sizes(7, LLAMA)


def test_the_mesh_does_not_change_which_bake_it_is():
    from jaxbake.bake.job import decisive

    assert decisive(BakeConfig(mesh="fsdp=8")) == decisive(BakeConfig())
