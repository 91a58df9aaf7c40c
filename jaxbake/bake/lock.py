"""One bake at a time in an output folder: `lock.json` names its owner.

Locally the file is locked by the operating system (flock), which lets go however the owner ends. In an object store the
owner writes the file anew every few seconds; one that stands still is a dead owner's. So a killed run never has to be
cleaned up after.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from jaxbake import hosts
from jaxbake.errors import JaxbakeError
from jaxbake.files import AnyPath, is_remote, read_json, write_whole

FILE = "lock.json"
BEAT = 10.0
"""Seconds between two signs of life in an object store; after two and a half without one the owner is dead."""


@contextmanager
def owned(folder: AnyPath) -> Iterator[None]:
    """The folder is this bake's for the time of the block (process 0 holds it for all).

    Raises JaxbakeError naming the owner where another one has it.
    """
    release: list[Callable[[], None]] = []
    try:
        hosts.first(lambda: release.append((_take_remote if is_remote(folder) else _take_local)(folder)))
        yield
    finally:
        for let_go in release:
            let_go()


def _self() -> dict:
    began = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": began, "token": uuid.uuid4().hex}


def _refuse(folder: AnyPath, owner: dict) -> JaxbakeError:
    who = f"process {owner.get('process')} on {owner.get('host')}, since {owner.get('since')}"
    return JaxbakeError(f"{folder}: another bake is writing here ({who}); wait for it, or choose another output folder")


def _take_local(folder: Path) -> Callable[[], None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / FILE, "a+", encoding="utf-8")  # noqa: SIM115  (held open for as long as it is owned)
    except OSError as error:
        raise JaxbakeError(f"{folder}: cannot be written: {error.strerror or error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        text = file.read()
        file.close()
        raise _refuse(folder, json.loads(text) if text.endswith("\n") else {}) from None
    except OSError as error:
        raise JaxbakeError(f"{folder}: cannot be locked ({error.strerror}); choose another output folder") from error
    file.truncate(0)
    file.write(json.dumps(_self()) + "\n")
    file.flush()
    return file.close  # the file stays: removing it could take another's lock away


def _take_remote(folder: AnyPath) -> Callable[[], None]:
    path, me = folder / FILE, _self()
    if path.exists() and (owner := read_json(path)) != {}:
        deadline = time.monotonic() + 2.5 * BEAT
        while time.monotonic() < deadline:
            time.sleep(BEAT / 4)
            if not path.exists() or (now := read_json(path)) == {}:
                break
            if now != owner:
                raise _refuse(folder, now)
    write_whole(path, json.dumps({**me, "beat": 0}))
    time.sleep(BEAT / 10)  # of several that came at once, the one that wrote last has it
    if (owner := read_json(path)).get("token") != me["token"]:
        raise _refuse(folder, owner)
    ended = threading.Event()

    def live() -> None:
        beat = 0
        while not ended.wait(BEAT):
            beat += 1
            with suppress(JaxbakeError):  # a store out of reach for a moment is no reason to end the bake
                write_whole(path, json.dumps({**me, "beat": beat}))

    thread = threading.Thread(target=live, daemon=True)
    thread.start()

    def let_go() -> None:
        ended.set()
        thread.join()
        write_whole(path, "{}")

    return let_go
