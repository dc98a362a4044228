"""Layers that compute with a packed weight, in a Flax NNX model."""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Num

from lora_jax.kernels import packed as packing
from lora_jax.kernels import partitioning
from lora_jax.kernels.packed import Packed
from lora_jax.layers import (
    linear_map,
    mixin,
    placement,
    projections,
    registry,
    stack,
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
        partition: partitioning.Partition = partitioning.WHOLE,
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
        return dense_weight(self)

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
    packed = packed_of(layer)
    how, single = linear_map.LINEAR, (packed.in_features, packed.out_features)
    if isinstance(layer, QuantLayer):
        how = registry.linear_map_of(layer)
        single = layer.quantized_shape[-how.ndim :]
    is_stack = packed.q.ndim == 3 and stack.current(packed.layer, packed.axis) is None
    whole = (*(packed.q.shape[:1] if is_stack else ()), *single)
    axis = packed.axis if is_stack else 0

    def compute():
        return in_place(placement.unpacked(how, dense_matrix(packed), whole), axis)

    shape = (*whole[1 : axis + 1], whole[0], *whole[axis + 1 :])
    return weight.Computed(shape, packed.param_dtype, compute)


def in_place(array: jax.Array, axis: int) -> jax.Array:
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


def dense_matrix(layer: QuantLinear) -> Float[Array, "*L d_in d_out"]:
    """dequantize(W) of a layer, of the one that a scan is at, or of all layers of a stack."""
    packed, index = layer.packed, stack.current(layer.layer, layer.axis)
    if index is not None and packed.q.ndim == 3:
        packed = packing.layer(packed, index)

    def dense(packed):
        return _dequantize(packed, layer.fmt, layer.in_features, layer.param_dtype)

    return placement.computed(dense, packed.q.ndim - 2, packed)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _dequantize(packed, *how):
    return each_layer(lambda layer: formats.dequantize(layer, *how), packed, packed.q.ndim)


def each_layer(function: Callable, weights: Any, ndim: int) -> Any:
    """function(weights) of a matrix, or of each matrix of a stack, one at a time."""
    return function(weights) if ndim == 2 else lax.map(function, weights)


registry.REGISTRATIONS[QuantLinear] = registry.Registration(
    "q", lambda _: linear_map.LINEAR, reads="kernel"
)
