"""The KL kernels, interpreted, against the definition in float64; with libtpu, compiled for the chips they are for."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbake.errors import JaxbakeError
from jaxbake.objectives import fused_kl, kernel_gpu, reference_kl
from jaxbake.objectives import kernel as kernel_tpu
from jaxbake.objectives.inputs import prepare

KERNELS = ("pallas", "pallas_recompute", "gpu")
TOKENS, VOCAB, WIDTH = 40, 421, 32


def make_inputs(logit_std=3.0, width=WIDTH, near=None, seed=0):
    """(student hidden, unembedding, teacher hidden), float32, as in test_objectives but smaller."""
    rng = np.random.default_rng(seed)
    unembed = rng.normal(size=(VOCAB, width)) * logit_std / np.sqrt(width)
    teacher = rng.normal(size=(TOKENS, width))
    student = rng.normal(size=(TOKENS, width)) if near is None else teacher + near * rng.normal(size=teacher.shape)
    return [x.astype(np.float32) for x in (student, unembed, teacher)]


def off(x, true):
    x, true = np.asarray(x, np.float64), np.asarray(true, np.float64)
    return np.linalg.norm(x - true) / np.linalg.norm(true)


def kernel(student, unembed, teacher, teacher_unembed=None, *, which="pallas", settings=None, **options):
    """(loss [C], gradient [C, D]) by a kernel in small tiles."""
    args = student, unembed, teacher, teacher_unembed, np.ones(len(student))
    how, tokens, heads, _ = prepare(*args, **(settings or {}))
    if which == "gpu":
        f = kernel_gpu.loss_and_grad
    else:
        options = {"recompute": which == "pallas_recompute", "tiles": (16, 128), "interpret": True, **options}
        f = kernel_tpu.loss_and_grad
    return jax.jit(lambda tokens, heads: f(how, tokens, heads, **options))(tokens, heads)


def truth(student, unembed, teacher, teacher_unembed=None, settings=None):
    with jax.enable_x64(True):
        arrays = [None if x is None else np.asarray(x, np.float64) for x in (unembed, teacher, teacher_unembed)]

        def loss(student):
            return reference_kl(student, *arrays, np.ones(len(teacher)), **(settings or {}))[0]

        return jax.value_and_grad(loss)(np.asarray(student, np.float64))


@pytest.fixture(autouse=True)
def _small_gpu_tiles(monkeypatch):
    for name, size in {"TOKENS": 16, "VOCAB": 128, "WIDTH": 16}.items():
        monkeypatch.setattr(kernel_gpu, name, size)


@pytest.mark.parametrize("which", KERNELS)
def test_agrees_with_a_float64_reference(which):
    for logit_std in (1.0, 5.0):
        arrays = make_inputs(logit_std)
        loss, grad = kernel(*arrays, which=which)
        true_loss, true_grad = truth(*arrays)
        assert loss.dtype == grad.dtype == jnp.float32
        assert off(loss.sum(), true_loss) <= 1e-6
        assert off(grad, true_grad) <= 1e-6


@pytest.mark.parametrize("which", KERNELS)
def test_a_teacher_of_another_width_softened_and_capped(which):
    student, unembed, _ = make_inputs()
    _, teacher_unembed, teacher = make_inputs(width=24, seed=1)
    settings = {"softcap": 6.0, "teacher_softcap": 9.0, "temperature": 1.7}
    arrays = student, unembed, teacher, teacher_unembed
    loss, grad = kernel(*arrays, which=which, settings=settings)
    true_loss, true_grad = truth(*arrays, settings=settings)
    assert off(loss.sum(), true_loss) <= 1e-6
    assert off(grad, true_grad) <= 1e-6


@pytest.mark.parametrize("which", KERNELS)
def test_a_small_divergence_keeps_its_digits_and_none_is_exactly_none(which):
    student, unembed, teacher = make_inputs(1.0, near=0.01)
    loss, _ = kernel(student, unembed, teacher, which=which)
    assert off(loss.sum(), truth(student, unembed, teacher)[0]) <= 2e-6
    loss, grad = kernel(teacher, unembed, teacher, which=which)
    assert (loss == 0).all()
    assert (grad == 0).all()


@pytest.mark.parametrize("which", KERNELS)
def test_bfloat16_and_extreme_logits(which):
    halves = [jnp.asarray(x, jnp.bfloat16) for x in make_inputs(2.0)]
    loss, grad = kernel(*halves, which=which)
    true_loss, true_grad = kernel(*(x.astype(jnp.float32) for x in halves), which=which)
    assert off(loss, true_loss) <= 1e-6
    assert off(grad, true_grad) <= 5e-3
    loss, grad = kernel(*make_inputs(300.0), which=which)
    assert jnp.isfinite(loss).all()
    assert jnp.isfinite(grad).all()


def test_through_fused_kl():
    """Value and gradient of the objective, weights and all, whichever way; what has no kernel is an error."""
    student, unembed, teacher = make_inputs()
    student[3] = np.nan
    weights = np.where(np.arange(TOKENS) == 3, 0.0, np.linspace(0.2, 2.0, TOKENS))

    def step(implementation, **settings):
        def loss(student, weights):
            settings_ = {"implementation": implementation, "chunk_size": 24, **settings}
            return fused_kl(student, unembed, teacher, None, weights, **settings_)[0]

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(student, weights)

    value, grads = step("xla")
    for implementation in ("pallas", "pallas_recompute"):
        value_, grads_ = step(implementation)
        assert off(value_, value) <= 1e-6
        assert off(grads_[0], grads[0]) <= 1e-6
        assert off(grads_[1], grads[1]) <= 1e-6
    with pytest.raises(
        JaxbakeError, match="'pallas' has a kernel for divergence 'forward' in bfloat16 or float32 only"
    ):
        step("pallas", divergence="reverse")
    with pytest.raises(JaxbakeError, match="did you mean 'pallas'"):
        step("palas")


def test_vocabulary_in_parts_over_devices():
    """Four devices in a process of their own, each with a part, the last one's filled up; only numbers a token sent."""
    run_alone(
        """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
sys.path.insert(0, "tests")
from test_kernels import make_inputs, off, truth, VOCAB, TOKENS
from jaxbake.objectives import kernel, kernel_gpu
from jaxbake.objectives.inputs import prepare
kernel_gpu.TOKENS, kernel_gpu.WIDTH = 16, 16
mesh = jax.make_mesh((4,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
student, unembed, teacher = make_inputs()
size = -(-VOCAB // 4)
filled = np.concatenate([unembed, np.zeros((4 * size - VOCAB, unembed.shape[1]), np.float32)])
how, tokens, heads, _ = prepare(student, filled, teacher, None, np.ones(len(student)))
for f in (kernel.loss_and_grad, kernel_gpu.loss_and_grad):
    options = {"tiles": (16, 128)} if f is kernel.loss_and_grad else {}
    def local(tokens, heads):
        valid = jnp.clip(VOCAB - jax.lax.axis_index("tp") * size, 0, size)
        loss, grad = f(how, tokens, heads, valid=valid, axes=("tp",), interpret=True, **options)
        return loss, jax.lax.psum(grad, "tp")
    parts = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("tp")), out_specs=P(), check_vma=False)
    compiled = jax.jit(parts).lower(tokens, heads).compile()
    loss, grad = compiled(tokens, heads)
    true_loss, true_grad = truth(student, unembed, teacher)
    assert off(loss.sum(), true_loss) <= 1e-6 and off(grad, true_grad) <= 1e-6
    assert "all-gather" not in compiled.as_text()
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )


def test_the_gpu_kernels_lower_to_triton():
    student, unembed, teacher = (jnp.asarray(x, jnp.bfloat16) for x in make_inputs())
    how, tokens, heads, _ = prepare(student, unembed, teacher, None, np.ones(TOKENS))
    step = jax.jit(lambda t, h: kernel_gpu.loss_and_grad(how, t, h, interpret=False))
    text = step.trace(tokens, heads).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("kl_logits") and text.count("kl_terms")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_tpu_kernels_compile_for_every_generation():
    """For chips that are not there; what is at hand is chosen by the mesh in context."""
    run_alone(
        """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxbake.models.attention import Keys, Seen, attend
from jaxbake.objectives import fused_kl
for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    devices = topologies.get_topology_desc(name, platform="tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
    def kl(student, unembed, teacher, weights, implementation):
        def loss(student):
            return fused_kl(student, unembed, teacher, None, weights, implementation=implementation)[0]
        return jax.grad(loss)(student)
    def attention(q, k, v, prefix, positions):
        def loss(q, k, v, prefix):
            seen = Seen(positions, positions, positions, positions, first=positions - 100)
            blocks = [Keys(*prefix, Seen(positions, jnp.arange(prefix[0].shape[0]))), Keys(k, v, seen)]
            return attend(q, blocks, scale=0.1, softcap=30.0).astype(jnp.float32).sum()
        return jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, prefix)
    with jax.set_mesh(mesh):
        args = array(96, 256), array(700, 256), array(96, 256), array(96, dtype=jnp.float32)
        for implementation in ("auto", "pallas_recompute"):
            text = jax.jit(kl, static_argnums=4).lower(*args, implementation).compile().as_text()
            assert "kl_normalisers" in text and "kl_terms" in text, (name, implementation)
        own, prefix = [array(2, 200, 2, 64)] * 2, [array(150, 2, 64)] * 2
        rows = array(2, 200, 4, 64), *own, prefix, array(2, 200, dtype=jnp.int32)
        text = jax.jit(attention).lower(*rows).compile().as_text()
        assert "flash_forward" in text and "flash_backward" in text, name
""",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


def run_alone(script, **environment):
    """Runs a script in a process of its own, from the repository's root."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    root = Path(__file__).parents[1]
    environment["PYTHONPATH"] = str(root)
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
