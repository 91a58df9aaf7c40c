"""Divergences between a teacher's and a student's next-token distributions, from hidden states to (sum, count)."""

from jaxbake.objectives.fused import fused_kl, fused_metrics
from jaxbake.objectives.inputs import DIVERGENCES, default_chunk_size
from jaxbake.objectives.reference import reference_kl

__all__ = ["DIVERGENCES", "default_chunk_size", "fused_kl", "fused_metrics", "reference_kl"]
