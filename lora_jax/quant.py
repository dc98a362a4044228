"""Quantise a weight to int8, int4 or NF4, and a linear layer that computes with the packed form."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int8, Num, UInt32

from lora_jax import errors
from lora_jax.kernels import int4_matmul, int8_matmul

GROUP = {"int4": 32, "nf4": 64}  # rows of W that share a scale
_COLUMNS = 512  # quantised at a time, so that temporaries stay small beside the weight


class Packed(NamedTuple):
    """A quantised weight W [K, N]: see kernels/int4_matmul.py for the 4-bit layout.

    int8: q int8 [K, N] and column_scale [1, N], with w = q · column_scale.
    """

    q: UInt32[Array, "words N"] | Int8[Array, "K N"]
    scale: Num[Array, "groups N"] | None
    column_scale: Float[Array, "1 N"] | None


class QuantWeight(nnx.Variable):
    """A packed array: part of the model's state, but never of its parameters."""


@functools.partial(jax.jit, static_argnames=("fmt", "multiple"))
def quantise(weight: Float[Array, "K N"], fmt: str, multiple: int = 1) -> Packed:
    """The packed weight nearest to `weight` in format "int8", "int4" or "nf4".

    int4: symmetric, group of 32 rows, signed scale (so that the largest |w| can sit on −8) chosen
    by search for the least squared error, then refitted and rounded to int8 × one float32 a
    column. nf4: bitsandbytes' codes bit for bit where K is a multiple of 64. int8: absmax a column.
    K is padded with zeros to the group × `multiple` (the shards of its axis).
    """
    if fmt not in _QUANTISERS:
        raise ValueError(f"expected a format among {tuple(_QUANTISERS)}, found {fmt!r}")
    rows, columns = weight.shape
    weight = jnp.pad(weight, ((0, -rows % (GROUP.get(fmt, 1) * multiple)), (0, 0)))
    block = min(_COLUMNS, columns)

    def quantise_block(index, packed):
        # The last block starts early enough to fit: its overlap is computed twice, to the same end.
        start = jnp.minimum(index * block, columns - block)
        part = lax.dynamic_slice_in_dim(weight, start, block, axis=1).astype(jnp.float32)
        return jax.tree.map(
            lambda whole, new: lax.dynamic_update_slice_in_dim(whole, new, start, axis=1),
            packed,
            _QUANTISERS[fmt](part),
        )

    shapes = jax.eval_shape(_QUANTISERS[fmt], jax.ShapeDtypeStruct(weight.shape, jnp.float32))
    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.fori_loop(0, -(-columns // block), quantise_block, empty)


def dequantise(
    packed: Packed, fmt: str, rows: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "K N"]:
    """The first `rows` rows of the weight that `packed` stands for."""
    if fmt == "int8":
        return (packed.q.astype(jnp.float32) * packed.column_scale).astype(dtype)
    return int4_matmul.dequantise(*packed, fmt=fmt, dtype=dtype)[:rows]


def _int8(weight: jax.Array) -> Packed:
    column_scale = jnp.abs(weight).max(axis=0, keepdims=True) / 127
    return Packed(_rounded(weight, column_scale, 127).astype(jnp.int8), None, column_scale)


def _int4(weight: jax.Array) -> Packed:
    grouped = weight.reshape(-1, GROUP["int4"], weight.shape[1])
    largest = jnp.abs(grouped).max(axis=1, keepdims=True)

    def codes(scale):
        return jnp.clip(_rounded(grouped, scale), -8, 7)

    def try_scale(index, best):
        # 2 signs × 24 magnitudes, from a range wider than the group to one that clips its ends.
        # The steps miss half-integers: there the largest weight is a tie, which falls one way or
        # the other with the last bit, so with how the loop was compiled.
        error, scale = best
        candidate = largest / (6.55 + (index // 2) / 6.0) * (1 - 2 * (index % 2))
        new_error = jnp.square(codes(candidate) * candidate - grouped).sum(axis=1, keepdims=True)
        better = new_error < error
        return jnp.where(better, new_error, error), jnp.where(better, candidate, scale)

    start = (jnp.full_like(largest, jnp.inf), largest / 7)
    _, scale = lax.fori_loop(0, 48, try_scale, start)
    q = codes(scale)
    refit = (grouped * q).sum(axis=1) / jnp.maximum(jnp.square(q).sum(axis=1), 1)
    column_scale = jnp.abs(refit).max(axis=0, keepdims=True) / 127
    scale = _rounded(refit, column_scale).astype(jnp.int8)
    q = codes((scale * column_scale)[:, None]).astype(jnp.int32)
    return Packed(_pack(q.reshape(weight.shape)), scale, column_scale)


def _nf4(weight: jax.Array) -> Packed:
    grouped = weight.reshape(-1, GROUP["nf4"], weight.shape[1])
    absmax = jnp.abs(grouped).max(axis=1)
    scaled = grouped * jnp.where(absmax == 0, 0, 1 / absmax)[:, None]
    middles = (int4_matmul.NF4_CODE[1:] + int4_matmul.NF4_CODE[:-1]) / 2
    q = sum((scaled > middle).astype(jnp.int32) for middle in middles)
    return Packed(_pack(q.reshape(weight.shape)), absmax, None)


_QUANTISERS = {"int8": _int8, "int4": _int4, "nf4": _nf4}


def _rounded(weight: jax.Array, scale: jax.Array, largest: int | None = None) -> jax.Array:
    codes = jnp.rint(weight * jnp.where(scale == 0, 0, 1 / scale))
    return codes if largest is None else jnp.clip(codes, -largest, largest)


def _pack(codes: jax.Array) -> jax.Array:
    """int32 codes [K, N] → uint32 [K/8, N], nibble i of word j = row 8j+i."""
    nibbles = lax.bitcast_convert_type(codes & 15, jnp.uint32).reshape(-1, 8, codes.shape[1])
    return sum(nibbles[:, i] << (4 * i) for i in range(8))


class QuantLinear(nnx.Module):
    """y = x · dequantise(W) + b, with W frozen in "int8", "int4" or "nf4".

    Takes the place of `linear`, of which it keeps the bias, the dtype to compute in (None: x's),
    and what it needs to become dense again. Its arrays may carry a leading layer axis, as in a
    stacked module, in which case the module is called under `lax.scan`.
    """

    def __init__(self, packed: Packed, linear: nnx.Linear, *, fmt: str):
        self.fmt = fmt
        self.dtype = linear.dtype
        self.param_dtype = linear.kernel.dtype
        self.dot_general = linear.dot_general
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.q = QuantWeight(packed.q)
        self.scale = None if packed.scale is None else QuantWeight(packed.scale)
        self.column_scale = (
            None if packed.column_scale is None else QuantWeight(packed.column_scale)
        )
        self.bias = None if linear.bias is None else nnx.Param(linear.bias.get_value())

    @property
    def packed(self) -> Packed:
        """The packed weight's arrays."""
        return Packed(
            self.q[...],
            None if self.scale is None else self.scale[...],
            None if self.column_scale is None else self.column_scale[...],
        )

    def __call__(self, x: Float[Array, "*B d_in"]) -> Float[Array, "*B d_out"]:
        packed, x = self.packed, x.astype(self.dtype or x.dtype)
        if self.fmt == "int8":
            y = int8_matmul.int8_matmul(x, packed.q, packed.column_scale)
        else:
            y = int4_matmul.int4_matmul(x, *packed, fmt=self.fmt)
        if self.bias is None:
            return y
        return y + jnp.expand_dims(self.bias[...].astype(y.dtype), tuple(range(y.ndim - 1)))


def quantise_linear(linear: nnx.Linear, fmt: str) -> QuantLinear:
    """The same layer with its kernel, [K, N] or stacked [L, K, N], quantised."""
    kernel = linear.kernel[...]
    packed = _each_layer(lambda weight: quantise(weight, fmt), kernel, kernel.ndim)
    return QuantLinear(packed, linear, fmt=fmt)


def quantise_model(model: nnx.Module, fmt: str, *, exclude: tuple[str, ...] = ("lm_head",)) -> None:
    """Puts a QuantLinear in the place of every nnx.Linear whose name is not in `exclude`.

    Raises: UserError when there is none.
    """
    linears = [
        (path, node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Linear) and path and path[-1] not in exclude
    ]
    if not linears:
        raise errors.UserError(
            expected="a model with an nnx.Linear to quantise", found="none", where=str(type(model))
        )
    for path, node in linears:
        replace(model, path, quantise_linear(node, fmt))


def replace(model: nnx.Module, path: tuple[str | int, ...], new: nnx.Module) -> None:
    """Makes `new` the module at `path` of the model."""
    parent: Any = model
    for part in path[:-1]:
        parent = getattr(parent, part) if isinstance(part, str) else parent[part]
    if isinstance(path[-1], str):
        setattr(parent, path[-1], new)
    else:
        parent[path[-1]] = new


def dequantise_linear(layer: QuantLinear) -> nnx.Linear:
    """The dense layer that `layer` stands for, in the dtype its weight had."""
    kernel = _each_layer(
        lambda packed: dequantise(packed, layer.fmt, layer.in_features, layer.param_dtype),
        layer.packed,
        layer.q.ndim,
    )
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
    linear.kernel = nnx.Param(kernel)
    linear.bias = layer.bias
    return linear


def _each_layer(function, weights, ndim: int):
    return function(weights) if ndim == 2 else lax.map(function, weights)
