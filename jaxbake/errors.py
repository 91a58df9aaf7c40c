"""Errors a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class JaxbakeError(Exception):
    """Something the user gave is wrong; the message names it, says what is wrong and what would be right."""


class TrainingDiverged(JaxbakeError):
    """The loss became NaN or infinite; the last good state has been kept."""


class Preempted(Exception):
    """SIGTERM came; everything is saved, and the same command continues."""


class PeerLost(Exception):
    """Another process of the bake is gone or cannot be reached."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint naming the closest known word, or the known words when none is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
