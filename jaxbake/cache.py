"""Where compiled programs are kept between runs, so that the second one starts at once. Does not import jax."""

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
    """Lets jax keep compiled programs; returns where, or None if it does not.

    where: a folder, a bucket ("gs://...", one for all hosts of a pod), or "off"; by default the environment variable
    JAXBAKE_CACHE, else what jax itself was told (JAX_COMPILATION_CACHE_DIR, or by `jax.config`), else the user's cache
    folder, of which at most 4 GiB are used.
    """
    where = where or os.environ.get(VARIABLE)
    if where and where.lower() in _OFF:
        _tell("JAX_ENABLE_COMPILATION_CACHE", False)
        return None
    if not where and (known := _told("JAX_COMPILATION_CACHE_DIR")):
        return known
    where = where or str(user_folder() / "compiled")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        _tell("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 0.5)
    if "://" not in where and "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        _tell("JAX_COMPILATION_CACHE_MAX_SIZE", MOST_BYTES)
    _tell("JAX_COMPILATION_CACHE_DIR", where)
    return where


def _told(name: str) -> str | None:
    """What jax, imported or not yet, takes this setting to be."""
    jax = sys.modules.get("jax")
    return os.environ.get(name) if jax is None else getattr(jax.config, name.lower())


def _tell(name: str, value: str | float | bool) -> None:
    os.environ[name] = str(value)  # read when jax is imported: here, if that is still to come, and in child processes
    if (jax := sys.modules.get("jax")) is not None:
        jax.config.update(name.lower(), value)
