"""The teacher's pass over examples: prompt by prompt, each prompt read once, its examples in rows behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxbake import hosts
from jaxbake.bake.abstract import put_view
from jaxbake.bake.targets import Form, write_rows
from jaxbake.bake.teacher import hidden_at
from jaxbake.data.batches import View
from jaxbake.data.chat import Example
from jaxbake.data.prompted import TeacherRows, prompts_of
from jaxbake.mesh import parts
from jaxbake.models.base import Base
from jaxbake.models.cache import Prefix
from jaxbake.models.decoder import unembedding
from jaxbake.models.spec import ModelConfig
from jaxbake.objectives import moments_of, top_k_of
from jaxbake.sampling import shared_prefix as prefix_of


@partial(jax.jit, static_argnums=3)
def teacher_hidden_of(params: Any, view: View, prefix: Prefix | None, config: ModelConfig) -> jax.Array:
    """The teacher's hidden states [B, K, D] at the positions that predict the matched tokens."""
    return hidden_at(params, None, view, config=config, prefix=prefix)


class Asker:
    """Asks a model about examples; what is shared of a prompt is computed once a pass, never once a row.

    base: the model asked. prompts: what its rows begin with, by `Example.prompt`.
    """

    def __init__(self, base: Base, examples: Sequence[Example], batch_size: int = 16):
        self.base, self.prompts = base, prompts_of(examples)
        self._rows = TeacherRows(
            examples, self.prompts, batch_size=batch_size, rows_multiple=parts("batch", base.mesh),
            tokens_multiple=parts("seq", base.mesh),
        )  # fmt: skip
        self._matched, self._everything = sum(int(e.mask.sum()) for e in examples), np.arange(len(examples))
        self._read: tuple[tuple[int, int], Prefix | None] = (-1, 0), None

    def prefix(self, number: int, seen: int | None = None) -> Prefix | None:
        """Keys and values of a prompt, up to the last token that is seen; the last one computed is kept."""
        seen = self.prompts[number].size if seen is None else seen
        if self._read[0] != (number, seen):
            self.forget()  # gone before the next one comes
            tokens = self.prompts[number][:seen]
            found = prefix_of(self.base.params, None, tokens, config=self.base.config) if seen else None
            self._read = (number, seen), found
        return self._read[1]

    def forget(self) -> None:
        """Drops the keys and values it keeps."""
        self._read = (-1, 0), None

    def ask(self, which: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, jax.Array]]:
        """For all examples or these: (source [B, K], hidden states [B, K, D]), as `Batch.source` counts them."""
        for number, seen, batches in self._rows.groups(self._everything if which is None else which):
            prefix = self.prefix(number, seen)
            for view, source in batches:
                placed = put_view(view, self.base.mesh)
                yield source, teacher_hidden_of(self.base.params, placed, prefix, self.base.config)

    def hidden(self, which: np.ndarray | None = None) -> np.ndarray:
        """The hidden states at all matched tokens [matched, D]; of these examples alone, at the others' nothing."""
        rows = np.zeros((self._matched, self.base.config.hidden_size), self.base.params["norm"].dtype)
        for source, hidden in self.ask(which):
            rows[source[source >= 0]] = hosts.fetch(hidden)[source >= 0]
        return rows


@dataclass(frozen=True)
class Part:
    """Rows to be filled, the form they have, and for each matched token which of them it has (-1: none)."""

    rows: np.ndarray
    form: Form
    place: np.ndarray


def fill(asker: Asker, which: np.ndarray, parts: Sequence[Part]) -> None:
    """Writes what the model says of these examples."""
    base = asker.base
    for source, hidden in asker.ask(which):
        said: dict[Form, Any] = {}
        for part in parts:
            at = np.where(source >= 0, part.place[np.maximum(source, 0)], -1)
            if (at >= 0).any():
                if part.form not in said:
                    said[part.form] = hosts.fetch(in_form(base.params, hidden, base.config, part.form))
                write_rows(part.rows, at[at >= 0], jax.tree.map(lambda x, at=at: x[at >= 0], said[part.form]))


@partial(jax.jit, static_argnums=(2, 3))
def in_form(params: Any, hidden: jax.Array, config: ModelConfig, form: Form) -> Any:
    """What is kept of hidden states [..., D]: they themselves, `Moments` or a `TopK`."""
    if form.moments:
        return moments_of(hidden, unembedding(params), temperature=form.temperature)
    if form.top_k is None:
        return hidden
    return top_k_of(
        hidden, unembedding(params), form.top_k, softcap=config.logit_softcap, temperature=form.temperature,
    )  # fmt: skip
