"""Divergences between a teacher's and a student's next-token distributions, from hidden states to (sum, count)."""

from jaxbake.objectives.fused import fused_kl, fused_metrics
from jaxbake.objectives.inputs import DIVERGENCES, Moments, SoftTargets, TopK, default_chunk_size
from jaxbake.objectives.moments import moments_of
from jaxbake.objectives.reference import reference_kl
from jaxbake.objectives.top import top_k_of

__all__ = [
    "DIVERGENCES",
    "Moments",
    "SoftTargets",
    "TopK",
    "default_chunk_size",
    "fused_kl",
    "fused_metrics",
    "moments_of",
    "reference_kl",
    "top_k_of",
]
