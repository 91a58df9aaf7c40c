"""What is measured: a model of some sizes, and the floating-point work that it cannot avoid."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake.bench.sizes import Shape
from jaxbake.errors import JaxbakeError
from jaxbake.files import read_json
from jaxbake.models import families
from jaxbake.models.spec import ModelConfig, is_param, linear_shapes, param_specs

DTYPES = ("float32", "bfloat16")


def model_config(shape: Shape, folder: Path | None = None) -> ModelConfig:
    """The model's config: a Llama of the shape, or that of a `config.json` (a file, or a folder that has one)."""
    if folder is not None:
        path = folder / "config.json" if folder.is_dir() else folder
        return families.convert(read_json(path))
    return ModelConfig(
        family="llama", vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.ffn,
        num_layers=shape.layers, num_heads=shape.heads, num_kv_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_positions=max(2048, shape.prompt_len + shape.question_len + shape.response_len),
    )  # fmt: skip


def random_params(config: ModelConfig, dtype: str, seed: int) -> dict:
    """Random parameters, drawn leaf by leaf so that making them takes little more memory than holding them."""
    if dtype not in DTYPES:
        raise JaxbakeError(f"--dtype {dtype}: is none of {', '.join(DTYPES)}")
    random = np.random.default_rng(seed)

    def draw(spec):
        if spec.init != "normal":
            return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, dtype)
        values = random.random(spec.shape, np.float32)  # uniform: quick to draw, and only its spread matters
        values -= 0.5
        values *= config.init_range * 12**0.5
        return jax.device_put(values.astype(jnp.dtype(dtype), copy=False))

    return jax.tree.map(draw, param_specs(config), is_leaf=is_param)


def necessary_flops(config: ModelConfig, shape: Shape, rank: int, *, cached: bool) -> float:
    """Matrix-product FLOPs (a multiply-add is 2) of one step that no arrangement of it avoids.

    Attention over its true causal context, nothing recomputed, no gradient of the base, the vocabulary at response
    tokens alone: teacher, student, and the gradient of the student's hidden states. (A step that knows the teacher's
    `Moments` does without the first of the three.) cached: the teacher was asked before; otherwise its pass is counted,
    behind the prompt's cached keys and values.
    """
    shapes = [(size_in, size_out) for (size_in, _), (size_out, _) in linear_shapes(config).values()]
    weights = config.num_layers * sum(i * o for i, o in shapes)
    low_rank = config.num_layers * sum(rank * (i + o) for i, o in shapes)
    tokens = shape.question_len + shape.response_len

    def attention(past: int) -> float:
        context = tokens * past + tokens * (tokens + 1) / 2
        return 4 * config.num_heads * config.head_dim * context * config.num_layers

    teacher = 0 if cached else 2 * weights * tokens + attention(shape.prompt_len)
    student = (4 * weights + 6 * low_rank) * tokens + 3 * attention(0)
    head = 6 * shape.response_len * config.vocab_size * config.hidden_size
    return float(shape.batch * (teacher + student + head))
