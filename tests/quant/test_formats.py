"""Formats: error bounds, bitsandbytes' codes, exact asymmetric weights, and stored arrays."""

import functools
import pathlib

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax import errors, quant
from lora_jax.kernels import packed as packing
from lora_jax.quant import formats

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FORMATS = tuple(formats.FORMATS)
INT4 = tuple(fmt for fmt in FORMATS if formats.codes(fmt) == "int4")
MODES = [(fmt, True) for fmt in FORMATS] + [(fmt, False) for fmt in INT4]  # search or not


@functools.cache
def gaussian(rows=256, columns=96):
    return np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)


def tailed(name):
    """A weight [256, 96] of one of three shapes."""
    return {
        "gaussian": gaussian(),
        "student": np.random.default_rng(1).standard_t(5, (256, 96)),
        "skewed": np.random.default_rng(2).gumbel(size=(256, 96)),
    }[name].astype(np.float32)


def round_trip(weight, fmt, search=True):
    packed = formats.quantize(jnp.asarray(weight), fmt, search=search)
    return np.asarray(dequantize(packed, fmt, len(weight)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def dequantize(packed, fmt, rows):
    return formats.dequantize(packed, fmt, rows)


def relative_error(found, weight):
    return np.linalg.norm(found - weight) / np.linalg.norm(weight)


def nibbles(q):
    shift = 4 * np.arange(8, dtype=np.uint32)[:, None]
    return ((np.asarray(q)[:, None] >> shift) & 15).reshape(-1, q.shape[1])


def same(found, expected):
    """Both packed weights hold the same arrays, bit for bit."""
    assert [a is None for a in found] == [a is None for a in expected]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_command_line_offers_every_format():
    assert tuple(formats.FORMATS) == quant.QUANTS[1:] and quant.QUANTS[0] == "none"


@pytest.mark.parametrize(
    ("fmt", "least", "most"),
    [
        ("int8", 0.003, 0.008),
        ("int4", 0.078, 0.083),
        ("int4-g64", 0.086, 0.092),
        ("int4-g128", 0.091, 0.099),
        ("nf4", 0.088, 0.094),
        ("nf4-dq", 0.088, 0.094),
        ("fp4", 0.115, 0.125),
        ("fp4-dq", 0.115, 0.125),
    ],
)
def test_relative_error_on_gaussian_weights(fmt, least, most):
    assert least < relative_error(round_trip(gaussian(), fmt), gaussian()) < most


@pytest.mark.parametrize("tail", ["gaussian", "student", "skewed"])
def test_int4_beats_absmax_rounding_at_the_same_group(tail):
    weight = tailed(tail)
    grouped = weight.reshape(-1, 32, 96)
    scale = np.abs(grouped).max(axis=1, keepdims=True) / 7
    absmax = (np.rint(grouped / scale) * scale).reshape(weight.shape)
    ours, theirs = (relative_error(w, weight) for w in (round_trip(weight, "int4"), absmax))
    assert ours < 0.93 * theirs


@pytest.mark.parametrize("fmt", INT4)
def test_without_search_the_error_is_at_most_a_twentieth_more(fmt):
    for tail in ("gaussian", "student", "skewed"):
        weight = tailed(tail)
        searched, fast = (
            relative_error(round_trip(weight, fmt, search), weight) for search in (True, False)
        )
        assert searched < fast < 1.05 * searched, tail


@pytest.mark.parametrize(("fmt", "search"), MODES)
def test_every_entry_is_within_its_bound(fmt, search):
    """int8: half a step. Others: half the widest gap of the codes, times the group's scale."""
    weight = gaussian()
    error = np.abs(round_trip(weight, fmt, search) - weight)
    if fmt == "int8":
        bound = np.abs(weight).max(axis=0) / 127 / 2
        assert (error <= bound[None] * 1.001).all()
    else:
        group = formats.FORMATS[fmt].group
        largest = np.abs(weight.reshape(-1, group, 96)).max(axis=1).repeat(group, axis=0)
        # int4 may clip an end of the group: 7/6.5 or 8/7 of a step and its scales' rounding.
        int4 = {32: 0.2, 64: 0.25, 128: 0.3}[group]
        most = {"int4": int4, "nf4": 0.16, "fp4": 0.17}[formats.codes(fmt)]
        assert (error <= most * largest).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantizing_again_changes_nothing(fmt):
    """What the format can represent, it keeps (int4: but for the search's other choices)."""
    once = round_trip(gaussian(), fmt)
    most = {"int4": 0.03, "nf4": 0.002, "fp4": 0.002, "int8": 1e-6}[formats.codes(fmt)]
    assert relative_error(round_trip(once, fmt), once) < most


@pytest.mark.parametrize(("fmt", "search"), MODES)
def test_zero_blocks_and_zero_columns_stay_zero(fmt, search):
    weight = gaussian().copy()
    weight[:128, 1] = 0
    weight[:, 2] = 0
    found = round_trip(weight, fmt, search)
    assert np.isfinite(found).all()
    assert not found[:128, 1].any() and not found[:, 2].any()
    assert found[128:, 1].any() and relative_error(found, weight) < 0.13
    assert not round_trip(np.zeros_like(weight), fmt, search).any()


FEW = ("int4", "nf4-dq", "int8")  # of which the others are variants
SOME = [*FEW, *cases.long(*(fmt for fmt in FORMATS if fmt not in FEW))]


@pytest.mark.parametrize(
    ("fmt", "rows"),
    [*((fmt, 100) for fmt in FEW), ("int4", 1),
     *cases.long(("nf4-dq", 44), *((fmt, 100) for fmt in FORMATS if fmt not in FEW))],
)  # fmt: skip
def test_rows_are_padded_to_whole_groups(fmt, rows):
    weight = gaussian()[:rows]
    packed = formats.quantize(jnp.asarray(weight), fmt)
    group = formats.FORMATS[fmt].group
    padded = -(-rows // group) * group
    assert packed.q.shape == ((padded if fmt == "int8" else padded // 8), 96)
    if fmt != "int8":
        assert packed.scale.shape == (padded // group, 96)
        zero = 7 if formats.codes(fmt) == "nf4" else 0
        assert (nibbles(packed.q)[rows:] == zero).all()
    found = round_trip(weight, fmt)
    assert found.shape == weight.shape and relative_error(found, weight) < 0.13


@pytest.mark.parametrize("fmt", SOME)
def test_rows_are_padded_to_groups_times_shards(fmt):
    weight = jnp.asarray(gaussian()[:100])
    packed = formats.quantize(weight, fmt, multiple=4)
    group = formats.FORMATS[fmt].group
    assert packed.q.shape[0] * (1 if fmt == "int8" else 8) == max(100, 4 * group)
    # The padding weighs nothing, nor does it bear on the rest.
    plain = formats.quantize(weight, fmt)
    found, expected = (np.asarray(dequantize(p, fmt, 100)) for p in (packed, plain))
    nested = formats.FORMATS[fmt].nested
    np.testing.assert_allclose(found, expected, rtol=0.02 if nested else 1e-6)
    if nested:
        np.testing.assert_array_equal(packed.nested_offset, plain.nested_offset)


def test_formats_store_what_they_say():
    weight = jnp.asarray(gaussian())
    shapes = {}
    for fmt in FORMATS:
        *arrays, order = formats.quantize(weight, fmt)
        assert order is None
        shapes[fmt] = [None if a is None else (a.shape, str(a.dtype)) for a in arrays]
    words, column_scale = ((32, 96), "uint32"), ((1, 96), "float32")
    assert shapes == {
        "int8": [((256, 96), "int8"), None, column_scale, None, None, None],
        "int4": [words, ((8, 96), "int8"), column_scale, None, None, None],
        "int4-g64": [words, ((4, 96), "int8"), column_scale, None, None, None],
        "int4-g128": [words, ((2, 96), "int8"), column_scale, None, None, None],
        "nf4": [words, ((4, 96), "float32"), None, None, None, None],
        "nf4-dq": [words, ((4, 96), "uint8"), None, None, ((2,), "float32"), ((1,), "float32")],
        "fp4": [words, ((4, 96), "float32"), None, None, None, None],
        "fp4-dq": [words, ((4, 96), "uint8"), None, None, ((2,), "float32"), ((1,), "float32")],
    }


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [
        ("int8", 8 + 32 / 4096),
        ("int4", 4 + 8 / 32 + 32 / 4096),
        ("int4-g64", 4 + 8 / 64 + 32 / 4096),
        ("int4-g128", 4 + 8 / 128 + 32 / 4096),
        ("nf4", 4 + 32 / 64),
        ("nf4-dq", 4 + 8 / 64 + 32 / 64 / 256 + 32 / 4096**2),
    ],
)
def test_bits_per_weight(fmt, bits):
    shape = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    packed = jax.eval_shape(lambda weight: formats.quantize(weight, fmt), shape)
    assert formats.bits_per_weight(packed, 4096) == pytest.approx(bits, abs=1e-9)
    stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), packed)
    assert formats.bits_per_weight(stacked, 4096) == pytest.approx(bits, abs=1e-9)
    assert formats.bits_per_weight(packed, 4000) == pytest.approx(bits * 4096 / 4000)


@pytest.mark.parametrize(
    ("fmt", "search"),
    [
        ("int4-g64", False),
        ("nf4-dq", True),
        *cases.long(("int8", True), ("int4", True), ("nf4", True)),
    ],
)
def test_more_columns_than_are_quantized_at_once(fmt, search):
    """The last block overlaps the one before: each column is as it is on its own."""
    weight = gaussian(128, 1100)
    whole = formats.quantize(jnp.asarray(weight), fmt, search=search)
    if fmt == "nf4-dq":  # all columns share an offset: as if quantized in one piece
        plain = formats.quantize(jnp.asarray(weight), "nf4")
        np.testing.assert_allclose(packing.scales(whole), plain.scale, rtol=0.02)
        np.testing.assert_array_equal(whole.q, plain.q)
        return
    for columns in (slice(0, 100), slice(500, 600), slice(1000, 1100)):
        part = formats.quantize(jnp.asarray(weight[:, columns]), fmt, search=search)
        same(jax.tree.map(lambda a, cut=columns: a[:, cut], whole), part)
    expected = [np.square(w).sum() for w in (round_trip(weight, fmt, search) - weight, weight)]
    np.testing.assert_allclose(formats.squares(jnp.asarray(weight), whole, fmt), expected, 1e-5)


@pytest.mark.parametrize(("fmt", "search"), [("int4", True), ("int4-g64", False), ("nf4-dq", True)])
@pytest.mark.parametrize("axis", [0, *cases.long(1)])
def test_packed_arrays_do_not_depend_on_the_sharding(fmt, search, axis):
    """Weights of bfloat16, whose ratios are often half-integers."""
    weight = jnp.asarray(gaussian(512, 96), jnp.bfloat16)
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,))
    spec = PartitionSpec(*("x" if axis == i else None for i in range(2)))
    sharded = jax.device_put(weight, NamedSharding(mesh, spec))
    same(*(formats.quantize(w, fmt, search=search) for w in (sharded, weight)))


def test_a_transposed_weight_is_packed_the_same():
    weight = jnp.asarray(gaussian(100, 600), jnp.bfloat16)
    same(formats.quantize(weight.T, "int4", transposed=True), formats.quantize(weight, "int4"))


@pytest.mark.parametrize("search", [True, False])
def test_int4_uses_the_whole_range_of_codes(search):
    """The sign of the scale puts the largest |w| on −8 where that is better."""
    packed = formats.quantize(jnp.asarray(gaussian()), "int4", search=search)
    assert set(np.unique(nibbles(packed.q))) == set(range(16))
    assert (np.asarray(packed.scale) < 0).any() and (np.asarray(packed.scale) > 0).any()


@pytest.mark.parametrize("case", ["bf16_nf4", "zeros_block_nf4", "bf16_fp4", "zeros_block_fp4"])
def test_codes_and_scales_equal_bitsandbytes_bit_for_bit(case):
    """bitsandbytes packs [out, in] in flat order, the first of a pair in the high nibble."""
    with np.load(GOLDEN / "nf4.npz") as arrays:
        golden = {key.removeprefix(case + "_"): arrays[key] for key in arrays if case in key}
    fmt = case[-3:]
    weight = golden["W"]  # [out, in]
    d_in = weight.shape[1]
    assert d_in % 64 == 0 and golden["blocksize"] == 64
    np.testing.assert_array_equal(golden["code"], packing.TABLES[fmt])
    packed = formats.quantize(jnp.asarray(weight.T), fmt)
    np.testing.assert_array_equal(nibbles(packed.q).T, unpacked(golden["packed"], weight.shape))
    absmax = np.asarray(packed.scale).T.ravel()
    np.testing.assert_array_equal(absmax, golden["absmax"])
    dtype = jnp.bfloat16 if "bf16" in case else jnp.float32
    dense = formats.dequantize(packed, fmt, d_in, dtype)
    np.testing.assert_array_equal(dense.astype(jnp.float32).T, golden["dequant"])


def test_nf4_dq_equals_bitsandbytes_bit_for_bit():
    """Also its mean: torch's own varies in its last bit with the machine, but not here."""
    with np.load(GOLDEN / "nf4_dq.npz") as arrays:
        golden = dict(arrays)
    d_out, d_in = golden["W"].shape
    packed = formats.quantize(jnp.asarray(golden["W"].T), "nf4-dq")
    codes = unpacked(golden["packed"], golden["W"].shape)
    np.testing.assert_array_equal(nibbles(packed.q).T, codes)
    np.testing.assert_array_equal(np.asarray(packed.scale).T.ravel(), golden["absmax"])
    np.testing.assert_array_equal(packed.nested_scale, golden["nested_absmax"])
    np.testing.assert_array_equal(packed.nested_offset, golden["offset"][None])
    absmax = golden["dequantized_absmax"].reshape(d_out, d_in // 64)
    for scales in (packing.scales, jax.jit(packing.scales)):
        np.testing.assert_array_equal(scales(packed).T, absmax)
    expected = packing.NF4_CODE[codes] * absmax.repeat(64, axis=1)
    np.testing.assert_array_equal(dequantize(packed, "nf4-dq", d_in).T, expected)


def unpacked(pairs, shape):
    """bitsandbytes' codes as [out, in]."""
    return np.stack([pairs.ravel() >> 4, pairs.ravel() & 15], axis=1).reshape(shape)


def test_dynamic_map_equals_bitsandbytes_bit_for_bit():
    with np.load(GOLDEN / "nf4_dq.npz") as arrays:
        np.testing.assert_array_equal(packing.dynamic_map(), arrays["map"])
    assert packing.dynamic_map().dtype == np.float32


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_asymmetric_weights_are_exact(dtype):
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (256, 24), dtype=np.uint8)
    zero = rng.integers(0, 16, (4, 24), dtype=np.uint8)
    scale = jnp.asarray(rng.lognormal(-5, 2, (4, 24)), dtype)
    packed = formats.asymmetric(jnp.asarray(codes), scale, jnp.asarray(zero))
    exact = (codes - zero.repeat(64, axis=0).astype(int)) * np.float64(scale).repeat(64, axis=0)
    for unfold in (packing.dequantize, jax.jit(packing.dequantize)):
        np.testing.assert_array_equal(unfold(packed), exact)
    assert packed.scale.dtype == dtype and packed.group_bias.dtype == jnp.float32


def test_asymmetric_groups_that_do_not_fill_words_are_an_error():
    codes = jnp.zeros((36, 2), jnp.uint8)
    with pytest.raises(ValueError, match="multiple of 8"):
        formats.asymmetric(codes, jnp.ones((3, 2)), jnp.ones((3, 2)))


@pytest.mark.parametrize("fmt", FORMATS)
def test_error_is_the_norm_of_what_is_lost(fmt):
    weight = gaussian()[:100]
    packed = formats.quantize(jnp.asarray(weight), fmt)
    expected = relative_error(np.asarray(dequantize(packed, fmt, 100)), weight)
    assert formats.error(jnp.asarray(weight), packed, fmt) == pytest.approx(expected, rel=1e-5)
    assert formats.error(jnp.zeros((100, 96)), jax.tree.map(jnp.zeros_like, packed), fmt) == 0


def test_unknown_format_is_an_error():
    for function in (lambda fmt: formats.quantize(jnp.ones((64, 8)), fmt), formats.codes):
        with pytest.raises(errors.UserError, match="fp3"):
            function("fp3")
