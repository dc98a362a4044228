"""Layers that compute with a packed weight, and the conversion from and to dense layers."""

import functools
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Num

from lora_jax import errors
from lora_jax.kernels import packed as packing
from lora_jax.kernels import partition as dealing
from lora_jax.kernels.packed import Packed
from lora_jax.layers import (
    linear_map,
    mixin,
    parameters,
    placement,
    places,
    projections,
    registry,
    stack,
    taken,
    weight,
)
from lora_jax.quant import formats, product


class QuantWeight(stack.Whole):
    """A packed array: part of the model's state, but not a parameter."""


class QuantLinear(nnx.Module):
    """y = x · dequantize(W) + b, with W frozen in one of formats.FORMATS.

    fmt says what the codes mean; the shapes of the arrays say how many rows share a scale.

    Replaces `linear`, whose results it has: in its dtype, or in the one that x, W and b promote to.
    `dense` is what it needs to become `linear` again. In a stacked module its arrays have a leading
    layer axis. It is then called in a scan, where `layer` is a scalar and the packed arrays are
    whole or sliced. partition: how a mesh splits the product, for our own kernels. axis: of the
    stack in the parameters; the packed arrays have it first. metadata: of the words, for Flax.
    """

    def __init__(
        self,
        packed: Packed,
        linear: nnx.Linear,
        *,
        fmt: str,
        partition: dealing.Partition = dealing.WHOLE,
        axis: int = 0,
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.fmt = fmt
        self.partition = partition
        self.dtype = linear.dtype
        self.param_dtype = linear.kernel.dtype
        self.preferred_element_type = linear.preferred_element_type
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.use_bias = linear.use_bias
        self.dense = nnx.graphdef(linear)
        for name, array in packed._asdict().items():
            own = metadata if name == "q" else {}
            setattr(self, name, None if array is None else QuantWeight(array, **own))
        self.axis = axis
        self.layer = stack.index(len(packed.q), axis) if packed.q.ndim == 3 else None
        self.bias = None if linear.bias is None else nnx.Param(linear.bias.get_value())

    @property
    def packed(self) -> Packed:
        """The arrays of the packed weight."""
        arrays = (getattr(self, name) for name in Packed._fields)
        return Packed(*(None if array is None else array[...] for array in arrays))

    @property
    def kernel(self) -> weight.Computed:
        """The weight that the layer represents."""
        index = stack.current(self.layer, self.axis)
        lead = self.q.shape[:-2] if index is None else ()
        shape = list((self.in_features, self.out_features))
        for size in lead:
            shape.insert(self.axis, size)
        compute = lambda: _in_place(dense_matrix(self), bool(lead) and self.axis)  # noqa: E731
        return weight.Computed(tuple(shape), self.param_dtype, compute)

    def __call__(
        self, inputs: Num[Array, "*B d_in"], out_sharding: Any = None
    ) -> Float[Array, "*B d_out"]:
        """out_sharding: of y, on a mesh with explicit axes, as in nnx.Linear."""
        shape = (self.in_features, self.out_features)
        x, how = inputs.astype(result_dtype(self, inputs)), linear_map.LINEAR
        y = product.multiply(how, x, self.multiplier, shape=shape, out_sharding=out_sharding)
        y = projections.with_bias(self, y)
        preferred = self.preferred_element_type
        return y if preferred is None else y.astype(preferred)

    @property
    def multiplier(self) -> jax.tree_util.Partial:
        """x → x · dequantize(W)."""
        packed, layer = self.packed, None
        if packed.q.ndim == 3:
            layer = stack.current(self.layer, self.axis)
            if layer is None:
                raise ValueError("expected one layer of the stack, in a scan; found all of it")
        return product.multiplier(packed, self.fmt, layer, self.partition)


class QuantLayer(mixin.Mixin):
    """y = einsum(x, dequantize(W)) + b: a second class that a layer other than nnx.Linear gets.

    The layer keeps everything but its weight. `quantized` is the weight as a matrix, see
    linear_map.py; `quantized_shape` is the weight's shape, with the axes of a stack first. Where
    the weight itself is read, it is dequantized.
    """

    @classmethod
    def mixin_attributes(cls, original: type[nnx.Module]) -> dict[str, Any]:
        name = registry.registration_of(original).weight
        return {name: weight.attribute(name, dense_weight)}

    def __call__(self, *args: Any, **kwargs: Any) -> Num[Array, "..."]:
        if not registry.is_usual(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)
        x = registry.input_of(self, args, kwargs)
        bound = inspect.signature(super().__call__).bind(*args, **kwargs).arguments
        y = product.multiply(
            registry.linear_map_of(self),
            x.astype(result_dtype(self, x)),
            self.quantized.multiplier,
            shape=self.quantized_shape,
            bias=registry.bias_of(self),
            out_sharding=bound.get("out_sharding"),
        )
        preferred = getattr(self, "preferred_element_type", None)
        return y if preferred is None else y.astype(preferred)


def dense_weight(layer: nnx.Module) -> weight.Computed:
    """The dequantized weight of a quantized layer, in place of the original one."""
    if isinstance(layer, QuantLinear):
        return QuantLinear.kernel.fget(layer)
    shape, packed, how = layer.quantized_shape, layer.quantized, registry.linear_map_of(layer)
    in_scan = packed.q.ndim == 2 or stack.current(packed.layer, packed.axis) is not None
    shape = shape[len(shape) - how.ndim :] if in_scan else shape
    axis = 0 if in_scan else packed.axis

    def compute():
        return _in_place(placement.unpacked(how, dense_matrix(packed), shape), axis)

    own = jax.eval_shape(lambda: _in_place(jnp.zeros(shape), axis)).shape
    return weight.Computed(own, packed.param_dtype, compute)


def _in_place(array: jax.Array, axis: int) -> jax.Array:
    """With the first axis, which numbers stacked layers, at that place."""
    return jnp.moveaxis(array, 0, axis) if axis else array


def result_dtype(layer: nnx.Module, x: jax.Array) -> jnp.dtype:
    """The dtype that the dense layer would compute in."""
    if (dtype := getattr(layer, "dtype", None)) is not None:
        return jnp.dtype(dtype)
    bias = registry.bias_of(layer)
    return jnp.result_type(x, packed_of(layer).param_dtype, *([] if bias is None else [bias]))


def packed_of(layer: Any) -> QuantLinear | None:
    """The QuantLinear that holds the layer's weight; None if the weight is not quantized."""
    if isinstance(layer, QuantLayer):
        return layer.quantized
    return layer if isinstance(layer, QuantLinear) else None


def quantize_linear(linear: nnx.Linear, fmt: str) -> QuantLinear:
    """The same layer with its kernel, [K, N] or stacked [L, K, N], quantized."""
    axis = registry.stack_axis(linear, linear.kernel)
    packed = _packed(jnp.moveaxis(linear.kernel[...], axis, 0), fmt)
    names = placement.metadata(linear.kernel, functools.partial(_first, axis=axis))
    return QuantLinear(packed, linear, fmt=fmt, axis=axis, metadata=names)


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
    mixin.become(layer, QuantLayer, known.cls)
    names = placement.metadata(stored, lambda names: how.matrix_axes(_first(names, axis)))
    packed = _packed(matrix, fmt)
    layer.quantized = QuantLinear(packed, linear, fmt=fmt, axis=axis, metadata=names)
    layer.quantized_shape = moved.shape


def make_dense(layer: nnx.Module, matrix: Float[Array, "*L d_in d_out"]) -> None:
    """The inverse of quantize_layer, with that weight as a matrix."""
    how, shape = registry.linear_map_of(layer), layer.quantized_shape
    stored, axis = as_linear(layer.quantized, matrix, 0).kernel, layer.quantized.axis
    mixin.leave(layer, QuantLayer, "quantized", "quantized_shape")
    name = registry.registration_of(type(layer)).weight
    tensor = placement.unpacked(how, stored[...], shape)
    setattr(layer, name, stored.replace(_in_place(tensor, axis)))


def quantize_model(
    model: nnx.Module, fmt: str, *, exclude: tuple[str, ...] = ("lm_head",)
) -> taken.Taken:
    """{dotted path: fmt} of every linear layer whose name is not in `exclude`, which it quantizes.

    A QuantLinear replaces an nnx.Linear; a layer of another class becomes a QuantLayer. The result
    also tells what was left dense, and why.
    Raises: UserError if there is no such layer, or if one has an adapter already.
    """
    layers = {path: node for path, node in nnx.iter_graph(model)
              if registry.registration_of(type(node)) and "quantized" not in path}  # fmt: skip
    why = {path: _why_not(path, node, fmt, exclude) for path, node in layers.items()}
    chosen = {path: node for path, node in layers.items() if not why[path]}
    left = {_dotted(path): reason for path, reason in why.items() if reason}
    left |= {_dotted(own.path): f"a parameter of {type(own.owner).__name__}"
             for own in parameters.find(model)}  # fmt: skip
    adapted = [_dotted(path) for path, node in chosen.items() if hasattr(node, "lora_ranks")]
    if not chosen or adapted:
        raise errors.UserError(
            expected="a model with linear layers to quantize, without adapters",
            found=[f"{name} has an adapter" for name in adapted]
            or [f"{name}: {reason}" for name, reason in left.items()] or "none",
            where=str(type(model)),
        )  # fmt: skip
    for path, node in chosen.items():
        if type(node) is nnx.Linear and path:
            replace(model, path, quantize_linear(node, fmt))
        else:
            quantize_layer(node, fmt)
    return taken.Taken(dict.fromkeys(map(_dotted, chosen), fmt), left)


def _why_not(path, layer, fmt, exclude) -> str:
    """Why a layer is left dense; "" if it is not."""
    if (packed := packed_of(layer)) is not None:
        return f"in {packed.fmt} already"
    if path and path[-1] in exclude:
        return "excluded"
    how = registry.linear_map_of(layer)
    if isinstance(how, linear_map.Einsum):
        return "a product with batch axes" if how.batch else ""
    return "an embedding" if isinstance(how, linear_map.Embedding) else "a convolution"


def _dotted(path) -> str:
    return ".".join(map(str, path))


def replace(model: nnx.Module, path: tuple[str | int, ...], new: nnx.Module) -> None:
    """Puts `new` in every place of the model that has the module at `path`."""
    for place in places.find(model)[id(places.at(model, path))]:
        place.put(new)


def dequantize_linear(layer: QuantLinear) -> nnx.Linear:
    """The dense layer that `layer` represents, in the original dtype of its weight."""
    return as_linear(layer, dense_matrix(layer))


def as_linear(
    layer: QuantLinear, kernel: Float[Array, "*L d_in d_out"], axis: int | None = None
) -> nnx.Linear:
    """The layer that `layer` was quantized from, with that kernel in its original dtype.

    axis: where the stack's axis goes; None: where it was.
    """
    bias = None if layer.bias is None else layer.bias[...]
    kernel = _in_place(kernel, layer.axis if axis is None else axis)
    state = {"kernel": kernel.astype(layer.param_dtype)} | ({} if bias is None else {"bias": bias})
    return nnx.merge(layer.dense, state)


def dense_matrix(layer: QuantLinear) -> Float[Array, "*L d_in d_out"]:
    """dequantize(W) of a layer, of the one that a scan is at, or of all layers of a stack."""
    packed, index = layer.packed, stack.current(layer.layer, layer.axis)
    if index is not None and packed.q.ndim == 3:
        packed = packing.layer(packed, index)

    def dense(packed):
        return _dequantize(packed, layer.fmt, layer.in_features, layer.param_dtype)

    return placement.computed(dense, packed.q.ndim - 2, packed)


def dequantize_model(model: nnx.Module) -> None:
    """The inverse of quantize_model: each layer is of its own class again, with rounded weights.

    Raises: UserError if a layer has an adapter.
    """
    found = [(path, node) for path, node in nnx.iter_graph(model)
             if packed_of(node) is not None and "quantized" not in path]  # fmt: skip
    if adapted := [_dotted(path) for path, node in found if hasattr(node, "lora_ranks")]:
        raise errors.UserError(
            expected="a model without adapters",
            found=[f"{name} has one" for name in adapted],
            do="lora.merge(model), which also dequantizes, or lora.strip(model) first",
        )
    for path, node in found:
        if isinstance(node, QuantLinear):
            replace(model, path, dequantize_linear(node))
        else:
            make_dense(node, dense_matrix(node.quantized))


@functools.partial(jax.jit, static_argnums=1)
def _quantize(kernel, fmt):
    return _each_layer(lambda weight: formats.quantize(weight, fmt), kernel, kernel.ndim)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _dequantize(packed, *how):
    return _each_layer(lambda layer: formats.dequantize(layer, *how), packed, packed.q.ndim)


def _each_layer(function, weights, ndim: int):
    return function(weights) if ndim == 2 else lax.map(function, weights)


registry.REGISTRATIONS[QuantLinear] = registry.Registration(
    "q", lambda _: linear_map.LINEAR, reads="kernel"
)
