"""What a compiled program moves to and from main memory, from its HLO text."""

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from lora_jax.planning import hlo


class _Operation(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    is_root: bool


_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written into the first
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota",
         "partition-id", "optimization-barrier", "copy-done", "slice-done", "async-done",
         "dynamic-slice-done", "async-update", "call-done")  # fmt: skip
_CALLS = ("while", "conditional", "call", "async-start", "call-start")
# Custom calls that only tell the compiler something, as their names begin.
_MARKERS = ("AssumeGatherIndicesInBound", "ConcatBitcast", "GatherScatterIndicesBitpacked",
            "PrepareAsyncCall")  # fmt: skip


def bytes_moved(
    text: str,
    kernels: Sequence[str],
    stack: int,
    known: Mapping[tuple[int, ...], int] = MappingProxyType({}),
    cache: int = 0,
) -> int:
    """Bytes that a compiled program (HLO text) reads from and writes to the device's main memory.

    An array counts for each instruction that reads or writes it, one that is sliced or updated in
    place for that part alone. Of a conditional, the branch that moves least counts. A loop without
    a fixed number of iterations counts once. kernels: parts of the names of custom calls that read
    one layer of arrays with `stack` of them. known: bytes that they read of an array of these axes,
    where that depends on values. cache: how many of the bytes that were moved last the device still
    has: an array among them is not read again.
    """
    bodies = _operations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+) ", text, re.MULTILINE)[1]
    conditions = {name: [hlo.Instruction(o.shape, o.opcode, o.text) for o in body.values()]
                  for name, body in bodies.items()}  # fmt: skip

    def called(operation, pattern=r"calls"):
        return re.search(rf"{pattern}=%?([\w.\-]+)", operation.text)[1]

    def read_by(body, name) -> float:
        """Bytes that a fused computation reads of its value `name`; inf: all of it."""
        total = math.inf if body[name].is_root else 0.0
        for user in body.values():
            for position, operand in enumerate(user.operands):
                if operand != name:
                    continue
                if user.opcode in _SLICES:
                    total += _memory(user.shape) if position == 0 else 0
                elif user.opcode in _UPDATES and position == 0:
                    continue
                elif user.opcode in ("bitcast", "reshape"):
                    total += read_by(body, user.name)
                elif user.opcode == "fusion":
                    inner = bodies[called(user)]
                    root = next(o for o in inner.values() if o.is_root)
                    only_bitcast = len(inner) == 2 and root.opcode == "bitcast"
                    total += (read_by(body, user.name) if only_bitcast
                              else read_by_parameter(called(user), position))  # fmt: skip
                else:
                    return math.inf
        return total

    def read_by_parameter(name, position) -> float:
        body = bodies[name]
        wanted = f" parameter({position})"
        return read_by(body, next(o.name for o in body.values() if wanted in o.text))

    def written(body, operation) -> int:
        if operation.opcode in ("tuple", "bitcast"):
            return sum(written(body, body[name]) for name in operation.operands)
        if operation.opcode in _UPDATES:
            return _memory(body[operation.operands[_UPDATES[operation.opcode]]].shape)
        if operation.opcode == "fusion":
            inner = bodies[called(operation)]
            return written(inner, next(o for o in inner.values() if o.is_root))
        return 0 if operation.opcode == "parameter" else _memory(operation.shape)

    def cost(body, operation, is_cached) -> int:
        opcode = operation.opcode
        if opcode in _FREE:
            return 0
        if opcode == "while":
            count = hlo.trip_count(operation.text, conditions) or 1
            return count * moved(called(operation, "body"))
        if opcode == "conditional":
            names = re.search(r"branch_computations=\{(.*?)\}", operation.text)
            if names:
                return min(map(moved, re.findall(r"[\w.\-]+", names[1])))
            return min(
                moved(called(operation, f"{kind}_computation")) for kind in ("true", "false")
            )
        if opcode in ("call", "async-start", "call-start"):
            name = re.search(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)",
                             operation.text)[1]  # fmt: skip
            return moved(name)
        sizes = [0 if is_cached(name) else _memory(body[name].shape) for name in operation.operands]
        if opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', operation.text)[1]
            if target.startswith(_MARKERS):
                return 0
            if any(kernel in target for kernel in kernels):
                for index, name in enumerate(operation.operands):
                    (_, dims, _), *_ = hlo.arrays(body[name].shape)
                    if sizes[index] and dims in known:
                        sizes[index] = known[dims]
                    elif len(dims) > 2 and dims[0] == stack:
                        sizes[index] //= stack
            return sum(sizes) + _memory(operation.shape)
        if opcode == "copy-start":  # (to, from, …)
            return sum(_memory(f"{d}[{','.join(map(str, n))}]{{{layout}}}")
                       for d, n, layout in list(hlo.arrays(operation.shape))[:2])  # fmt: skip
        if opcode in ("slice-start", "dynamic-slice-start"):  # (from, to, …)
            dtype, dims, layout = list(hlo.arrays(operation.shape))[1]
            size = hlo.num_bytes(dtype, dims)
            return (size if sizes[0] else 0) + (0 if "S(" in layout else size)
        if opcode in _SLICES:
            return (_size(operation.shape) if sizes[0] else 0) + _memory(operation.shape)
        if opcode in _UPDATES:
            update = sizes[_UPDATES[opcode]]
            return update + (_size(body[operation.operands[_UPDATES[opcode]]].shape)
                             if sizes[0] else 0)  # fmt: skip
        if opcode == "fusion":
            inner = bodies[called(operation)]
            root = next(o for o in inner.values() if o.is_root)
            read = sum(min(size, read_by_parameter(called(operation), position))
                       for position, size in enumerate(sizes) if size)  # fmt: skip
            result = written(inner, root) if _memory(operation.shape) else 0
            return int(read) + min(result, _memory(operation.shape))
        return sum(sizes) + _memory(operation.shape)

    def moved(name: str) -> int:
        body, total, used = bodies[name], 0, {}

        def is_cached(operand) -> bool:
            since = total - used.get(operand, -math.inf)
            return since + _memory(body[operand].shape) <= cache

        for operation in body.values():  # in the order in which they run
            total += cost(body, operation, is_cached)
            if operation.opcode in ("bitcast", "get-tuple-element"):
                if last := used.get(operation.operands[0]):
                    used[operation.name] = last
            elif operation.opcode not in (*_FREE, *_CALLS):
                used |= dict.fromkeys((operation.name, *operation.operands), total)
        return total

    return moved(entry)


def _operations(text: str) -> dict[str, dict[str, _Operation]]:
    """{computation: {name: operation}}"""
    bodies: dict[str, dict[str, _Operation]] = {}
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            body = bodies.setdefault(header[1], {})
        elif found := re.match(
            r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^()]*)\)", line
        ):
            root, name, shape, opcode, given = found.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", given))
            body[name] = _Operation(name, shape, opcode, operands, line, bool(root))
    return bodies


def _size(shape: str) -> int:
    return sum(hlo.num_bytes(dtype, dims) for dtype, dims, _ in hlo.arrays(shape))


def _memory(shape: str) -> int:
    """Bytes of the arrays that are in main memory: S(1) is a TPU's memory on the chip."""
    return sum(hlo.num_bytes(dtype, dims) for dtype, dims, layout in hlo.arrays(shape)
               if "S(" not in layout)  # fmt: skip
