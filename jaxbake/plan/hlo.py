"""What a compiled TPU program costs, read from its text: estimated cycles and collective traffic, loops multiplied out.

The compiler writes its estimate beside every operation it schedules (`estimated_cycles` in the backend_config) and the
text says which computation a loop repeats and how often. Collectives that the program waits for, and kernels written
by hand, carry no estimate; how many of them there are, and the operations the kernels say they do, are part of the
result, so that nobody takes the sum for more than it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxbake.errors import JaxbakeError

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}


class Instruction(NamedTuple):
    """One operation: its name, result type, opcode, operands' names, and all after the operands."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, None where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else None

    @property
    def called(self) -> list[str]:
        """Names of the computations it runs, a loop's condition left out."""
        names = _CALLED.findall(self.rest)
        for group in _BRANCHES.findall(self.rest):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names


@dataclass(frozen=True)
class Traffic:
    """Collectives on one chip: how many, and the bytes of their arrays where these are whole (gathered, not yet
    scattered)."""

    count: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.count + other.count, self.bytes + other.bytes)

    def times(self, n: int) -> Traffic:
        return Traffic(self.count * n, self.bytes * n)


@dataclass(frozen=True)
class Costs:
    """Of one run of a program on one chip.

    cycles: the compiler's estimates, summed. collectives: by kind. open_loops: loops that run until something computed
    says stop; their body is counted once (one token, in decoding). unestimated: kernels without an estimate that run;
    kernel_flops: the operations that these declare (`cost_estimate`). waiting: collectives that the program waits for,
    without an estimate.
    """

    cycles: int = 0
    collectives: dict[str, Traffic] = field(default_factory=dict)
    open_loops: int = 0
    unestimated: int = 0
    waiting: Traffic = Traffic()
    kernel_flops: int = 0

    def __add__(self, other: Costs) -> Costs:
        kinds = {**self.collectives, **other.collectives}
        none = Traffic()
        return Costs(
            self.cycles + other.cycles,
            {k: self.collectives.get(k, none) + other.collectives.get(k, none) for k in kinds},
            self.open_loops + other.open_loops,
            self.unestimated + other.unestimated,
            self.waiting + other.waiting,
            self.kernel_flops + other.kernel_flops,
        )

    def times(self, n: int) -> Costs:
        """Of n runs; a loop stays one loop."""
        moved = {kind: traffic.times(n) for kind, traffic in self.collectives.items()}
        return Costs(
            self.cycles * n, moved, self.open_loops, self.unestimated * n, self.waiting.times(n), self.kernel_flops * n
        )


def read_costs(text: str) -> Costs:
    """The costs of a compiled program from `compiled.as_text()`. Raises JaxbakeError for text that is no HLO module."""
    return _Module(text).costs()


def split_operation(text: str) -> tuple[str, str, str, str]:
    """(result type, opcode, text of the operands, the rest) of what stands right of an instruction's equals sign."""
    text = re.sub(r"/\*.*?\*/", "", text)
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    result, rest = text[:end], text[end:].strip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    return result, opcode, rest[len(opcode) + 1 : close], rest[close + 1 :]


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise JaxbakeError(f"compiled text: a bracket is never closed in '{text[:80]}'")


def type_bytes(text: str) -> int:
    """Bytes of an array type such as bf16[32,64]{1,0:T(8,128)}, of the largest where it is a tuple of them."""
    sizes = [0]
    for dtype, dims in _SHAPE.findall(text):
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
        sizes.append(math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
    return max(sizes)


def group_size(rest: str) -> int:
    """How many chips take part in a collective, from any of the ways its replica_groups are written."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    return 1


class _Module:
    """The computations of a compiled program by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = None, None
        for line in text.splitlines():
            if current is None:
                if header := _HEADER.match(line):
                    current = self.computations.setdefault(header[2], {})
                    self.entry = header[2] if header[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif found := _INSTRUCTION.match(line):
                result, opcode, operands, rest = split_operation(found[3])
                names = tuple(re.findall(r"%([\w.\-]+)", operands)) or (operands,)
                current[found[2]] = Instruction(found[2], result, opcode, names, rest, bool(found[1]))
        if self.entry is None:
            raise JaxbakeError("compiled text: no ENTRY computation; this is no HLO module")
        self._known: dict[str, Costs] = {}

    def costs(self, name: str | None = None) -> Costs:
        """Of one run of a computation, by default of the whole program."""
        name = self.entry if name is None else name
        if name not in self._known:
            total = Costs()
            for operation in self.computations[name].values():
                total += self._cost(operation, name)
            self._known[name] = total + self._traffic(name)
        return self._known[name]

    def _cost(self, operation: Instruction, where: str) -> Costs:
        if operation.opcode == "while":
            body = self.costs(re.search(r"\bbody=%?([\w.\-]+)", operation.rest)[1])
            count = self.trip_count(operation, where)
            return body + Costs(open_loops=1) if count is None else body.times(count)
        if operation.opcode == "conditional":
            return max((self.costs(name) for name in operation.called), key=lambda costs: costs.cycles)
        own = Costs(cycles=operation.cycles or 0)
        if operation.opcode in ("call", "async-start"):
            return sum((self.costs(name) for name in operation.called), own)
        by_hand = operation.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in operation.rest
        if not by_hand or operation.cycles is not None:
            return own
        declared = re.search(r'"cost_estimate":\{"flops":"(\d+)"', operation.rest)
        return own + Costs(unestimated=1, kernel_flops=int(declared[1]) if declared else 0)

    def trip_count(self, loop: Instruction, where: str) -> int | None:
        """How often a loop runs: as the compiler says, or from a counter compared with a constant; None where open."""
        if found := re.search(r'"?known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.rest):
            return int(found[1])
        condition = self.computations[re.search(r"\bcondition=%?([\w.\-]+)", loop.rest)[1]]
        body = self.computations[re.search(r"\bbody=%?([\w.\-]+)", loop.rest)[1]]
        compare = self._root(condition)
        if compare.opcode == "fusion":  # its operands are the fused computation's parameters, in their order
            inner = self.computations[compare.called[0]]
            outer, compare = compare, self._root(inner)
            sides = [_parameter(inner.get(name)) for name in compare.operands]
            sides = [condition.get(outer.operands[at]) if at is not None else None for at in sides]
        else:
            sides = [condition.get(name) for name in compare.operands]
        if compare.opcode != "compare" or "direction=LT" not in compare.rest or len(sides) != 2:
            return None
        counter, limit = sides
        if counter is None or counter.opcode != "get-tuple-element" or (limit := _constant(limit)) is None:
            return None
        index = int(re.search(r"index=(\d+)", counter.rest)[1])
        start = _constant(self._element(self.computations[where], loop.operands[0], index))
        step = self._step(body, index)
        return None if start is None or not step else max(0, -(-(limit - start) // step))

    @staticmethod
    def _root(computation: dict[str, Instruction]) -> Instruction:
        return next(operation for operation in computation.values() if operation.root)

    @staticmethod
    def _element(computation: dict[str, Instruction], name: str, index: int) -> Instruction | None:
        """What an element of a tuple was made of, copies seen through."""
        made = computation.get(name)
        if made is None or made.opcode != "tuple":
            return None
        part = computation.get(made.operands[index])
        while part is not None and part.opcode in ("copy", "bitcast"):
            part = computation.get(part.operands[0])
        return part

    def _step(self, body: dict[str, Instruction], index: int) -> int | None:
        """By how much a round of a loop raises its counter."""
        add = self._element(body, self._root(body).name, index)
        if add is not None and add.opcode == "fusion":
            inner = self.computations[add.called[0]]
            add, body = self._root(inner), inner
        if add is None or add.opcode != "add":
            return None
        found = [c for name in add.operands if (c := _constant(body.get(name))) is not None]
        return found[0] if len(found) == 1 else None

    def _traffic(self, name: str) -> Costs:
        """Collectives that a computation starts itself or inside its fusions, each channel once: one that is spread
        over several fused operations (start, steps, end) stands in each of them."""
        channels: dict[str, tuple[str, int, bool]] = {}
        for operation, inside in self._fused(name):
            kind = operation.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if inside.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            size = type_bytes(operation.type)
            if operation.opcode == "reduce-scatter":
                size *= group_size(operation.rest)
            channel = re.search(r"channel_id=(\d+)", operation.rest)
            waits = operation.opcode in COLLECTIVES and inside == name and operation.cycles is None
            channels.setdefault(channel[1] if channel else operation.name, (kind, size, waits))
        total = Costs()
        for kind, size, waits in channels.values():
            one = Traffic(1, size)
            total += Costs(collectives={kind: one}, waiting=one if waits else Traffic())
        return total

    def _fused(self, name: str) -> Iterator[tuple[Instruction, str]]:
        """The operations of a computation and of the fusions in it, with the computation each stands in."""
        for operation in self.computations[name].values():
            yield operation, name
            if operation.opcode == "fusion":
                for inner in operation.called:
                    yield from self._fused(inner)


def _parameter(operation: Instruction | None) -> int | None:
    return int(operation.operands[0]) if operation is not None and operation.opcode == "parameter" else None


def _constant(operation: Instruction | None) -> int | None:
    if operation is None or operation.opcode != "constant" or not re.fullmatch(r"-?\d+", operation.operands[0]):
        return None
    return int(operation.operands[0])
