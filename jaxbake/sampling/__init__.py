"""Sampling: a KV cache, the prompt's prefix computed once for all rows, and one compiled loop."""

from jaxbake.sampling.generate import Generation, generate, shared_prefix

__all__ = ["Generation", "generate", "shared_prefix"]
