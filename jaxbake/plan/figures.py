"""What a plan came to: the figures of each compiled program, and of the suggestion where the asked-for one misses."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from jaxbake.plan.chips import Topology, parse_topology
from jaxbake.plan.request import Request


@dataclass(frozen=True)
class Memory:
    """Bytes a chip. weights, state (delta and optimizer), inputs (rows, the prompt's keys and values, known targets):
    by their shardings. temporary (activations and all else), code, peak: the compiler's account; None for what it does
    not say of a program that does not fit."""

    weights: int
    state: int
    inputs: int
    hbm: int
    peak: int
    temporary: int | None = None
    code: int | None = None

    @property
    def over(self) -> int:
        """By how many bytes it misses; 0 where it fits."""
        return max(0, self.peak - self.hbm)


@dataclass(frozen=True)
class Figures:
    """One program. flops: of the matrix products, of all chips. cycles: estimated, of one chip; of one token for the
    sampler. bound: cycles that the flops alone would take. collectives: kind -> {"count", "bytes"} on a chip.
    waiting: those among them that the estimate leaves out. unestimated: runs of hand-written kernels, of which the
    compiler estimates nothing; `kernel_cycles`, a part of `cycles`, is what their products take at the chip's peak.
    tokens: response tokens a run."""

    program: str
    memory: Memory
    compile_seconds: float
    flops: int
    bound: int
    cycles: int | None = None
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    unestimated: int = 0
    kernel_cycles: int = 0
    tokens: int = 0

    @property
    def fits(self) -> bool:
        """Whether a chip's memory holds it."""
        return self.memory.over == 0

    @property
    def share(self) -> float | None:
        """Share of the bound: 1 would be nothing but products at the chip's peak."""
        return self.bound / self.cycles if self.cycles else None


@dataclass(frozen=True)
class Case:
    """A mesh, micro-batches and recomputation, with the figures of the programs compiled for them."""

    mesh: str
    micro_batches: int
    remat: bool
    figures: tuple[Figures, ...]

    @property
    def fits(self) -> bool:
        """Whether all of them fit."""
        return all(f.fits for f in self.figures)

    def __getitem__(self, program: str) -> Figures:
        return next(f for f in self.figures if f.program == program)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, what is derived included."""
        figures = [
            {**asdict(f), "fits": f.fits, "bound_share": f.share, "memory": {**asdict(f.memory), "over": f.memory.over}}
            for f in self.figures
        ]
        return {"mesh": self.mesh, "micro_batches": self.micro_batches, "remat": self.remat, "fits": self.fits,
                "programs": figures}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The case asked for, those tried after it where it did not fit, and the one suggested."""

    request: Request
    parameters: int
    asked: Case
    tried: tuple[Case, ...] = ()

    @property
    def topology(self) -> Topology:
        """Where it is to run."""
        return parse_topology(self.request.topology, self.request.slices)

    @property
    def best(self) -> Case | None:
        """The asked-for case where it fits, else the first tried one that does."""
        return next((case for case in (self.asked, *self.tried) if case.fits), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        request = self.request
        return {
            "model": request.name,
            "parameters": self.parameters,
            "topology": request.topology,
            "slices": request.slices,
            "chips": self.topology.total,
            "dtype": request.dtype,
            "sizes": asdict(request.sizes),
            "rank": request.bake.lora.rank,
            "fits": self.asked.fits,
            "asked": self.asked.to_dict(),
            "tried": [case.to_dict() for case in self.tried],
            "suggestion": self.best.to_dict() if self.best and not self.asked.fits else None,
        }

    def __rich__(self):
        from jaxbake.plan.report import render

        return render(self)
