"""The kernels, interpreted, against the definition in float64; with libtpu, compiled for the chips they are for."""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbake.errors import JaxbakeError
from jaxbake.objectives import DIVERGENCES, fused_kl, kernel_cpu, kernel_gpu, reference_kl, tiles
from jaxbake.objectives import kernel as kernel_tpu
from jaxbake.objectives.inputs import prepare

KERNELS = ("pallas", "pallas_recompute", "gpu", "tiled")
BETWEEN = ("forward", "reverse", "jsd")
TOKENS, VOCAB, WIDTH = 40, 421, 32
TARGETS = np.random.default_rng(7).integers(0, VOCAB, TOKENS)


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


def kernel(student, unembed, teacher, teacher_unembed=None, *, which="pallas", divergence="forward", settings=None):
    """(loss [C], gradient [C, D]) by a kernel in small tiles."""
    args = student, unembed, teacher, teacher_unembed, np.ones(len(student))
    how, tokens, heads, _ = prepare(*args, **{"targets_N": TARGETS, "divergence": divergence, **(settings or {})})
    return by_kernel(how, tokens, heads, which)


@partial(jax.jit, static_argnames=("how", "which"))
def by_kernel(how, tokens, heads, which):
    if which == "gpu":
        return kernel_gpu.loss_and_grad(how, tokens, heads, interpret=True)
    if which == "tiled":
        return kernel_cpu.loss_and_grad(how, tokens, heads)
    recompute = which == "pallas_recompute"
    return kernel_tpu.loss_and_grad(how, tokens, heads, recompute=recompute, tiles=(16, 128), interpret=True)


def truth(student, unembed, teacher, teacher_unembed=None, divergence="forward", settings=None):
    settings = {"targets_N": TARGETS, "divergence": divergence, **(settings or {})}
    with jax.enable_x64(True):
        arrays = [None if x is None else np.asarray(x, np.float64) for x in (unembed, teacher, teacher_unembed)]

        def loss(student):
            return reference_kl(student, *arrays, np.ones(len(teacher)), **settings)[0]

        return jax.value_and_grad(loss)(np.asarray(student, np.float64))


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", 64)  # no divisor of the vocabulary: the last two overlap
    for name, size in {"TOKENS": 16, "VOCAB": 128, "WIDTH": 16}.items():
        monkeypatch.setattr(kernel_gpu, name, size)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("which", KERNELS)
def test_agrees_with_a_float64_reference(which, divergence):
    for logit_std in (1.0, 5.0):
        arrays = make_inputs(logit_std)
        loss, grad = kernel(*arrays, which=which, divergence=divergence)
        true_loss, true_grad = truth(*arrays, divergence=divergence)
        assert loss.dtype == grad.dtype == jnp.float32
        assert off(loss.sum(), true_loss) <= 1e-6
        assert off(grad, true_grad) <= 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("which", KERNELS)
def test_a_teacher_of_another_width_softened_and_capped(which, divergence):
    student, unembed, _ = make_inputs()
    _, teacher_unembed, teacher = make_inputs(width=24, seed=1)
    settings = {"softcap": 6.0, "teacher_softcap": 9.0, "temperature": 1.7, "beta": 0.3}
    arrays = student, unembed, teacher, teacher_unembed
    loss, grad = kernel(*arrays, which=which, divergence=divergence, settings=settings)
    true_loss, true_grad = truth(*arrays, divergence=divergence, settings=settings)
    assert off(loss.sum(), true_loss) <= 1e-6
    assert off(grad, true_grad) <= 1e-6


@pytest.mark.parametrize("divergence", BETWEEN)
@pytest.mark.parametrize("which", KERNELS)
def test_a_small_divergence_keeps_its_digits_and_none_is_exactly_none(which, divergence):
    student, unembed, teacher = make_inputs(1.0, near=0.01)
    loss, _ = kernel(student, unembed, teacher, which=which, divergence=divergence)
    assert off(loss.sum(), truth(student, unembed, teacher, divergence=divergence)[0]) <= 2e-6
    loss, grad = kernel(teacher, unembed, teacher, which=which, divergence=divergence)
    assert jnp.abs(loss).max() <= (1e-12 if divergence == "jsd" else 0)  # it goes by way of log 1/2
    assert (grad == 0).all()


@pytest.mark.parametrize("divergence", ["reverse", "jsd"])
@pytest.mark.parametrize("which", KERNELS)
def test_a_gradient_keeps_its_digits_where_one_token_has_nearly_all(which, divergence):
    """All but 1e-6 of it or so: there the mean is that token's own value but for what its rounding would hide."""
    student, unembed, teacher = make_inputs(5.0)
    places = np.arange(TOKENS)
    student = unembed[places] * 24 / np.square(unembed[places]).sum(1, keepdims=True) + 0.01 * student
    logits = np.float64(student) @ np.float64(unembed).T
    rest = np.sort(np.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)[:, :-1].sum(axis=1)
    assert 1e-8 < np.median(rest) < 1e-4
    _, grad = kernel(student, unembed, teacher, which=which, divergence=divergence)
    _, true_grad = truth(student, unembed, teacher, divergence=divergence)
    assert max(off(g, t) for g, t in zip(grad, true_grad, strict=True)) <= 2e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("which", KERNELS)
def test_bfloat16_and_extreme_logits(which, divergence):
    halves = [jnp.asarray(x, jnp.bfloat16) for x in make_inputs(2.0)]
    loss, grad = kernel(*halves, which=which, divergence=divergence)
    singles = [x.astype(jnp.float32) for x in halves]
    true_loss, true_grad = kernel(*singles, which=which, divergence=divergence)
    assert off(loss, true_loss) <= 1e-6
    assert off(grad, true_grad) <= 5e-3
    loss, grad = kernel(*make_inputs(300.0), which=which, divergence=divergence)
    assert jnp.isfinite(loss).all()
    assert jnp.isfinite(grad).all()


@pytest.mark.parametrize("which", KERNELS)
def test_a_target_outside_the_vocabulary_has_no_loss(which):
    targets = TARGETS.copy()
    targets[[2, 5]] = -1, VOCAB  # the second within the last tile's padding
    loss, grad = kernel(*make_inputs(), which=which, divergence="cross_entropy", settings={"targets_N": targets})
    unknown = np.isin(np.arange(TOKENS), (2, 5))
    assert (jnp.isnan(loss) == unknown).all()
    assert (jnp.isnan(grad).all(axis=1) == unknown).all()
    assert (jnp.isnan(grad).any(axis=1) == unknown).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_through_fused_kl(divergence):
    """Value and gradient of the objective, weights and all, whichever way; what has no kernel is an error."""
    student, unembed, teacher = make_inputs()
    student[3] = np.nan
    weights = np.where(np.arange(TOKENS) == 3, 0.0, np.linspace(0.2, 2.0, TOKENS))

    def step(implementation, student=student):
        def loss(student, weights):
            how = {"implementation": implementation, "chunk_size": 24, "divergence": divergence, "targets_N": TARGETS}
            return fused_kl(student, unembed, teacher, None, weights, **how)[0]

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(student, weights)

    value, grads = step("xla")
    for implementation in ("pallas", "pallas_recompute"):
        value_, grads_ = step(implementation)
        assert off(value_, value) <= 1e-6
        assert off(grads_[0], grads[0]) <= 1e-6
        assert off(grads_[1], grads[1]) <= 1e-6
    with pytest.raises(JaxbakeError, match=r"'pallas' has kernels .* bfloat16 and float32 only; here .* in float16"):
        step("pallas", student=student.astype(np.float16))
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
from test_kernels import DIVERGENCES, TARGETS, VOCAB, make_inputs, off, truth
from jaxbake.objectives import kernel, kernel_gpu
from jaxbake.objectives.inputs import prepare
kernel_gpu.TOKENS, kernel_gpu.WIDTH = 16, 16
mesh = jax.make_mesh((4,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
student, unembed, teacher = make_inputs()
size = -(-VOCAB // 4)
filled = np.concatenate([unembed, np.zeros((4 * size - VOCAB, unembed.shape[1]), np.float32)])
for divergence in DIVERGENCES:
    settings = {"targets_N": TARGETS, "divergence": divergence}
    how, tokens, heads, _ = prepare(student, filled, teacher, None, np.ones(len(student)), **settings)
    for f in (kernel.loss_and_grad, kernel_gpu.loss_and_grad):
        options = {"tiles": (16, 128)} if f is kernel.loss_and_grad else {}
        def local(tokens, heads):
            first = jax.lax.axis_index("tp") * size
            valid = jnp.clip(VOCAB - first, 0, size)
            heads = heads._replace(first=first)
            loss, grad = f(how, tokens, heads, valid=valid, axes=("tp",), interpret=True, **options)
            return loss, jax.lax.psum(grad, "tp")
        parts = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("tp")), out_specs=P(), check_vma=False)
        compiled = jax.jit(parts).lower(tokens, heads).compile()
        loss, grad = compiled(tokens, heads)
        true_loss, true_grad = truth(student, unembed, teacher, divergence=divergence)
        assert off(loss.sum(), true_loss) <= 1e-6 and off(grad, true_grad) <= 1e-6, (divergence, f)
        assert "all-gather" not in compiled.as_text()
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gpu_kernels_lower_to_triton(divergence):
    student, unembed, teacher = (jnp.asarray(x, jnp.bfloat16) for x in make_inputs())
    settings = {"targets_N": TARGETS, "divergence": divergence}
    how, tokens, heads, _ = prepare(student, unembed, teacher, None, np.ones(TOKENS), **settings)
    step = jax.jit(lambda t, h: kernel_gpu.loss_and_grad(how, t, h, interpret=False))
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu)):  # jax 0.11 asks whose
        text = step.trace(tokens, heads).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("kl_logits") and text.count("kl_terms")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_tpu_kernels_compile_for_every_generation():
    """For chips that are not there; what is at hand is chosen by the mesh in context."""
    run_alone(
        """
import itertools
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxbake.models.attention import Keys, Seen, attend
from jaxbake.objectives import DIVERGENCES, fused_kl
for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    devices = topologies.get_topology_desc(name, platform="tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
    def kl(student, unembed, teacher, weights, targets, **how):
        def loss(student):
            return fused_kl(student, unembed, teacher, None, weights, targets_N=targets, **how)[0]
        return jax.grad(loss)(student)
    def attention(q, k, v, prefix, positions):
        def loss(q, k, v, prefix):
            seen = Seen(positions, positions, positions, positions, first=positions - 100)
            blocks = [Keys(*prefix, Seen(positions, jnp.arange(prefix[0].shape[0]))), Keys(k, v, seen)]
            return attend(q, blocks, scale=0.1, softcap=30.0).astype(jnp.float32).sum()
        return jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, prefix)
    with jax.set_mesh(mesh):
        args = array(96, 256), array(700, 256), array(96, 256), array(96, dtype=jnp.float32), array(96, dtype=jnp.int32)
        for how in itertools.product(DIVERGENCES, ("auto", "pallas_recompute")):
            step = jax.jit(partial(kl, divergence=how[0], implementation=how[1]))
            text = step.lower(*args).compile().as_text()
            assert "kl_normalisers" in text and "kl_terms" in text, (name, how)
            assert ("kl_means" in text) == (how[0] in ("reverse", "jsd")), (name, how)
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
