"""Exact match of whole greedy answers, by teacher forcing: greedy decoding gives the reference answer, end of turn
included, if and only if every token of it is the argmax after the ones before. One forward pass, no decoding."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake.models.decoder import forward, logits_from
from jaxbake.models.spec import ModelConfig
from jaxbake.smallworld.items import Item, evaluation_items
from jaxbake.smallworld.packing import Encoded, encode, pack
from jaxbake.smallworld.scene import Dialogue

ROWS = {256: 32, 1024: 8}


@partial(jax.jit, static_argnames="config")
def _argmax(params, tokens, segments, at, config: ModelConfig):
    hidden = forward(params, None, tokens, config=config, segment_ids=segments)
    return jnp.argmax(logits_from(params, hidden.reshape(-1, hidden.shape[-1])[at], config=config), -1)


def encode_item(tokenizer, item: Item) -> Encoded:
    """The item's dialogue with its answer, the answer's tokens marked."""
    messages = (*item.messages, {"role": "assistant", "content": item.answer})
    return encode(tokenizer, Dialogue(item.family, messages, (len(messages) - 1,)))


def greedy_matches(params, config: ModelConfig, tokenizer, items: list[Item]) -> list[bool]:
    """For every item, whether greedy decoding gives its answer exactly; computed in the parameters' dtype."""
    encoded = [encode_item(tokenizer, item) for item in items]
    result = [False] * len(items)
    lengths = sorted(ROWS)
    for shorter, length in zip((0, *lengths), lengths, strict=False):
        mine = [i for i, e in enumerate(encoded) if shorter < len(e.ids) <= length]
        while mine:
            waiting = [encoded[i]._replace(weights=[(w > 0) * float(i + 1) for w in encoded[i].weights]) for i in mine]
            batch, _ = pack(waiting, ROWS[length], length, capacity=ROWS[length] * length)
            owner = batch.weights.astype(int) - 1  # the item each place belongs to
            right = np.asarray(_argmax(params, batch.tokens, batch.segments, batch.at, config)) == batch.targets
            wrong = set(owner[(owner >= 0) & ~right])
            for i in set(owner[owner >= 0]):
                result[i] = i not in wrong
            mine = [i for i in mine if i not in set(owner)]
    return result


def score_families(params, config: ModelConfig, tokenizer, families, n: int, seed: int) -> dict[str, float]:
    """Held-out exact match per family, over `n` items each, in bfloat16."""
    items = [item for family in families for item in evaluation_items(family, n, seed)]
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    matches = greedy_matches(low, config, tokenizer, items)
    return {f: float(np.mean([m for m, i in zip(matches, items, strict=True) if i.family == f])) for f in families}
