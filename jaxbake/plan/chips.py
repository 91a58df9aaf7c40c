"""The TPUs that can be planned for: memory, matrix peak, and how their slices are named."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jaxbake.errors import JaxbakeError, did_you_mean


@dataclass(frozen=True)
class Chip:
    """One chip. hbm: bytes a program may use, as the compiler accounts them. flops_per_cycle: bfloat16 products at its
    peak; hertz: the clock. The two multiplied are the vendor's peak (197, 459 and 918 TFLOP/s)."""

    name: str
    hbm: int
    flops_per_cycle: int
    hertz: float


_GIB = 1 << 30
CHIPS = {
    "v5e": Chip("TPU v5e", int(15.75 * _GIB), 2 * 4 * 128 * 128, 1.5e9),
    "v5p": Chip("TPU v5p", int(95.74 * _GIB), 2 * 8 * 128 * 128, 1.75e9),
    "v6e": Chip("TPU v6e", int(31.25 * _GIB), 2 * 4 * 256 * 256, 1.75e9),
}


@dataclass(frozen=True)
class Topology:
    """Chips joined as the text says ("v5e:4x4"), so many such slices of them."""

    text: str
    chip: Chip
    chips: int
    slices: int = 1

    @property
    def total(self) -> int:
        """Chips in all."""
        return self.chips * self.slices


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Reads "v5e:4x4" or "v5p:2x2x2". Raises JaxbakeError for an unknown generation or sizes that are none."""
    generation, _, grid = text.partition(":")
    if generation not in CHIPS:
        raise JaxbakeError(f"--topology '{text}': no TPU '{generation}'; {did_you_mean(generation, CHIPS)}")
    dims = 3 if generation == "v5p" else 2
    if not re.fullmatch(r"\d+(x\d+)*", grid) or grid.count("x") + 1 != dims:
        example = "2x2x2" if dims == 3 else "4x4"
        raise JaxbakeError(f"--topology '{text}': a {generation} slice has {dims} sizes, as {generation}:{example}")
    if slices < 1:
        raise JaxbakeError(f"--slices {slices}: must be at least 1")
    return Topology(text, CHIPS[generation], math.prod(int(size) for size in grid.split("x")), slices)
