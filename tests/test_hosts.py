"""Several processes, preemption, and what is on disk after any kind of end."""

from __future__ import annotations

import os
import signal

import pytest
import tiny_base as tiny

from jaxbake import hosts
from jaxbake.bakery.store import load_delta
from jaxbake.errors import JaxbakeError, Preempted


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"coordinator": "h:1"}, "go together"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "not one of the 2 processes"),
        ({"pod": True, "process": 1}, "leave out"),
    ],
)
def test_start_refuses_what_does_not_fit(settings, says):
    with pytest.raises(JaxbakeError, match=says):
        hosts.start(**settings)


def test_sigterm_saves_and_leaves(tmp_path):
    """A single process: while sampling and in a step; then it goes on to the bitwise same delta."""
    before = signal.getsignal(signal.SIGTERM)

    def terminate(stage, at):
        def progress(now, done, total, info):
            if (now, done) == (stage, at):
                os.kill(os.getpid(), signal.SIGTERM)

        return progress

    try:
        for stage, at, says in (("sample", 8, "responses are kept"), ("bake", 9, "step 1[01] is saved")):
            hosts.start()
            with pytest.raises(Preempted, match=says):
                tiny.tiny_bake(tmp_path / "run", progress=terminate(stage, at))
        hosts.start()  # as a new process would
    finally:
        signal.signal(signal.SIGTERM, before)
    result, whole = tiny.tiny_bake(tmp_path / "run"), tiny.tiny_bake(tmp_path / "whole")
    assert result.card.delta_digest == whole.card.delta_digest
    assert result.metrics == whole.metrics
    assert load_delta(tmp_path / "run", tiny.tiny_base())[1] == result.card


def test_in_an_object_store(tmp_path, monkeypatch):
    """Bake, preemption, resume and both exports on gs://, equal to the local ones; nothing is ever renamed there."""
    import fake_gcs

    with fake_gcs.running(monkeypatch) as objects:
        result = tiny.tiny_bake("gs://bucket/run", tiny.with_train(steps=12))
        print(sorted(objects))
        whole = tiny.tiny_bake(tmp_path / "whole", tiny.with_train(steps=12))
        assert result.card.delta_digest == whole.card.delta_digest
