"""Whether a program computes einsum(x, W) + bias and nothing else."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_jax.layers import linear_map

Axis = tuple[str, int]  # ("x" or "w", the number of the axis)


class Merged(NamedTuple):
    """Neighbouring axes, with their sizes, that a reshape has made one; none: a new axis."""

    parts: tuple[tuple[Axis, int], ...]


class Value(NamedTuple):
    """What a value is: x, W, the bias, or a product, and where its axes come from."""

    kind: str
    axes: tuple[Axis | Merged, ...] = ()
    summed: frozenset[tuple[int, int]] = frozenset()  # (axis of x, axis of W)
    shared: frozenset[tuple[int, int]] = frozenset()
    bias: str = ""  # the name of the bias, or of the one that was added to the product


def given(kind: str, array: Any, bias: str = "") -> Value:
    """An input of a program: "x", "w", "bias" with its name, or "other"."""
    axis = "x" if kind == "x" else "w"
    return Value(kind, tuple((axis, i) for i in range(array.ndim)), bias=bias)


def expected(how: linear_map.Einsum, ndim: int) -> Value:
    """The product, for an x of `ndim` axes."""
    x, y = linear_map.expanded(how.x, ndim), linear_map.expanded(how.y, ndim, like=how.x)
    pairs = [frozenset((x.index(axis), how.w.index(axis)) for axis in axes)
             for axes in (how.inputs, how.batch)]  # fmt: skip
    axes = tuple(("x", x.index(a)) if a in x else ("w", how.w.index(a)) for a in y)
    return Value("y", axes, *pairs)


def followed(jaxpr: Any, values: Sequence[Value | None]) -> list[Value | None]:
    """What the results are; None for one that depends on none of the four inputs."""
    known = {var: value for var, value in zip(jaxpr.invars, values, strict=True) if value}
    for eqn in jaxpr.eqns:
        own = [None if hasattr(var, "val") else known.get(var) for var in eqn.invars]
        if any(own):
            for var, value in zip(eqn.outvars, _result(eqn, own), strict=True):
                known[var] = value or Value("other")
    return [None if hasattr(var, "val") else known.get(var) for var in jaxpr.outvars]


def _result(eqn: Any, own: list[Value | None]) -> list[Value | None]:
    name, inner = eqn.primitive.name, eqn.params.get("jaxpr")
    lost = [None] * len(eqn.outvars)
    if name in _ONCE and len(getattr(inner, "jaxpr", inner).invars) == len(own):
        return followed(getattr(inner, "jaxpr", inner), own)
    if name in _SAME:
        return [own[0]]
    if name == "transpose" and own[0].kind != "other":
        return [own[0]._replace(axes=tuple(own[0].axes[i] for i in eqn.params["permutation"]))]
    if own[0] and own[0].kind == "bias" and name in ("reshape", "broadcast_in_dim"):
        return [own[0]]
    if (
        own[0]
        and own[0].kind != "other"
        and (name == "squeeze" or (name == "reshape" and eqn.params["dimensions"] is None))
    ):
        return [_reshaped(own[0], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)]
    if name == "dot_general" and all(own) and {own[0].kind, own[1].kind} == {"x", "w"}:
        return [_dot(eqn.params["dimension_numbers"], own)]
    if name == "add" and all(own) and {own[0].kind, own[1].kind} == {"y", "bias"}:
        y, bias = own if own[0].kind == "y" else own[::-1]
        return lost if y.bias else [y._replace(bias=bias.bias)]
    return lost


# What runs its program once, on whole arrays. A scan, such as that of a fori_loop, repeats it.
_ONCE = ("jit", "pjit", "checkpoint", "remat2")
_SAME = ("convert_element_type", "copy", "name", "reshard", "sharding_constraint")


def _parts(axis: Axis | Merged, size: int) -> tuple[tuple[Axis, int], ...]:
    return axis.parts if isinstance(axis, Merged) else ((axis, size),)


def _reshaped(value: Value, old: Sequence[int], new: Sequence[int]) -> Value | None:
    """`value` with neighbouring axes merged or parted again; None if an axis itself is parted."""
    left = [part for each in zip(value.axes, old, strict=True) for part in _parts(*each)]
    # Axes of size 1 that get no axis of their own are merged into the one before them.
    spare = [size for _, size in left].count(1) - [*new].count(1)
    axes = []
    for size in new:
        parts = []
        if size == 1 and (not left or left[0][1] > 1):  # a new axis
            axes.append(Merged(()))
            continue
        while left and (math.prod(each for _, each in parts) < size or not parts):
            parts.append(left.pop(0))
        while left and left[0][1] == 1 and spare > 0:
            parts.append(left.pop(0))
            spare -= 1
        if not parts or math.prod(each for _, each in parts) != size:
            return None
        axes.append(parts[0][0] if len(parts) == 1 else Merged(tuple(parts)))
    return None if left else value._replace(axes=tuple(axes))


def _dot(numbers: Any, own: list[Value]) -> Value | None:
    contracting, batch = numbers
    pairs = []
    for left, right in (contracting, batch):
        both = []
        for i, j in zip(left, right, strict=True):
            one, other = (_parts(value.axes[k], 0) for value, k in zip(own, (i, j), strict=True))
            if len(one) != len(other) or (
                len(one) > 1 and [size for _, size in one] != [size for _, size in other]
            ):
                return None
            both += [(a, b) for (a, _), (b, _) in zip(one, other, strict=True)]
        both = [pair if pair[0][0] == "x" else pair[::-1] for pair in both]
        pairs.append(frozenset((x[1], w[1]) for x, w in both))
    first = [own[0].axes[i] for i in batch[0]] if own[0].kind == "x" else (
        [own[1].axes[j] for j in batch[1]])  # fmt: skip
    rest = [axis for value, gone in zip(own, zip(*numbers, strict=True), strict=True)
            for i, axis in enumerate(value.axes) if i not in {*gone[0], *gone[1]}]  # fmt: skip
    return Value("y", (*first, *rest), *pairs)
