"""Another model as teacher: known by its digest and its tokenizer, its weights read only when it is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxbake.data.chat import end_of_turn, has_template
from jaxbake.errors import JaxbakeError
from jaxbake.files import read_json
from jaxbake.models import checkpoint, families
from jaxbake.models.base import Base, find_folder, load, load_tokenizer
from jaxbake.models.spec import ModelConfig


class Other:
    """A model of the base's vocabulary that is asked in its stead.

    given: a `Base`, or what `load` takes as a name: its weights are then read when it is first asked, in the base's
    dtype and on its mesh, and `let_go` drops them again. name, digest, config and tokenizer are known at once.

    Raises JaxbakeError where there is no such model, its tokenizer is missing or has another vocabulary than the
    base's, or its responses end with a token that the base goes on after.
    """

    def __init__(self, given: Base | str, base: Base):
        self._base, self._loaded = base, None
        if isinstance(given, Base):
            self._loaded = given
            self.name, self.digest, self.config, self.tokenizer = (
                given.name,
                given.digest,
                given.config,
                given.tokenizer,
            )
        else:
            folder = find_folder(str(given))
            if not (folder / "config.json").is_file():
                raise JaxbakeError(f"teacher: {folder}: no config.json; a model folder in Hugging Face format has one")
            self.name, self.config = str(given), families.convert(read_json(folder / "config.json"))
            self.digest, self.tokenizer = checkpoint.digest(folder, self.config), load_tokenizer(folder)
        check_vocabulary(base, self.name, self.config, self.tokenizer)

    def load(self) -> Base:
        """The model, its weights read."""
        if self._loaded is None:
            self._loaded = load(self.name, dtype=self._base.params["norm"].dtype, mesh=self._base.mesh)
        self._loaded = _cut(self._loaded, self._base.config.vocab_size)
        return self._loaded

    def let_go(self) -> None:
        """Drops the weights; a `Base` that was given is the giver's to drop as well."""
        self._loaded = None


def _cut(model: Base, size: int) -> Base:
    """The model without rows of its embeddings that the base has no token for: fillers, that nothing may sample."""
    if model.config.vocab_size <= size:
        return model
    cut = {name: model.params[name][:size] for name in ("embed_tokens", "lm_head") if name in model.params}
    return replace(model, params={**model.params, **cut}, config=replace(model.config, vocab_size=size))


def check_vocabulary(base: Base, name: str, config: ModelConfig, tokenizer: Any) -> None:
    """Raises JaxbakeError where a model of this configuration and tokenizer cannot teach the base."""
    if tokenizer is None:
        raise JaxbakeError(f"teacher: {name} has no tokenizer; a teacher needs one with the vocabulary of {base.name}")
    mine, its = base.tokenizer.get_vocab(), tokenizer.get_vocab()
    if mine != its:
        token = min((t for t in mine.keys() | its.keys() if mine.get(t) != its.get(t)), key=lambda t: (len(t), t))
        raise JaxbakeError(
            f"teacher: {name} has another vocabulary than {base.name} ({len(its)} tokens and {len(mine)}; {token!r} is "
            f"{its.get(token)} there, {mine.get(token)} here); distributions over different tokens cannot be compared: "
            "take a teacher of the same family"
        )
    if max(its.values()) >= min(config.vocab_size, base.config.vocab_size):
        raise JaxbakeError(f"teacher: {name}'s tokenizer has tokens that its model or {base.name} has no logits for")
    end = end_of_turn(tokenizer) if has_template(tokenizer) else tokenizer.eos_token_id
    if end is not None and end not in base.eos_ids:
        raise JaxbakeError(
            f"teacher: {name} ends a response with {tokenizer.convert_ids_to_tokens(end)!r}, after which {base.name} "
            "would go on; take a base whose generation_config.json lists it in eos_token_id"
        )
