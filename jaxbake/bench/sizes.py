"""The sizes that are measured: no jax is imported here, for the command line's sake."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from jaxbake.errors import JaxbakeError


@dataclass(frozen=True)
class Shape:
    """A Llama of these sizes, and rows of `question_len + response_len` tokens behind a prompt of `prompt_len`."""

    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 688
    vocab: int = 4096
    prompt_len: int = 128
    question_len: int = 32
    response_len: int = 64
    batch: int = 8

    def __post_init__(self):
        for field in fields(self):
            if (value := getattr(self, field.name)) < (0 if field.name == "prompt_len" else 1):
                raise JaxbakeError(f"--{field.name.replace('_', '-')}: {value} is too small")
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise JaxbakeError(
                f"--hidden {self.hidden} --heads {self.heads} --kv-heads {self.kv_heads}: each must be a multiple of "
                "the next"
            )


SIZES = {
    "S": Shape(),
    "M": Shape(8, 512, 8, 4, 1376, 32_000, 512, 32, 128, 8),
    "L": Shape(12, 768, 12, 4, 2048, 128_256, 1024, 32, 128, 4),
}


def make_shape(size: str | None, changes: dict[str, int | None]) -> Shape:
    """A size of `SIZES` with some fields changed (None: not). Raises JaxbakeError for what makes no model."""
    if size is not None and size not in SIZES:
        raise JaxbakeError(f"--size {size}: is none of {', '.join(SIZES)}")
    return replace(SIZES[size or "S"], **{name: value for name, value in changes.items() if value is not None})
