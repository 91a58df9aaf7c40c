"""Memory that nobody uses any more, given back to the system."""

from __future__ import annotations

import ctypes
import functools
import sys

COMPILED = "/jax/core/compile/backend_compile_duration"
SHORT = 0.1
"""Seconds; quicker compilations leave too little to be worth the search."""


@functools.cache
def trim_after_compiling() -> None:
    """From now on, what XLA's compiler has freed goes back to the system before the compiled program runs.

    The GNU C library keeps freed memory for itself, in an arena for each of the compiler's threads: hundreds of MiB
    that would lie idle beside the program's own. With other C libraries nothing is done.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return
    import jax.monitoring

    def compiled(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds > SHORT:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)
