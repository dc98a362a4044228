"""Layers that compute with a packed weight, and the conversion from and to dense layers."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora_jax import errors
from lora_jax.quant import conversion, formats

FORMATS = tuple(fmt for fmt in formats.FORMATS if fmt != "fp4-dq")  # nf4-dq with another table
FEW = ("int8", "int4", "nf4-dq")
SOME = (*FEW, *cases.long(*sorted({*FORMATS} - {*FEW})))


@functools.partial(jax.jit, static_argnums=(1, 2))
def dequantize(packed, fmt, rows):
    return formats.dequantize(packed, fmt, rows)


def relative_error(found, weight):
    return np.linalg.norm(found - weight) / np.linalg.norm(weight)


@pytest.mark.parametrize("bias", [True, *cases.long(False)])
@pytest.mark.parametrize("fmt", SOME)
def test_layer_computes_with_the_dequantized_weight(fmt, bias):
    linear = nnx.Linear(44, 13, use_bias=bias, rngs=nnx.Rngs(0))
    if bias:
        linear.bias.set_value(jnp.arange(13.0))
    layer = conversion.quantize_linear(linear, fmt)
    assert (layer.in_features, layer.out_features, layer.fmt) == (44, 13, fmt)
    dense = conversion.dequantize_linear(layer)
    assert isinstance(dense, nnx.Linear) and dense.kernel.shape == (44, 13)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 44)).astype(np.float32))
    np.testing.assert_allclose(layer(x), dense(x), atol=1e-5)
    assert 0 < relative_error(np.asarray(dense.kernel), np.asarray(linear.kernel)) < 0.11
    if bias:
        np.testing.assert_array_equal(dense.bias[...], jnp.arange(13.0))
        np.testing.assert_allclose(layer(jnp.zeros((2, 44)))[0], jnp.arange(13.0))
    else:
        assert layer.bias is None and dense.bias is None
    half = x.astype(jnp.bfloat16)
    assert layer(half).dtype == dense(half).dtype


@pytest.mark.parametrize("fmt", SOME)
def test_stacked_layer_is_each_layer_on_its_own(fmt):
    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stacked(rngs):
        return nnx.Linear(40, 6, rngs=rngs)

    linear = stacked(nnx.Rngs(0))
    layer = conversion.quantize_linear(linear, fmt)
    dense = conversion.dequantize_linear(layer)
    assert dense.kernel.shape == (2, 40, 6) and dense.bias.shape == (2, 6)
    for index in range(2):
        one = formats.quantize(linear.kernel[index], fmt)
        for found, expected in zip(layer.packed, one, strict=True):
            if found is not None:
                np.testing.assert_array_equal(found[index], expected)
        np.testing.assert_array_equal(dense.kernel[index], dequantize(one, fmt, 40))


def test_dense_layer_has_the_dtype_its_weight_had():
    linear = nnx.Linear(
        32, 8, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    dense = conversion.dequantize_linear(conversion.quantize_linear(linear, "int8"))
    assert dense.kernel.dtype == jnp.bfloat16
    assert dense(jnp.ones((2, 32), jnp.bfloat16)).dtype == jnp.bfloat16


def test_packed_arrays_are_state_but_not_parameters():
    layer = conversion.quantize_linear(nnx.Linear(32, 8, use_bias=False, rngs=nnx.Rngs(0)), "int4")
    assert not jax.tree.leaves(nnx.state(layer, nnx.Param))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(layer)))
    assert num_bytes == 32 * 8 / 2 + 8 + 4 * 8


@pytest.mark.parametrize("fmt", SOME)
def test_a_quantized_layer_computes_in_the_layers_dtype_and_comes_back_whole(fmt):
    linear = nnx.Linear(32, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer = conversion.quantize_linear(linear, fmt)
    assert layer(jnp.ones((2, 32))).dtype == jnp.bfloat16
    dense = conversion.dequantize_linear(layer)
    assert dense(jnp.ones((2, 32))).dtype == jnp.bfloat16
    assert dense.kernel.dtype == jnp.float32  # as the parameter was stored
    assert dense.dot_general is linear.dot_general


def test_quantizing_a_model_without_linear_layers_is_an_error():
    with pytest.raises(errors.UserError, match="to quantize"):
        conversion.quantize_model(nnx.Sequential(nnx.Embed(4, 4, rngs=nnx.Rngs(0))), "int8")


@pytest.mark.parametrize("stack", [(), (3,)])
def test_the_weight_stays_readable(stack):
    kernel = jax.random.normal(jax.random.key(0), (*stack, 40, 8))
    linear = nnx.Linear(40, 8, rngs=nnx.Rngs(0))
    linear.kernel = nnx.Param(kernel)
    layer = conversion.quantize_linear(linear, "int8")
    assert layer.kernel.shape == kernel.shape and layer.kernel.dtype == kernel.dtype
    np.testing.assert_allclose(layer.kernel[...], kernel, atol=0.02)


def test_the_sharding_of_the_output_can_be_given_as_for_a_dense_layer():
    # A size of its own: what was compiled under another mesh would give arrays of that one.
    linear = nnx.Linear(46, 22, rngs=nnx.Rngs(0))
    layer, x = conversion.quantize_linear(linear, "int8"), jnp.ones((6, 46))
    np.testing.assert_array_equal(layer(x, out_sharding=None), layer(x))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        y = layer(jax.device_put(x, P("x", None)), out_sharding=P(None, "x"))
    assert y.sharding.spec == P(None, "x")
