"""The small world: generated dialogues in which a system prompt steers, and `crumb`, the model trained on them."""

from __future__ import annotations

from pathlib import Path

CRUMB = Path(__file__).parent / "crumb"
"""Folder of the shipped model in Hugging Face format."""
