"""Where compiled programs are kept between runs, so that the second one starts at once. Imports no jax."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "JAXBAKE_CACHE"
HUGE_PAGES = "JAXBAKE_HUGE_PAGES"
"""Set where GLIBC_TUNABLES is jaxbake's own doing (see `jaxbake.cli`), so that other programs need not inherit it."""
MOST_BYTES = 4 << 30
_OFF = ("off", "no", "none", "false", "0")


def user_folder() -> Path:
    """The user's folder for files that can be made again, as the system has it."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jaxbake"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "jaxbake" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxbake"


def keep_compiled(where: str | None = None) -> str | None:
    """Lets jax, not imported yet, keep compiled programs; returns where, or None if it does not.

    where: a folder, a bucket ("gs://...", one for all hosts of a pod), or "off"; by default the environment variable
    JAXBAKE_CACHE, else what jax itself was told (JAX_COMPILATION_CACHE_DIR), else the user's cache folder, of which at
    most 4 GiB are used.
    """
    where = where or os.environ.get(VARIABLE)
    if where and where.lower() in _OFF:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return None
    if not where and (known := os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        return known
    where = where or str(user_folder() / "compiled")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = where
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    if "://" not in where:
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MOST_BYTES))
    return where
