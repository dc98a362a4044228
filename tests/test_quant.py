"""Quantise and dequantise: error bounds, bitsandbytes' codes, and the layer that packs a weight."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import errors, quant
from lora_jax.kernels import int4_matmul

NF4 = pathlib.Path(__file__).parent / "golden" / "nf4.npz"
FORMATS = ("int8", "int4", "nf4")


@functools.cache
def gaussian(rows=256, columns=96):
    return np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)


def round_trip(weight, fmt):
    packed = quant.quantise(jnp.asarray(weight), fmt)
    return np.asarray(dequantise(packed, fmt, len(weight)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def dequantise(packed, fmt, rows):
    return quant.dequantise(packed, fmt, rows)


def relative_error(found, weight):
    return np.linalg.norm(found - weight) / np.linalg.norm(weight)


def nibbles(q):
    shift = 4 * np.arange(8, dtype=np.uint32)[:, None]
    return ((np.asarray(q)[:, None] >> shift) & 15).reshape(-1, q.shape[1])


@pytest.mark.parametrize(
    ("fmt", "least", "most"), [("int8", 0.003, 0.008), ("int4", 0.06, 0.085), ("nf4", 0.08, 0.095)]
)
def test_relative_error_on_gaussian_weights(fmt, least, most):
    assert least < relative_error(round_trip(gaussian(), fmt), gaussian()) < most


@pytest.mark.parametrize("tail", ["gaussian", "student", "skewed"])
def test_int4_beats_absmax_rounding_at_the_same_group(tail):
    weight = {
        "gaussian": gaussian(),
        "student": np.random.default_rng(1).standard_t(5, (256, 96)),
        "skewed": np.random.default_rng(2).gumbel(size=(256, 96)),
    }[tail].astype(np.float32)
    grouped = weight.reshape(-1, 32, 96)
    scale = np.abs(grouped).max(axis=1, keepdims=True) / 7
    absmax = (np.rint(grouped / scale) * scale).reshape(weight.shape)
    ours, theirs = (relative_error(w, weight) for w in (round_trip(weight, "int4"), absmax))
    assert ours < 0.93 * theirs


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_entry_is_within_its_bound(fmt):
    """int8: half a step. int4, nf4: the widest gap between neighbours, times the group's scale."""
    weight = gaussian()
    error = np.abs(round_trip(weight, fmt) - weight)
    if fmt == "int8":
        bound = np.abs(weight).max(axis=0) / 127 / 2
        assert (error <= bound[None] * 1.001).all()
    else:
        group = quant.GROUP[fmt]
        largest = np.abs(weight.reshape(-1, group, 96)).max(axis=1).repeat(group, axis=0)
        # int4 may clip an end of the group: 7/6.5 or 8/7 of a step and its scales' rounding.
        most = 0.16 if fmt == "nf4" else 0.2
        assert (error <= most * largest).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantising_again_changes_nothing(fmt):
    """What the format can represent, it keeps (int4: but for the search's other choices)."""
    once = round_trip(gaussian(), fmt)
    assert relative_error(round_trip(once, fmt), once) < (0.02 if fmt == "int4" else 1e-6)


@pytest.mark.parametrize("fmt", FORMATS)
def test_zero_blocks_and_zero_columns_stay_zero(fmt):
    weight = gaussian(128, 8).copy()
    weight[:64, 1] = 0
    weight[:, 2] = 0
    found = round_trip(weight, fmt)
    assert np.isfinite(found).all()
    assert not found[:64, 1].any() and not found[:, 2].any()
    assert found[64:, 1].any() and relative_error(found, weight) < 0.1


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows", [1, 44, 100])
def test_rows_are_padded_to_whole_groups(fmt, rows):
    weight = gaussian()[:rows]
    packed = quant.quantise(jnp.asarray(weight), fmt)
    group = quant.GROUP.get(fmt, 1)
    padded = -(-rows // group) * group
    assert packed.q.shape == ((padded if fmt == "int8" else padded // 8), 96)
    if fmt != "int8":
        assert packed.scale.shape == (padded // group, 96)
        zero = 7 if fmt == "nf4" else 0
        assert (nibbles(packed.q)[rows:] == zero).all()
    found = round_trip(weight, fmt)
    assert found.shape == weight.shape and relative_error(found, weight) < 0.11


def test_rows_are_padded_to_groups_times_shards():
    packed = quant.quantise(jnp.asarray(gaussian()[:100]), "int4", multiple=4)
    assert packed.q.shape == (128 // 8, 96) and packed.scale.shape == (4, 96)
    assert quant.quantise(jnp.asarray(gaussian()[:10]), "nf4", multiple=2).q.shape == (16, 96)


def test_formats_store_what_they_say():
    weight = jnp.asarray(gaussian())
    shapes = {
        fmt: [None if a is None else (a.shape, str(a.dtype)) for a in quant.quantise(weight, fmt)]
        for fmt in FORMATS
    }
    assert shapes == {
        "int8": [((256, 96), "int8"), None, ((1, 96), "float32")],
        "int4": [((32, 96), "uint32"), ((8, 96), "int8"), ((1, 96), "float32")],
        "nf4": [((32, 96), "uint32"), ((4, 96), "float32"), None],
    }


@pytest.mark.parametrize("fmt", FORMATS)
def test_more_columns_than_are_quantised_at_once(fmt):
    """The last block overlaps the one before: each column is as it is on its own."""
    weight = gaussian(64, 1100)
    whole = quant.quantise(jnp.asarray(weight), fmt)
    for columns in (slice(0, 300), slice(500, 620), slice(1000, 1100)):
        part = quant.quantise(jnp.asarray(weight[:, columns]), fmt)
        for found, expected in zip(whole, part, strict=True):
            if found is not None:
                np.testing.assert_array_equal(found[:, columns], expected)


def test_int4_uses_the_whole_range_of_codes():
    """The sign of the scale puts the largest |w| on −8 where that is better."""
    packed = quant.quantise(jnp.asarray(gaussian()), "int4")
    assert set(np.unique(nibbles(packed.q))) == set(range(16))
    assert (np.asarray(packed.scale) < 0).any() and (np.asarray(packed.scale) > 0).any()


@pytest.mark.parametrize("case", ["bf16_nf4", "zeros_block_nf4"])
def test_nf4_equals_bitsandbytes_bit_for_bit(case):
    """bitsandbytes packs [out, in] in flat order, the first of a pair in the high nibble."""
    with np.load(NF4) as arrays:
        golden = {key.removeprefix(case + "_"): arrays[key] for key in arrays if case in key}
    weight = golden["W"]  # [out, in]
    d_out, d_in = weight.shape
    assert d_in % 64 == 0 and golden["blocksize"] == 64
    np.testing.assert_array_equal(golden["code"], int4_matmul.NF4_CODE)
    packed = quant.quantise(jnp.asarray(weight.T), "nf4")
    pairs = golden["packed"].ravel()
    codes = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(d_out, d_in)
    np.testing.assert_array_equal(nibbles(packed.q).T, codes)
    absmax = np.asarray(packed.scale).T.ravel()
    np.testing.assert_array_equal(absmax, golden["absmax"])
    dense = quant.dequantise(packed, "nf4", d_in, jnp.bfloat16 if "bf16" in case else jnp.float32)
    np.testing.assert_array_equal(dense.astype(jnp.float32).T, golden["dequant"])


def test_unknown_format_is_an_error():
    with pytest.raises(ValueError, match="fp4"):
        quant.quantise(jnp.ones((64, 8)), "fp4")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fmt", FORMATS)
def test_layer_computes_with_the_weight_it_stands_for(fmt, bias):
    linear = nnx.Linear(44, 13, use_bias=bias, rngs=nnx.Rngs(0))
    if bias:
        linear.bias.set_value(jnp.arange(13.0))
    layer = quant.quantise_linear(linear, fmt)
    assert (layer.in_features, layer.out_features, layer.fmt) == (44, 13, fmt)
    dense = quant.dequantise_linear(layer)
    assert isinstance(dense, nnx.Linear) and dense.kernel.shape == (44, 13)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 44)).astype(np.float32))
    np.testing.assert_allclose(layer(x), dense(x), atol=1e-5)
    assert 0 < relative_error(np.asarray(dense.kernel), np.asarray(linear.kernel)) < 0.11
    if bias:
        np.testing.assert_array_equal(dense.bias[...], jnp.arange(13.0))
        np.testing.assert_allclose(layer(jnp.zeros((2, 44)))[0], jnp.arange(13.0))
    else:
        assert layer.bias is None and dense.bias is None
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("fmt", FORMATS)
def test_stacked_layer_is_each_layer_on_its_own(fmt):
    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stacked(rngs):
        return nnx.Linear(40, 6, rngs=rngs)

    linear = stacked(nnx.Rngs(0))
    layer = quant.quantise_linear(linear, fmt)
    dense = quant.dequantise_linear(layer)
    assert dense.kernel.shape == (2, 40, 6) and dense.bias.shape == (2, 6)
    for index in range(2):
        one = quant.quantise(linear.kernel[index], fmt)
        for found, expected in zip(layer.packed, one, strict=True):
            if found is not None:
                np.testing.assert_array_equal(found[index], expected)
        np.testing.assert_array_equal(dense.kernel[index], dequantise(one, fmt, 40))


def test_dense_layer_has_the_dtype_its_weight_had():
    linear = nnx.Linear(
        32, 8, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    dense = quant.dequantise_linear(quant.quantise_linear(linear, "int8"))
    assert dense.kernel.dtype == jnp.bfloat16
    assert dense(jnp.ones((2, 32), jnp.bfloat16)).dtype == jnp.bfloat16


def test_packed_arrays_are_state_but_no_parameters():
    layer = quant.quantise_linear(nnx.Linear(32, 8, use_bias=False, rngs=nnx.Rngs(0)), "int4")
    assert not jax.tree.leaves(nnx.state(layer, nnx.Param))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(layer)))
    assert num_bytes == 32 * 8 / 2 + 8 + 4 * 8


@pytest.mark.parametrize("fmt", ["int8", "int4", "nf4"])
def test_a_quantised_layer_computes_in_the_layers_dtype_and_comes_back_whole(fmt):
    linear = nnx.Linear(32, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer = quant.quantise_linear(linear, fmt)
    assert layer(jnp.ones((2, 32))).dtype == jnp.bfloat16
    dense = quant.dequantise_linear(layer)
    assert dense(jnp.ones((2, 32))).dtype == jnp.bfloat16
    assert dense.kernel.dtype == jnp.float32  # as the parameter was stored
    assert dense.dot_general is linear.dot_general


def test_quantising_a_model_without_linear_layers_is_an_error():
    with pytest.raises(errors.UserError, match="to quantise"):
        quant.quantise_model(nnx.Sequential(nnx.Embed(4, 4, rngs=nnx.Rngs(0))), "int8")
