"""The bake: teacher, step, roll-out, loop.

Python binds this room to the name `jaxbake.bake` as soon as any module in it is imported, and `jaxbake.bake(...)` is
also the public function of `bake.loop`. So the room can be called, and both readings of the name hold.
"""

from __future__ import annotations

import sys
from types import ModuleType


class _CallableRoom(ModuleType):
    def __call__(self, *args, **kwargs):
        from jaxbake.bake.loop import bake

        return bake(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableRoom
