"""The bake: teacher, step, roll-out, loop."""

from __future__ import annotations

from typing import Any

from jaxbake.rooms import make_callable


def _bake(*args: Any, **kwargs: Any) -> Any:
    from jaxbake.bake.loop import bake  # here, since it takes its time

    return bake(*args, **kwargs)


make_callable(__name__, _bake)
