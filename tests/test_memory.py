"""Freed memory goes back to the system after a compilation, before its program runs."""

import ctypes
from types import SimpleNamespace

import jax.monitoring
import pytest

from jaxbake import memory


@pytest.mark.skipif("not __import__('sys').platform.startswith('linux')")
def test_long_compilations_are_followed_by_a_trim(monkeypatch):
    trims = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=trims.append))
    memory.trim_after_compiling.__wrapped__()
    jax.monitoring.record_event_duration_secs(memory.COMPILED, memory.SHORT / 2)
    jax.monitoring.record_event_duration_secs("/another/event", 1.0)
    assert trims == []
    jax.monitoring.record_event_duration_secs(memory.COMPILED, 2 * memory.SHORT)
    assert trims == [0]


def test_the_event_is_the_one_that_jax_records():
    seen = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: seen.append(event))
    jax.jit(lambda x: x * 3 + seen.__len__())(1.0).block_until_ready()
    assert memory.COMPILED in seen


def test_without_the_gnu_library_nothing_is_done(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    memory.trim_after_compiling.__wrapped__()
