"""Whether a call of a Flax Linen layer computes einsum(x, W) + bias and nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from lora_jax import errors
from lora_jax.layers import linear_map, programs


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
    """Whether cls.__call__(layer, *args, **kwargs) is that product, plus the bias if there is one.

    It is traced, not computed. params: the layer's own. names: of the weight and of the bias.
    input: which of args is x.
    """
    if not isinstance(how, linear_map.Einsum):
        return _is_plain(layer, cls)
    weight, *biases = names
    found = _traced(layer, cls, params, weight, biases, args, input, kwargs)
    own = next((name for name in biases if name in params), "")
    return found == programs.expected(how, args[input].ndim)._replace(bias=own)


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
    if any(isinstance(axis, programs.Merged) for axis in found.axes):
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


def _traced(layer, cls, params, weight, biases, args, input, kwargs) -> programs.Value | None:
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
        values.append(programs.given(kind, leaf, name if kind == "bias" else ""))
    values.append(programs.given("x", x))
    return programs.followed(closed.jaxpr, values)[0]


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
