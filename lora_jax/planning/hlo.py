"""What a compiled program executes, from its HLO text: instructions, counts and communication."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction. operand: the shape of its first operand."""

    shape: str
    opcode: str
    text: str
    operand: str = ""


class Step(NamedTuple):
    """An instruction that runs `times` times.

    fused: part of another instruction, so that its own result does not reach memory. A loop without
    a fixed number of iterations counts once.
    """

    instruction: Instruction
    times: int
    fused: bool


def parse(text: str) -> list[Step]:
    """The instructions that a compiled program (HLO text) runs, including those of its callees."""
    computations: dict[str, list[Instruction]] = {}
    shape_of: dict[str, str] = {}  # in the current computation
    entry = current = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            current = header[2]
            computations[current], shape_of = [], {}
            entry = current if header[1] else entry
        elif found := re.match(
            r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(%?([\w.\-]*)", line
        ):
            name, shape, opcode, operand = found.groups()
            shape_of[name] = shape
            instruction = Instruction(shape, opcode, line, shape_of.get(operand, ""))
            computations[current].append(instruction)
    steps: list[Step] = []

    def walk(name: str, times: int, fused: bool) -> None:
        for instruction in computations[name]:
            steps.append(Step(instruction, times, fused))
            opcode, text = instruction.opcode, instruction.text
            called = re.findall(r"(?:calls|to_apply|\w+_computation)=%?([\w.\-]+)", text)
            for names in re.findall(r"(?:branch|called)_computations=\{(.*?)\}", text):
                called += re.findall(r"[\w.\-]+", names)
            if opcode == "while":
                count = trip_count(text, computations)
                body = re.search(r"body=%?([\w.\-]+)", text)[1]
                walk(body, times * (count or 1), fused)
            elif opcode in ("call", "conditional", "async-start", "fusion", "custom-call"):
                for each in called:
                    walk(each, times, fused or opcode == "fusion")

    walk(entry, 1, False)
    return steps


def trip_count(text: str, computations: dict[str, list[Instruction]]) -> int | None:
    """The fixed number of iterations of a while loop, from XLA's note or `index < constant`."""
    if noted := re.search(r'known_trip_count"?:\{"?n"?:"(\d+)"', text):
        return int(noted[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", text)[1]]
    root = next(each.text for each in condition if each.text.lstrip().startswith("ROOT"))
    if " compare(" not in root or "direction=LT" not in root:
        return None
    constants = [re.search(r"constant\((\d+)\)", i.text) for i in condition]
    limits = [int(found[1]) for found in constants if found]
    return limits[0] if len(limits) == 1 else None


def arrays(shape: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(dtype, dimensions, layout) of each array in an HLO shape."""
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape):
        yield dtype, tuple(map(int, filter(None, dims.split(",")))), layout


def num_bytes(dtype: str, dims: Sequence[int]) -> int:
    """Bytes of an array of this HLO dtype and these dimensions."""
    bits = 8 if dtype == "pred" else int(re.sub(r"\D.*", "", dtype.lstrip("bfsuc")) or 0)
    return math.prod(dims) * bits // 8


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def collective_bytes(program: Sequence[Step]) -> dict[str, dict[str, int]]:
    """{kind: {"count": …, "bytes": received by each device}} of the collectives that run."""
    totals: dict[str, dict[str, int]] = {}
    for (shape, opcode, *_), times, _ in program:
        kind = opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        results = [num_bytes(dtype, dims) for dtype, dims, _ in arrays(shape)]
        if kind != opcode and kind != "all-reduce":
            results = results[len(results) // 2 :]  # (operands, results)
        total = totals.setdefault(kind, {"count": 0, "bytes": 0})
        total["count"] += times
        total["bytes"] += times * sum(results)
    return totals
