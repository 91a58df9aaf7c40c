"""Time and memory of something run again and again, and what the machine could do at best."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp


@dataclass
class Clock:
    """Seconds of each run, waited for to the end: by the clock, and of all processors together in this process.

    On a machine that others use too, the second is the truer one.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def time(self, f: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        out = jax.block_until_ready(f())
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return out

    def figures(self, what: str) -> dict[str, float]:
        """Median, lowest and highest, the spread (between the quartiles, over the median), and the processor time."""
        low, median, high = quartiles(self.wall)
        return {
            f"median_{what}_s": median,
            f"min_{what}_s": min(self.wall),
            f"max_{what}_s": max(self.wall),
            "spread": (high - low) / median,
            f"median_{what}_cpu_s": statistics.median(self.cpu),
            f"timed_{what}s": len(self.wall),
        }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def peak_flops(dtype: str, tries: int = 4) -> float:
    """The most FLOPs a second that this machine reaches in products of square matrices of this dtype, as measured."""
    best = 0.0
    for size in (1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192):
        x = jnp.ones((size, size), dtype)
        product = jax.jit(jnp.matmul)
        jax.block_until_ready(product(x, x))
        clock = Clock()
        for _ in range(tries):
            clock.time(lambda product=product, x=x: product(x, x))
        best = max(best, 2 * size**3 / min(clock.wall))
    return best


def peak_memory_mb() -> float:
    """The most memory held so far: of the device where it keeps count, else of this process."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def machine() -> dict[str, Any]:
    """What it ran on."""
    device = jax.devices()[0]
    return {"platform": device.platform, "device": device.device_kind, "jax": jax.__version__, "threads": threads()}


def threads() -> int:
    """Processors this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
