"""Meshes: the rule table, what is refused, and that a model spread over eight devices is the same model."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jaxbake.errors import JaxbakeError
from jaxbake.mesh import make_mesh

SCRIPT = """
import sys
import jax, numpy as np
from jaxbake.errors import JaxbakeError
from jaxbake.mesh import make_mesh, sharding
from jaxbake.models import families
from jaxbake.models.base import load, logits
from jaxbake.models.checkpoint import write_params
from jaxbake.models.spec import init_params

folder = sys.argv[1]
hf_config = dict(
    model_type="gemma2", vocab_size=98, hidden_size=24, intermediate_size=44, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=1, head_dim=10, sliding_window=5, initializer_range=0.2,
    attention_bias=True, tie_word_embeddings=False,
)
config = families.convert(hf_config)
params = init_params(jax.random.key(0), config)
write_params(params, config, folder, hf_config, "30KB")
tokens = np.random.default_rng(0).integers(0, 98, (4, 12)).astype(np.int32)
alone = load(folder)
expected = logits(alone, tokens)
assert len(jax.devices()) == 8 and float(expected.std()) > 0.3
for text in ("fsdp=4,tp=2", "replica=2,fsdp=2,tp=2"):
    mesh = make_mesh(text)
    base = load(folder, mesh=mesh)
    assert base.mesh is mesh and base.digest == alone.digest
    q = base.params["layers"]["q_proj"]
    fsdp, tp = mesh.shape["fsdp"], mesh.shape["tp"]
    assert {shard.data.shape for shard in q.addressable_shards} == {(3, 24 // fsdp, 60 // tp)}
    assert {shard.data.shape for shard in base.params["lm_head"].addressable_shards} == {(98 // tp, 24 // fsdp)}
    jax.tree.map(np.testing.assert_array_equal, base.params, params)
    np.testing.assert_allclose(logits(base, tokens), expected, rtol=0, atol=1e-5)
    rows = jax.device_put(tokens, sharding(("batch", "seq"), mesh, tokens.shape))
    np.testing.assert_allclose(logits(base, rows), expected, rtol=0, atol=1e-5)
    again = write_params(base.params, config, folder + "-again", hf_config)
    assert load(folder + "-again").digest == alone.digest
for text in ("tp=8", "fsdp=3,tp=2"):
    try:
        load(folder, mesh=make_mesh(text))
    except JaxbakeError as error:
        print(error)
"""


def test_eight_devices_agree_with_one(tmp_path):
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "mesh axis tp of size 8 does not divide the model's 6 attention heads",
        "mesh 'fsdp=3,tp=2': makes 6 devices of the 8 there are",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fdsp=2", "no axis 'fdsp'; did you mean 'fsdp'?"),
        ("fsdp", "fsdp = '' is no size"),
        ("fsdp=0", "fsdp = '0' is no size"),
        ("fsdp=2,fsdp=4", "names fsdp twice"),
        ("fsdp=1000", "makes 1000 devices"),
    ],
)
def test_wrong_meshes(text, message):
    with pytest.raises(JaxbakeError) as caught:
        make_mesh(text)
    assert message in str(caught.value)
