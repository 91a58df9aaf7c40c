"""A tiny random chat model with a byte tokenizer, and a small bake of it; as a script, it bakes into a folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np

from jaxbake.config import BakeConfig, LoraConfig, OptimizerConfig, RetentionConfig, SamplingConfig, TrainConfig
from jaxbake.mesh import sharding
from jaxbake.models.base import Base
from jaxbake.models.spec import ModelConfig, init_params, param_specs

SPECIALS = ["<pad>", "<s>", "<end>", "<system>", "<user>", "<assistant>"]
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
PROMPT = "You are a sailor. Say ahoy."
STIMULI = [f"{a} {b}?" for a in ("who is", "what is", "where is") for b in ("he", "it", "tom", "ann")]
PINS = ["add 2 and 3", "name a color"]
CONTEXTS = [("The sky is red.", ["sky?", "color?"]), ("Speak low.", ["hi"])]
CONFIG = BakeConfig(
    lora=LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj")),
    sampling=SamplingConfig(samples_per_stimulus=2, max_tokens=6, batch_size=8),
    retention=RetentionConfig(pins=0.1, contexts=0.2),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    train=TrainConfig(steps=24, batch_size=8, held_out=0.2, eval_every=8, checkpoint_every=6, max_length=128),
)


def tokenizer(template: str | None = TEMPLATE):
    """Bytes as tokens, after six special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<end>", pad_token="<pad>", chat_template=template
    )


@lru_cache
def tiny_base(template: str | None = TEMPLATE) -> Base:
    config = ModelConfig(
        family="llama", vocab_size=262, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8, max_positions=160, tie_embeddings=True, init_range=0.2,
    )  # fmt: skip
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    return Base(params, config, tokenizer(template), "digest of tiny", "tiny", Path("tiny"), (2,), 0)


def spread(base: Base, mesh) -> Base:
    """The same base, its parameters split over a mesh: each process keeps its own parts."""

    def put(x, spec):
        lies = sharding(spec.axes, mesh, spec.shape)
        return jax.make_array_from_callback(x.shape, lies, lambda index: np.asarray(x)[index])

    specs = param_specs(base.config)
    return replace(base, params=jax.tree.map(put, base.params, specs), mesh=mesh)


def tiny_bake(output=None, config: BakeConfig = CONFIG, **changes):
    from jaxbake.bake.loop import bake

    arguments = {"prompt": PROMPT, "stimuli": STIMULI, "pins": PINS, "contexts": CONTEXTS}
    return bake(changes.pop("base", tiny_base()), config=config, output=output, **{**arguments, **changes})


def with_train(config: BakeConfig = CONFIG, **changes) -> BakeConfig:
    return replace(config, train=replace(config.train, **changes))


def main(folder: str, steps: str) -> None:
    """The bake of that many steps; says on standard output where it is."""

    def say(stage, done, total, info):
        print(stage, done, flush=True)

    tiny_bake(folder, with_train(steps=int(steps), checkpoint_every=10, eval_every=25), progress=say)


if __name__ == "__main__":
    main(*sys.argv[1:])
