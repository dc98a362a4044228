"""The conversion of layers and whole Flax NNX models from dense to quantized weights, and back."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lora_jax import errors
from lora_jax.layers import (
    abstract,
    linear_map,
    mixin,
    parameters,
    placement,
    places,
    registry,
    taken,
    wrappers,
)
from lora_jax.quant import formats
from lora_jax.quant import linear as quant_linear


def quantize_linear(linear: nnx.Linear, fmt: str) -> quant_linear.QuantLinear:
    """The same layer with its kernel, [K, N] or stacked [L, K, N], quantized."""
    axis = registry.stack_axis(linear, linear.kernel)
    packed = _packed(jnp.moveaxis(linear.kernel[...], axis, 0), fmt)
    names = placement.metadata(linear.kernel, functools.partial(_first, axis=axis))
    return quant_linear.QuantLinear(packed, linear, fmt=fmt, axis=axis, metadata=names)


def _packed(matrix, fmt):
    """The quantized matrix [*L, K, N], split over a mesh as the matrix is."""
    num_lead = matrix.ndim - 2
    packed = placement.computed(lambda matrix: _quantize(matrix, fmt), num_lead, matrix)
    sharding = placement.sharding_of(matrix)
    return packed if sharding is None else placement.followed(packed, sharding, num_lead)


def _first(names, axis):
    """The names of the axes of an array whose axis of that number comes first."""
    return (names[axis], *names[:axis], *names[axis + 1 :])


def quantize_layer(layer: nnx.Module, fmt: str) -> None:
    """Makes a LinearGeneral, an Einsum or a layer of a registered class a QuantLayer."""
    how, known = registry.linear_map_of(layer), registry.registration_of(type(layer))
    stored = registry.weight_of(layer)
    axis = registry.stack_axis(layer, stored)
    moved = jnp.moveaxis(stored[...], axis, 0)
    matrix = placement.matrix(how, moved)
    linear = nnx.eval_shape(
        lambda: nnx.Linear(
            *matrix.shape[-2:], use_bias=False, param_dtype=stored.dtype, rngs=nnx.Rngs(0)
        )
    )
    linear.kernel = stored.replace(matrix)
    delattr(layer, known.weight)
    mixin.become(layer, quant_linear.QuantLayer, known.cls)
    names = placement.metadata(stored, lambda names: how.matrix_axes(_first(names, axis)))
    packed = _packed(matrix, fmt)
    layer.quantized = quant_linear.QuantLinear(packed, linear, fmt=fmt, axis=axis, metadata=names)
    layer.quantized_shape = moved.shape


def make_dense(layer: nnx.Module, matrix: Float[Array, "*L d_in d_out"]) -> None:
    """The inverse of quantize_layer, with that weight as a matrix."""
    how, shape = registry.linear_map_of(layer), layer.quantized_shape
    stored, axis = as_linear(layer.quantized, matrix, 0).kernel, layer.quantized.axis
    mixin.leave(layer, quant_linear.QuantLayer, "quantized", "quantized_shape")
    name = registry.registration_of(type(layer)).weight
    tensor = placement.unpacked(how, stored[...], shape)
    setattr(layer, name, stored.replace(quant_linear.in_place(tensor, axis)))


def quantize_model(
    model: nnx.Module, fmt: str, *, exclude: tuple[str, ...] = ("lm_head",)
) -> taken.Taken:
    """{dotted path: fmt} of every linear layer whose name is not in `exclude`, which it quantizes.

    An nnx.Linear becomes a QuantLinear, and a layer of another class a QuantLayer. Layers change
    in place, also those that another model shares. The result also tells what was left dense, and
    why.
    Raises: UserError if there is no such layer, if one has an adapter already, or if the model has
    no arrays.
    """
    abstract.refuse(model)
    layers = {path: node for path, node in nnx.iter_graph(model)
              if registry.registration_of(type(node)) and "quantized" not in path}  # fmt: skip
    scaled = wrappers.scaled(model)
    why = {path: scaled.get(id(node)) or _why_not(path, node, exclude)
           for path, node in layers.items()}  # fmt: skip
    chosen = {path: node for path, node in layers.items() if not why[path]}
    left = {places.dotted(path): reason for path, reason in why.items() if reason}
    left |= {places.dotted(own.path): f"a parameter of {type(own.owner).__name__}"
             for own in parameters.find(model)
             if own.owner_path not in layers}  # fmt: skip
    adapted = [places.dotted(path) for path, node in chosen.items() if hasattr(node, "lora_ranks")]
    if not chosen or adapted:
        raise errors.UserError(
            expected="a model with linear layers to quantize, without adapters",
            found=[f"{name} has an adapter" for name in adapted]
            or [f"{name}: {reason}" for name, reason in left.items()] or "none",
            where=str(type(model)),
        )  # fmt: skip
    for path, node in chosen.items():
        if type(node) is nnx.Linear and path and registry.is_usual(node):
            become(node, quantize_linear(node, fmt))
        else:
            quantize_layer(node, fmt)
    return taken.Taken(dict.fromkeys(map(places.dotted, chosen), fmt), left)


def _why_not(path, layer, exclude) -> str:
    """Why a layer is left dense; "" if it is not."""
    if (packed := quant_linear.packed_of(layer)) is not None:
        return f"in {packed.fmt} already"
    if path and path[-1] in exclude:
        return "excluded"
    if problem := registry.problem(layer):
        return problem
    how, name = registry.linear_map_of(layer), registry.registration_of(type(layer)).weight
    if name not in vars(layer):
        return f"has no {name!r}"
    if registry.weight_of(layer).ndim > how.ndim + 1:
        return "a stack of stacks"
    if isinstance(how, linear_map.Einsum):
        return "a product with batch axes" if how.batch else ""
    return "an embedding" if isinstance(how, linear_map.Embedding) else "a convolution"


def become(layer: nnx.Module, other: nnx.Module) -> None:
    """Makes the layer what `other` is. It stays where it is: also in a tuple, or a dataclass."""
    object.__setattr__(layer, "__class__", type(other))
    vars(layer).clear()
    vars(layer).update(vars(other))


def dequantize_linear(layer: quant_linear.QuantLinear) -> nnx.Linear:
    """The dense layer that `layer` represents, in the original dtype of its weight."""
    return as_linear(layer, quant_linear.dense_matrix(layer))


def as_linear(
    layer: quant_linear.QuantLinear, kernel: Float[Array, "*L d_in d_out"], axis: int | None = None
) -> nnx.Linear:
    """The layer that `layer` was quantized from, with that kernel in its original dtype.

    axis: where the stack's axis goes; None: where it was.
    """
    bias = None if layer.bias is None else layer.bias[...]
    kernel = quant_linear.in_place(kernel, layer.axis if axis is None else axis)
    state = {"kernel": kernel.astype(layer.param_dtype)} | ({} if bias is None else {"bias": bias})
    return nnx.merge(layer.dense, state)


def dequantize_model(model: nnx.Module) -> None:
    """The inverse of quantize_model: each layer is of its own class again, with rounded weights.

    Raises: UserError if a layer has an adapter.
    """
    found = [(path, node) for path, node in nnx.iter_graph(model)
             if quant_linear.packed_of(node) is not None and "quantized" not in path]  # fmt: skip
    if adapted := [places.dotted(path) for path, node in found if hasattr(node, "lora_ranks")]:
        raise errors.UserError(
            expected="a model without adapters",
            found=[f"{name} has one" for name in adapted],
            do="lora.merge(model), which also dequantizes, or lora.strip(model) first",
        )
    for _, node in found:
        if isinstance(node, quant_linear.QuantLinear):
            become(node, dequantize_linear(node))
        else:
            make_dense(node, quant_linear.dense_matrix(node.quantized))


@functools.partial(jax.jit, static_argnums=1)
def _quantize(kernel, fmt):
    return quant_linear.each_layer(
        lambda weight: formats.quantize(weight, fmt), kernel, kernel.ndim
    )
