"""Sampling: a KV cache, the prompt's prefix computed once for all rows, and one compiled loop."""

from jaxbake.sampling.generate import Generation, generate, shared_prefix
from jaxbake.sampling.text import sample, sample_ids, stream

__all__ = ["Generation", "generate", "sample", "sample_ids", "shared_prefix", "stream"]
