"""Fixtures shared by all tests: tiny models, the embedded model, and real data where it is at hand."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

from jaxbake.models.spec import ModelConfig, init_params

ROOT = Path(__file__).parents[1]

# Compiling is most of the suite's time: programs are kept between workers and runs.
jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / f"jaxbake-tests-{os.getuid()}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def real_dir() -> Path:
    """Real models, tokenizers and data, which stand beside the repository on some machines only."""
    path = ROOT.parent / "shared" / "real"
    if not path.is_dir():
        pytest.skip("no real models beside this checkout")
    return path


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """A Llama of two layers with an odd head count and a head_dim of its own."""
    return ModelConfig(
        family="llama", vocab_size=97, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=6,
        num_kv_heads=3, head_dim=8, max_positions=256, tie_embeddings=True, init_range=0.2,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    return init_params(jax.random.key(0), tiny_config)
