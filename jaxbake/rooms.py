"""Modules that can be called: `jaxbake.bake` and `jaxbake.mesh` are rooms, and functions of the public surface too.

Python binds a room to its name in `jaxbake` as soon as anything in it is imported, so the name cannot be the function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(module: str, function: Callable) -> None:
    """Makes calling an imported module, by its name, call the function."""

    class CallableRoom(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    sys.modules[module].__class__ = CallableRoom
