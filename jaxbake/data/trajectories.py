"""Requests for responses, the responses, and the folder they are kept in."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jaxbake import hosts
from jaxbake.config import RetentionConfig, SamplingConfig
from jaxbake.errors import JaxbakeError
from jaxbake.files import AnyPath, as_path, read_json, write_whole

Kind = Literal["bake", "pin", "context"]
Split = Literal["train", "held_out"]

HELD_OUT_SAMPLES = 4  # at most so many responses for each held-out stimulus


@dataclass(frozen=True)
class Request:
    """One response to be drawn from the prompted model. `seed` alone decides its random draws.

    context: another prompt that stands after the baked one ("context" rows only).
    prompt: which of the prompts that are baked, counted from 0 (of no meaning for pins).
    """

    index: int
    kind: Kind
    stimulus: str
    context: str | None
    temperature: float
    seed: int
    split: Split
    prompt: int = 0


@dataclass(frozen=True)
class Trajectory:
    """A request and its response. response_ids: the sampled ids, the stop token included when it was drawn.

    logprob: sum of the tokens' log-probabilities under the untempered prompted model; finished: a stop token was drawn.
    """

    index: int
    kind: Kind
    stimulus: str
    context: str | None
    temperature: float
    seed: int
    split: Split
    response: str
    response_ids: tuple[int, ...]
    logprob: float
    finished: bool
    prompt: int = 0


def _stable(*parts: Any) -> int:
    """A number below 2^31 that depends on nothing but the parts."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1


def _shuffled(items: Sequence, *key: Any) -> list:
    return [item for _, item in sorted(enumerate(items), key=lambda pair: _stable(*key, pair[0]))]


def plan_requests(
    stimuli_train: Sequence[Sequence[str]],
    stimuli_held_out: Sequence[Sequence[str]],
    sampling: SamplingConfig,
    retention: RetentionConfig,
    pins: Sequence[str] = (),
    contexts: Sequence[tuple[str, Sequence[str]]] = (),
    seed: int = 0,
) -> list[Request]:
    """Every response a bake is trained and judged on; the same arguments give the same list.

    The stimuli are given by prompt: those of the first, of the second, ...

    Training rows: each stimulus `samples_per_stimulus` times; then so many pins and context rows that they make up
    their fractions of all training rows. Pins are unrelated user turns. Context rows take another prompt o and by turns
    (1) one of o's own user turns: the student must go on reading o, and (2) a stimulus of the bake: the student must
    still know the baked prompt while it reads o. Temperatures are taken in turn.

    Held-out rows are of kind "bake" only, up to four for each held-out stimulus. No training row of any kind asks a
    held-out stimulus (unless the bake has a single stimulus, see `stimuli.split_held_out`).

    Raises JaxbakeError where a fraction is set and there is nothing to fill it with.
    """
    turns_train, turns_held_out = (
        [(number, text) for number, group in enumerate(groups) for text in group]
        for groups in (stimuli_train, stimuli_held_out)
    )
    if not turns_train or not turns_held_out:
        raise JaxbakeError("stimuli: none to sample responses for; give at least one")
    requests: list[Request] = []

    def add(
        kind: Kind, number: int, stimulus: str, context: str | None = None, split: Split = "train", turn: int = 0
    ) -> None:
        index = len(requests)
        temperature = float(sampling.temperature[turn % len(sampling.temperature)])
        requests.append(Request(index, kind, stimulus, context, temperature, _stable(seed, index), split, number))

    samples = sampling.samples_per_stimulus
    for i, (number, stimulus) in enumerate(turns_train):
        for j in range(samples):
            add("bake", number, stimulus, turn=i * samples + j)
    rows = len(requests) / (1 - retention.pins - retention.contexts)
    few = min(samples, HELD_OUT_SAMPLES)
    for i, (number, stimulus) in enumerate(turns_held_out):
        for j in range(few):
            add("bake", number, stimulus, split="held_out", turn=i * few + j)

    # The same turn as pin and as bake row would ask for two different answers.
    own, held = ({s.strip() for _, s in turns} for turns in (turns_train + turns_held_out, turns_held_out))
    count = round(rows * retention.pins)
    free = _shuffled([pin for pin in pins if pin.strip() not in own], seed, "pins")
    if count and not free:
        raise JaxbakeError("retention.pins: no user turns to pin beside the stimuli; set pins to 0 or give some")
    for i in range(count):
        add("pin", 0, free[i % len(free)], turn=i)

    count = round(rows * retention.contexts)
    others = [(prompt, [s for s in turns if s.strip() not in held]) for prompt, turns in contexts]
    others = _shuffled([(prompt, turns) for prompt, turns in others if turns], seed, "contexts")
    if count and not others:
        raise JaxbakeError("retention.contexts: no other prompts with user turns; set contexts to 0 or give some")
    asked = _shuffled(turns_train, seed, "asked in contexts")
    for i in range(count):
        visit, half = divmod(i, 2)
        prompt, turns = others[visit % len(others)]
        number, stimulus = asked[visit % len(asked)]
        own_turn = turns[(visit // len(others)) % len(turns)]
        add("context", number, stimulus if half else own_turn, prompt, turn=i)
    return requests


def fingerprint(
    *,
    prompt: str | Sequence[str] | None,
    base_digest: str,
    template_hash: str,
    sampling: SamplingConfig,
    requests: Sequence[Request],
    seed: int,
    **more: Any,
) -> dict[str, Any]:
    """Everything trajectories depend on, as short JSON values; `requests` covers stimuli, pins, contexts and splits."""
    return {
        "prompt": _digest(prompt),
        "base": base_digest,
        "template": template_hash,
        "sampling": json.loads(json.dumps(asdict(sampling))),
        "requests": _digest([asdict(request) for request in requests]),
        "seed": seed,
        **more,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


_COLUMNS = {
    "index": ("int64", "number of the request"),
    "kind": ("string", "bake, pin (nothing may change here) or context (another prompt stands after the baked one)"),
    "stimulus": ("string", "the user turn"),
    "context": ("string", "the other prompt, for kind context"),
    "temperature": ("float64", "it was sampled at"),
    "seed": ("int64", "of its random draws"),
    "split": ("string", "train or held_out"),
    "response": ("string", "the response as text"),
    "response_ids": (None, "the sampled token ids: what is trained on"),
    "logprob": ("float64", "sum of their log-probabilities under the prompted model at temperature 1"),
    "finished": ("bool", "whether the model ended its turn, rather than running into the length limit"),
    "prompt": ("int64", "which of the prompts that are baked, counted from 0"),
}


def _card() -> str:
    features = "".join(
        f"  - name: {name}\n" + (f"    dtype: {dtype}\n" if dtype else "    list: int32\n")
        for name, (dtype, _) in _COLUMNS.items()
    )
    table = "".join(f"| `{name}` | {what} |\n" for name, (_, what) in _COLUMNS.items())
    return (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.jsonl\n"
        f"dataset_info:\n  features:\n{features}---\n\n"
        "# Trajectories of a bake\n\n"
        "Responses of the prompted model, which the bake is trained and judged on, a JSON object a line. What they\n"
        "depend on stands in `manifest.json`. Parts are checked against their names; a changed one is refused.\n\n"
        '    datasets.load_dataset(FOLDER)["train"]\n\n'
        f"| column | |\n|---|---|\n{table}"
    )  # fmt: skip


MANIFEST = "manifest.json"
_PART = re.compile(r"part-(\d{5})-([0-9a-f]{12})\.jsonl")


class TrajectoryStore:
    """A folder of trajectories that a person and `datasets.load_dataset` can read.

    README.md (data set card), manifest.json (the fingerprint), data/part-NNNNN-HASH.jsonl. A part is written whole or
    not at all and its name holds the hash of fingerprint and content, so truncated or foreign parts are found.
    Open with `TrajectoryStore.open`. Of several processes all read, and process 0 alone writes. A store without a
    folder, `TrajectoryStore()`, keeps them in memory.
    """

    def __init__(self, folder: AnyPath | None = None, key: str = ""):
        self.folder, self._key = folder, key
        self._trajectories: dict[int, Trajectory] = {}
        self._parts = 0
        if folder is not None:
            self._read()

    @classmethod
    def open(cls, folder: str | AnyPath, fingerprint: dict[str, Any] | None = None) -> TrajectoryStore:
        """Opens the folder, or starts it where there is none.

        fingerprint: what the trajectories depend on (see `fingerprint`); None takes the folder's own, for reading.
        Raises JaxbakeError where the folder holds trajectories of something else, and for damaged or foreign parts.
        """
        folder = as_path(folder)
        hosts.first(lambda: _begin(folder, fingerprint))
        found = read_json(folder / MANIFEST)["fingerprint"]
        return cls(folder, _digest(found))

    def _hash(self, text: str) -> str:
        return hashlib.sha256(f"{self._key}\n{text}".encode()).hexdigest()[:12]

    def _read(self) -> None:
        # Names that start with a dot are parts that were being written when their process ended.
        data = self.folder / "data"
        paths = sorted(p for p in data.iterdir() if not p.name.startswith(".")) if data.is_dir() else []
        for number, path in enumerate(paths):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise JaxbakeError(f"{path}: cannot be read: {error}; delete it to have it sampled again") from error
            name = _PART.fullmatch(path.name)
            if name is None:
                raise JaxbakeError(f"{path}: is not a part of these trajectories; move it away")
            if name[2] != self._hash(text):
                raise JaxbakeError(
                    f"{path}: is truncated, changed or from another bake; delete it to have it sampled again"
                )
            for line in text.split("\n")[:-1]:
                self._add(json.loads(line), path)
            self._parts = max(number, int(name[1])) + 1

    def _add(self, row: dict, path: AnyPath) -> None:
        trajectory = Trajectory(**{**row, "response_ids": tuple(row["response_ids"])})
        if trajectory.index in self._trajectories:
            raise JaxbakeError(f"{path}: holds trajectory {trajectory.index}, which another part holds too; delete one")
        self._trajectories[trajectory.index] = trajectory

    def done(self) -> set[int]:
        """Indices of the requests that have their response."""
        return set(self._trajectories)

    def write_part(self, trajectories: Sequence[Trajectory]) -> AnyPath | None:
        """Writes one more part and returns its path. Raises JaxbakeError for an index already held, or no space."""
        if twice := self.done() & {t.index for t in trajectories}:
            raise JaxbakeError(f"{self.folder}: trajectory {min(twice)} is already in the folder")
        path = None
        if self.folder is not None:
            text = "".join(json.dumps(asdict(t), ensure_ascii=False) + "\n" for t in trajectories)
            path = self.folder / "data" / f"part-{self._parts:05}-{self._hash(text)}.jsonl"
            if hosts.is_first():
                write_whole(path, text)
        for trajectory in trajectories:
            self._trajectories[trajectory.index] = trajectory
        self._parts += 1
        return path

    def load(self) -> list[Trajectory]:
        """All trajectories, by index."""
        return [self._trajectories[i] for i in sorted(self._trajectories)]


def _begin(folder: AnyPath, fingerprint: dict[str, Any] | None) -> None:
    """Starts a store where there is none, and checks that one that is there is of this fingerprint."""
    path = folder / MANIFEST
    if not path.exists():
        if fingerprint is None:
            raise JaxbakeError(f"{folder}: holds no trajectories (no {MANIFEST})")
        if (folder / "data").is_dir() and any((folder / "data").iterdir()):
            raise JaxbakeError(f"{folder}: holds data but no {MANIFEST}; give another output folder")
        write_whole(folder / "README.md", _card())
        manifest = {"version": 1, "fingerprint": fingerprint}
        write_whole(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    found = read_json(path).get("fingerprint")
    if not isinstance(found, dict):
        raise JaxbakeError(f"{path}: is damaged, it holds no fingerprint")
    if fingerprint is not None and found != json.loads(json.dumps(fingerprint)):
        raise JaxbakeError(
            f"{folder}: the output folder holds another bake ({_difference(found, fingerprint)}); "
            "give another output folder, or delete this one"
        )


def _difference(found: dict, wanted: dict) -> str:
    """Which entries of two fingerprints differ, with their values where these are short."""
    wanted = json.loads(json.dumps(wanted))
    parts = []
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            parts += [f"{key}.{k}: {old.get(k)}, not {new.get(k)}" for k in sorted(old.keys() | new.keys())
                      if old.get(k) != new.get(k)]  # fmt: skip
        elif old != new:
            long = any(isinstance(v, str) and len(v) > 40 for v in (old, new))
            parts.append(f"another {key}" if long else f"{key}: {old}, not {new}")
    return "; ".join(parts)
