"""How long a piece of Python takes in a process of its own, whatever else the machine is doing."""

from __future__ import annotations

import resource
import subprocess
import sys


def cpu_seconds(code: str) -> float:
    """Processor time of a new interpreter that runs the code: what it takes on a machine with nothing else to do."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
