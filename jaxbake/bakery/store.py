"""Deltas on disk: Orbax arrays beside their card, checked against the base and their own digest when read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake import hosts
from jaxbake.bakery.card import FILE, Card, make_card
from jaxbake.deltas.lora import Delta, check_fits, delta_digest
from jaxbake.deltas.peft import CONFIG_FILE, load_peft, lora_from_dict
from jaxbake.errors import JaxbakeError
from jaxbake.files import AnyPath, as_path, is_remote, local_copy, whole_folder

WEIGHTS = "weights"

__all__ = ["delta_digest", "delta_folder", "load_delta", "read_card", "save_delta"]


def save_delta(delta: Delta, card: Card, folder: str | AnyPath) -> AnyPath:
    """Writes `folder`: the factors and scale with Orbax, and card.json; whole or not at all. Returns the folder.

    All processes call it. Raises JaxbakeError where the card is another delta's, or the folder cannot
    be written or holds something else.
    """
    from orbax.checkpoint import v1 as ocp

    folder, delta = as_path(folder), hosts.fetch(delta)
    if card.delta_digest != delta_digest(delta):
        raise JaxbakeError(f"{folder}: the card '{card.name}' is of another delta; make one for this with make_card")
    # Orbax saves with all processes or not at all: they share the folder, or the place in the object store.
    straight = is_remote(folder) and jax.process_count() > 1
    with hosts.led(_in_place(folder) if straight else whole_folder(folder, last=FILE)) as work:
        try:
            ocp.save(as_path(work) / WEIGHTS, {"factors": delta.factors, "scale": delta.scale})
        except Exception as error:  # Orbax and TensorStore raise many kinds for a disk that is full or fails
            raise JaxbakeError(f"{folder}: cannot be written: {_first_line(error)}") from error
        hosts.first(lambda: card.save(as_path(work) / FILE))
    return folder


@contextmanager
def _in_place(folder: AnyPath) -> Iterator[AnyPath]:
    """The folder itself, empty. In it, too, the card comes last, and Orbax marks its own folder as whole."""
    if folder.exists():
        (folder / FILE).unlink(missing_ok=True)
        folder.rmtree()
    yield folder


def delta_folder(folder: str | AnyPath) -> AnyPath:
    """Where the delta of a bake's output folder, a delta folder or a PEFT folder stands. JaxbakeError if nowhere."""
    folder = as_path(folder)
    for candidate in (folder, folder / "delta"):
        whole = not is_remote(folder) or (candidate / FILE).exists()  # in an object store the card comes last
        if (whole and (candidate / WEIGHTS).is_dir()) or (candidate / CONFIG_FILE).exists():
            return candidate
    if not folder.is_dir():
        raise JaxbakeError(f"{folder}: there is no such folder; give a bake's output, its delta/ or a PEFT adapter")
    raise JaxbakeError(
        f"{folder}: holds no delta; expected {WEIGHTS}/ with {FILE}, delta/ of a bake that ended, or {CONFIG_FILE}"
    )


def read_card(folder: str | AnyPath) -> Card:
    """The card of a bake's output folder, a delta folder or an exported PEFT folder."""
    return Card.load(delta_folder(folder) / FILE)


def load_delta(folder: str | AnyPath, base) -> tuple[Delta, Card]:
    """Reads a delta for `base` (a `models.base.Base`) from a bake's output folder, a delta folder or a PEFT folder.

    A PEFT adapter made elsewhere gets a card that says only what is known. Raises JaxbakeError where the delta was
    made for another base (naming both), does not fit its layers, is truncated or damaged.
    """
    folder = delta_folder(folder)
    if not (folder / WEIGHTS).is_dir():
        delta = load_peft(folder, base)
        if (folder / FILE).exists():
            return delta, _checked(Card.load(folder / FILE), delta, folder)
        return delta, make_card(base, delta, name=folder.resolve().name)
    card = Card.load(folder / FILE)
    if card.base_digest != base.digest:
        raise JaxbakeError(
            f"{folder}: this delta was baked on '{card.base}' (digest {card.base_digest[:12]}), "
            f"not on '{base.name}' (digest {base.digest[:12]}); load that base"
        )
    with local_copy(folder / WEIGHTS) as weights:
        tree = _read_arrays(weights)
    lora = lora_from_dict(card.lora, f"{folder / FILE}: lora")
    try:
        delta = Delta(tree["factors"], tree["scale"], lora)
        check_fits(delta, base.config, str(folder))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise JaxbakeError(f"{folder}: is damaged: no delta in it ({error})") from error
    return delta, _checked(card, delta, folder)


def _checked(card: Card, delta: Delta, folder: AnyPath) -> Card:
    found = delta_digest(delta)
    if found != card.delta_digest:
        raise JaxbakeError(
            f"{folder}: is damaged or was changed: the weights' digest is {found[:12]}, "
            f"the card says {card.delta_digest[:12]}"
        )
    return card


def _read_arrays(path: AnyPath) -> dict:
    """The stored tree, read into host memory first so that it loads on any number of devices."""
    from orbax.checkpoint import v1 as ocp

    try:
        stored = ocp.metadata(path).metadata
        like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), stored)
        return jax.tree.map(jnp.asarray, ocp.load(path, like))
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
        raise JaxbakeError(f"{path}: is damaged or incomplete: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
