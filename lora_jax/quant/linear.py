"""Layers that compute with a packed weight, and the conversion from and to dense layers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from lora_jax import errors
from lora_jax.kernels import int4_matmul, int8_matmul
from lora_jax.kernels import packed as packing
from lora_jax.kernels import partition as dealing
from lora_jax.kernels.packed import Packed
from lora_jax.layers import linear_map, mixin, places, projections, registry, stack
from lora_jax.quant import formats


class QuantWeight(stack.Whole):
    """A packed array: part of the model's state, but not a parameter."""


class Rounded:
    """A packed weight as a variable: its shape and dtype; [...] and .value dequantize it.

    Models read the sizes of their layers from their weights.
    """

    def __init__(self, packed: "QuantLinear", shape: tuple[int, ...], how: linear_map.Einsum):
        self.shape, self.ndim, self.dtype = tuple(shape), len(shape), packed.param_dtype
        self._packed, self._how = packed, how

    @property
    def value(self) -> jax.Array:
        return self._how.tensor(dequantize_linear(self._packed).kernel[...], self.shape)

    def __getitem__(self, index: Any) -> jax.Array:
        return self.value[index]


class QuantLinear(nnx.Module):
    """y = x · dequantize(W) + b, with W frozen in one of formats.FORMATS.

    fmt says what the codes mean; the shapes of the arrays say how many rows share a scale.

    Replaces `linear`. It keeps the bias, the dtype to compute in (None: x's), and what it needs to
    become dense again. In a stacked module its arrays have a leading layer axis. It is then called
    in a scan, where `layer` is a scalar and the packed arrays are whole or sliced.
    partition: how a mesh splits the product, for our own kernels.
    """

    def __init__(
        self,
        packed: Packed,
        linear: nnx.Linear,
        *,
        fmt: str,
        partition: dealing.Partition = dealing.WHOLE,
    ):
        self.fmt = fmt
        self.partition = partition
        self.dtype = linear.dtype
        self.param_dtype = linear.kernel.dtype
        self.dot_general = linear.dot_general
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        for name, array in packed._asdict().items():
            setattr(self, name, None if array is None else QuantWeight(array))
        layers = jnp.arange(len(packed.q)) if packed.q.ndim == 3 else None
        self.layer = None if layers is None else stack.LayerIndex(layers)
        self.bias = None if linear.bias is None else nnx.Param(linear.bias.get_value())

    @property
    def packed(self) -> Packed:
        """The arrays of the packed weight."""
        arrays = (getattr(self, name) for name in Packed._fields)
        return Packed(*(None if array is None else array[...] for array in arrays))

    @property
    def kernel(self) -> Rounded:
        """The weight that the layer represents."""
        shape = (*self.q.shape[:-2], self.in_features, self.out_features)
        return Rounded(self, shape, linear_map.LINEAR)

    def __call__(
        self, x: Float[Array, "*B d_in"], out_sharding: Any = None
    ) -> Float[Array, "*B d_out"]:
        """out_sharding: of y, on a mesh with explicit axes, as in nnx.Linear."""
        y = projections.with_bias(self, self.product(x.astype(self.dtype or x.dtype)))
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)

    def product(self, x: Float[Array, "*B d_in"]) -> Float[Array, "*B d_out"]:
        """x · dequantize(W)."""
        packed, layer = self.packed, None
        if packed.q.ndim == 3:
            layer = None if self.layer is None else self.layer[...]
            if layer is None or layer.ndim:
                raise ValueError("expected one layer of the stack, in a scan; found all of it")
        codes = formats.codes(self.fmt)
        if codes == "int8":
            packed = packed if layer is None else packing.layer(packed, layer)
            return int8_matmul.int8_matmul(x, packed.q, packed.column_scale)
        how = {"codes": codes, "layer": layer, "partition": self.partition}
        return int4_matmul.int4_matmul(x, packed, **how)


class QuantLayer(nnx.Module):
    """y = einsum(x, dequantize(W)) + b: a second class that a layer other than nnx.Linear gets.

    The layer keeps everything but its weight. `quantized` is the weight as a matrix, see
    linear_map.py; `quantized_shape` is the weight's shape, with the axes of a stack first.
    """

    def __call__(self, x: Float[Array, "..."], *args: Any, **kwargs: Any) -> Float[Array, "..."]:
        how, shape = registry.linear_map_of(self), self.quantized_shape
        dtype = getattr(self, "dtype", None) or x.dtype
        y = how.multiply(x.astype(dtype), self.quantized.product, shape=shape)
        if (bias := getattr(self, "bias", None)) is None:
            return y
        return y + how.spread(bias[...].reshape(-1).astype(y.dtype), y.ndim, shape)

    def __getattr__(self, name: str) -> Rounded:
        known = registry.registration_of(type(self))
        if name != known.weight or "quantized_shape" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return Rounded(self.quantized, self.quantized_shape, registry.linear_map_of(self))


def packed_of(layer: Any) -> QuantLinear | None:
    """The QuantLinear that holds the layer's weight; None if the weight is not quantized."""
    if isinstance(layer, QuantLayer):
        return layer.quantized
    return layer if isinstance(layer, QuantLinear) else None


def quantize_linear(linear: nnx.Linear, fmt: str) -> QuantLinear:
    """The same layer with its kernel, [K, N] or stacked [L, K, N], quantized."""
    kernel = linear.kernel[...]
    return QuantLinear(_quantize(kernel, fmt), linear, fmt=fmt)


def quantize_layer(layer: nnx.Module, fmt: str) -> None:
    """Makes a LinearGeneral, an Einsum or a layer of a registered class a QuantLayer."""
    how, name = registry.linear_map_of(layer), registry.registration_of(type(layer)).weight
    weight = getattr(layer, name)[...]
    matrix = how.matrix(weight)
    linear = nnx.eval_shape(
        lambda: nnx.Linear(
            *matrix.shape[-2:], use_bias=False, param_dtype=weight.dtype, rngs=nnx.Rngs(0)
        )
    )
    linear.kernel = nnx.Param(matrix)
    delattr(layer, name)
    mixin.become(layer, QuantLayer)
    layer.quantized, layer.quantized_shape = quantize_linear(linear, fmt), weight.shape


def make_dense(layer: nnx.Module, weight: Float[Array, "..."]) -> None:
    """The inverse of quantize_layer, with that weight."""
    dtype = layer.quantized.param_dtype
    mixin.leave(layer, "quantized", "quantized_shape")
    setattr(layer, registry.registration_of(type(layer)).weight, nnx.Param(weight.astype(dtype)))


def quantize_model(model: nnx.Module, fmt: str, *, exclude: tuple[str, ...] = ("lm_head",)) -> None:
    """Quantizes every linear layer whose name is not in `exclude`: nnx.Linear, LinearGeneral, …

    A QuantLinear replaces an nnx.Linear; a layer of another class becomes a QuantLayer.
    Raises: UserError if there is no such layer, or if one has an adapter already.
    """
    layers = [
        (path, node)
        for path, node in nnx.iter_graph(model)
        if (known := registry.registration_of(type(node))) and packed_of(node) is None
        and path and path[-1] not in exclude and "quantized" not in path
        and isinstance(how := known.linear_map_of(node), linear_map.Einsum) and not how.batch
    ]  # fmt: skip
    adapted = [".".join(map(str, path)) for path, node in layers if hasattr(node, "lora_ranks")]
    if not layers or adapted:
        raise errors.UserError(
            expected="a model with linear layers to quantize, without adapters",
            found=[f"{name} has an adapter" for name in adapted] or "none",
            where=str(type(model)),
        )
    for path, node in layers:
        if isinstance(node, nnx.Linear):
            replace(model, path, quantize_linear(node, fmt))
        else:
            quantize_layer(node, fmt)


def replace(model: nnx.Module, path: tuple[str | int, ...], new: nnx.Module) -> None:
    """Puts `new` in every place of the model that has the module at `path`."""
    for place in places.find(model)[id(places.at(model, path))]:
        place.put(new)


def dequantize_linear(layer: QuantLinear) -> nnx.Linear:
    """The dense layer that `layer` represents, in the original dtype of its weight."""
    kernel = _dequantize(layer.packed, layer.fmt, layer.in_features, layer.param_dtype)
    return as_linear(layer, kernel)


def as_linear(layer: QuantLinear, kernel: Float[Array, "*L d_in d_out"]) -> nnx.Linear:
    """A dense layer to replace `layer`, with that kernel in the original dtype of its weight."""
    linear = nnx.eval_shape(
        lambda: nnx.Linear(
            layer.in_features,
            layer.out_features,
            use_bias=layer.bias is not None,
            dtype=layer.dtype,
            param_dtype=layer.param_dtype,
            dot_general=layer.dot_general,
            rngs=nnx.Rngs(0),
        )
    )
    linear.kernel = nnx.Param(kernel.astype(layer.param_dtype))
    linear.bias = layer.bias
    return linear


@functools.partial(jax.jit, static_argnums=1)
def _quantize(kernel, fmt):
    return _each_layer(lambda weight: formats.quantize(weight, fmt), kernel, kernel.ndim)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _dequantize(packed, *how):
    return _each_layer(lambda layer: formats.dequantize(layer, *how), packed, packed.q.ndim)


def _each_layer(function, weights, ndim: int):
    return function(weights) if ndim == 2 else lax.map(function, weights)


registry.REGISTRATIONS[QuantLinear] = registry.Registration("q", lambda _: linear_map.LINEAR)
