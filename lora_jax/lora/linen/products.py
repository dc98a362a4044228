"""Whether a call of a Flax Linen layer computes einsum(x, W) + bias and nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from lora_jax import errors
from lora_jax.layers import linear_map

Axis = tuple[str, int]  # ("x" or "w", the number of the axis)


class _Value(NamedTuple):
    """What a value is: x, W, the bias, or a product, and where its axes come from."""

    kind: str
    axes: tuple[Axis, ...] = ()
    summed: frozenset[tuple[int, int]] = frozenset()  # (axis of x, axis of W)
    shared: frozenset[tuple[int, int]] = frozenset()
    bias: str = ""  # the name of the bias, or of the one that was added to the product


class Inferred(NamedTuple):
    """How a layer multiplies, and the name of its bias, or ""."""

    how: linear_map.Einsum
    bias: str


def is_product(
    how: linear_map.LinearMap,
    layer: nn.Module,
    cls: type[nn.Module],
    params: Mapping[str, Any],
    names: tuple[str, str],
    args: Sequence[Any],
    input: int,
    kwargs: Mapping[str, Any],
) -> bool:
    """Whether cls.__call__(layer, *args, **kwargs) is that product. It is traced, not computed.

    params: the layer's own. names: of the weight and of the bias. input: which of args is x.
    """
    if not isinstance(how, linear_map.Einsum):
        return _is_plain(layer, cls)
    weight, *biases = names
    found = _traced(layer, cls, params, weight, biases, args, input, kwargs)
    return found is not None and found._replace(bias="") == _expected(how, args[input].ndim)


def input_of(args: Sequence[Any]) -> int | None:
    """Which argument is x in a call of a class that nobody registered: the first array."""
    return next((i for i, own in enumerate(args) if getattr(own, "ndim", 0) and
                 hasattr(own, "dtype")), None)  # fmt: skip


def inferred(
    layer: nn.Module,
    params: Mapping[str, Any],
    weight: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Inferred | None:
    """What a layer is whose call is a product with that weight; None if it is none.

    args: by position where they can be.
    """
    if (input := input_of(args)) is None:
        return None
    others = [name for name in params if name != weight]
    found = _traced(layer, type(layer), params, weight, others, args, input, kwargs)
    if found is None or found.kind != "y" or not found.summed:
        return None
    ndim, used = args[input].ndim, {pair[0] for pair in found.summed | found.shared}
    free = next((i for i in range(ndim) if i in used or found.axes[i] != ("x", i)), ndim)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    x = {i: next(letters) for i in range(free, ndim)}
    w = {pair[1]: x[pair[0]] for pair in found.summed | found.shared}
    w |= {i: next(letters) for i in range(params[weight].ndim) if i not in w}
    y = "".join((x if kind == "x" else w)[i] for kind, i in found.axes[free:])
    text = f"...{''.join(x.values())},{''.join(w[i] for i in sorted(w))}->...{y}"
    try:
        how = linear_map.parse(text)
    except errors.UserError:
        return None
    sizes = dict(zip(how.w, params[weight].shape, strict=True))
    outputs = tuple(sizes[axis] for axis in how.batch + how.outputs)
    if found.bias and params[found.bias].shape != outputs:
        return None
    return Inferred(how, found.bias)


def result(
    layer: nn.Module,
    cls: type[nn.Module],
    params: Mapping[str, Any],
    args: Sequence[Any],
    input: int,
    kwargs: Mapping[str, Any],
) -> jax.ShapeDtypeStruct:
    """The shape and dtype of cls.__call__(layer, *args, **kwargs) with these params or shapes."""
    call, shapes, x = _alone(layer, cls, params, args, input, kwargs)
    return jax.eval_shape(call, shapes, x)


def _alone(layer, cls, params, args, input, kwargs):
    """The call as a function of params and x, and their shapes."""
    alone = layer.clone(parent=None, name=None)
    shapes = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in params.items()}

    def call(own, x):
        given, run = [*args[:input], x, *args[input + 1 :]], cls.__call__
        return alone.apply(
            {"params": own}, *given, method=lambda m, *a, **k: run(m, *a, **k), **kwargs
        )

    return call, shapes, jax.ShapeDtypeStruct(args[input].shape, args[input].dtype)


def _traced(layer, cls, params, weight, biases, args, input, kwargs) -> _Value | None:
    """What the call's result is. biases: the names of parameters that may be the bias."""
    call, shapes, x = _alone(layer, cls, params, args, input, kwargs)
    try:
        closed, result = jax.make_jaxpr(call, return_shape=True)(shapes, x)
    except Exception:
        return None  # it needs more than its params, such as a random key
    if not hasattr(result, "shape"):
        return None
    values = []
    for name, leaf in sorted(shapes.items()):
        kind = "w" if name == weight else "bias" if name in biases else "other"
        axes = tuple(("w", i) for i in range(leaf.ndim))
        values.append(_Value(kind, axes, bias=name if kind == "bias" else ""))
    values.append(_Value("x", tuple(("x", i) for i in range(x.ndim))))
    return _followed(closed.jaxpr, values)[0]


def _expected(how: linear_map.Einsum, ndim: int) -> _Value:
    x, y = linear_map.expanded(how.x, ndim), linear_map.expanded(how.y, ndim, like=how.x)
    pairs = [frozenset((x.index(axis), how.w.index(axis)) for axis in axes)
             for axes in (how.inputs, how.batch)]  # fmt: skip
    axes = tuple(("x", x.index(a)) if a in x else ("w", how.w.index(a)) for a in y)
    return _Value("y", axes, *pairs)


def _followed(jaxpr: Any, values: Sequence[_Value | None]) -> list[_Value | None]:
    """What the results are; None: something else, or it depends on none of the four."""
    known = {var: value for var, value in zip(jaxpr.invars, values, strict=True) if value}
    for eqn in jaxpr.eqns:
        own = [None if hasattr(var, "val") else known.get(var) for var in eqn.invars]
        if any(own):
            for var, value in zip(eqn.outvars, _result(eqn, own), strict=True):
                known[var] = value or _Value("other")
    return [None if hasattr(var, "val") else known.get(var) for var in jaxpr.outvars]


def _result(eqn: Any, own: list[_Value | None]) -> list[_Value | None]:
    name, inner = eqn.primitive.name, eqn.params.get("jaxpr")
    lost = [None] * len(eqn.outvars)
    if inner is not None and len(getattr(inner, "jaxpr", inner).invars) == len(own):
        return _followed(getattr(inner, "jaxpr", inner), own)
    if name in _SAME:
        return [own[0]]
    if name == "transpose" and own[0].kind != "other":
        return [own[0]._replace(axes=tuple(own[0].axes[i] for i in eqn.params["permutation"]))]
    if own[0] and own[0].kind == "bias" and name in ("reshape", "broadcast_in_dim"):
        return [own[0]]
    if name == "dot_general" and all(own) and {own[0].kind, own[1].kind} == {"x", "w"}:
        return [_dot(eqn.params["dimension_numbers"], own)]
    if name == "add" and all(own) and {own[0].kind, own[1].kind} == {"y", "bias"}:
        y, bias = own if own[0].kind == "y" else own[::-1]
        return lost if y.bias else [y._replace(bias=bias.bias)]
    return lost


_SAME = ("convert_element_type", "copy", "sharding_constraint")


def _dot(numbers: Any, own: list[_Value]) -> _Value:
    contracting, batch = numbers
    pairs = []
    for left, right in (contracting, batch):
        both = [(own[0].axes[i], own[1].axes[j]) for i, j in zip(left, right, strict=True)]
        both = [pair if pair[0][0] == "x" else pair[::-1] for pair in both]
        pairs.append(frozenset((x[1], w[1]) for x, w in both))
    first = [own[0].axes[i] for i in batch[0]] if own[0].kind == "x" else (
        [own[1].axes[j] for j in batch[1]])  # fmt: skip
    rest = [axis for value, gone in zip(own, zip(*numbers, strict=True), strict=True)
            for i, axis in enumerate(value.axes) if i not in {*gone[0], *gone[1]}]  # fmt: skip
    return _Value("y", (*first, *rest), *pairs)


def _is_plain(layer: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a layer of Flax's class `cls` has no setting that changes the product itself."""
    return (
        type(layer).param is nn.Module.param
        and getattr(layer, "mask", None) is None
        and all(getattr(layer, name) == getattr(cls, name) for name in _CHANGE
                if hasattr(cls, name))
    )  # fmt: skip


_CHANGE = (
    "promote_dtype",
    "conv_general_dilated",
    "conv_general_dilated_cls",
    "feature_group_count",
)
