"""The contract of the quantised matmuls: one body over format, shape and dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import quant
from lora_jax.kernels import int4_matmul, int8_matmul, matmul

FORMATS = ("int4", "nf4", "int8")
# (leading axes of x, K, N): odd and single rows, K that is no multiple of a group or of 8, odd N
SHAPES = [((7,), 64, 24), ((1,), 128, 16), ((2, 3), 100, 13), ((), 44, 1), ((5, 1), 36, 130)]
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def packed_weight(fmt, rows, columns):
    return quant.quantise(jnp.asarray(normal(0, rows, columns)), fmt)


def unpack(q):
    """Packed words [K/8, N] → nibbles [K, N], bit by bit as the layout says."""
    q = np.asarray(q)
    nibbles = np.zeros((8 * q.shape[0], q.shape[1]), np.int64)
    for row in range(len(nibbles)):
        nibbles[row] = (q[row // 8] >> np.uint32(4 * (row % 8))) & 15
    return nibbles


def reference(packed, fmt, rows):
    """The dense weight in float64, from the definition."""
    if fmt == "int8":
        return np.asarray(packed.q, np.float64) * np.asarray(packed.column_scale, np.float64)
    codes = unpack(packed.q)
    if fmt == "int4":
        values = np.where(codes < 8, codes, codes - 16).astype(np.float64)
    else:
        values = int4_matmul.NF4_CODE.astype(np.float64)[codes]
    scale = np.asarray(packed.scale, np.float64)
    if packed.column_scale is not None:
        scale = scale * np.asarray(packed.column_scale, np.float64)
    return (values * np.repeat(scale, len(values) // len(scale), axis=0))[:rows]


def multiply(fmt):
    if fmt == "int8":
        return lambda x, packed: int8_matmul.int8_matmul(x, packed.q, packed.column_scale)
    return lambda x, packed: int4_matmul.int4_matmul(x, *packed, fmt=fmt)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("lead", "rows", "columns"), SHAPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_contract(fmt, lead, rows, columns, dtype):
    """Value and derivative against float64 products with the dequantised weight."""
    packed = packed_weight(fmt, rows, columns)
    x = jnp.asarray(normal(1, *lead, rows)).astype(dtype)
    dy = jnp.asarray(normal(2, *lead, columns)).astype(dtype)

    @jax.jit
    def value_and_vjp(x, packed, dy):
        y, vjp = jax.vjp(lambda x: multiply(fmt)(x, packed), x)
        return y, *vjp(dy)

    y, dx = value_and_vjp(x, packed, dy)
    weight = reference(packed, fmt, rows)
    for found, operand, matrix in ((y, x, weight), (dx, dy, weight.T)):
        operand = np.asarray(operand.astype(jnp.float32), np.float64)
        expected = operand @ matrix
        assert found.shape == expected.shape and found.dtype == dtype
        # Relative to the sizes that were summed: a sum may cancel, its rounding does not.
        size = np.linalg.norm(operand, axis=-1, keepdims=True) * np.linalg.norm(matrix, axis=0)
        error = np.abs(np.asarray(found.astype(jnp.float32)) - expected)
        assert (error <= TOLERANCE[dtype] * size).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_bfloat16_accumulates_in_float32(fmt):
    """4096 ones: a bfloat16 sum would stop at 256."""
    packed = quant.quantise(jnp.ones((4096, 8)), fmt)
    y = jax.jit(multiply(fmt))(jnp.ones((1, 4096), jnp.bfloat16), packed)
    np.testing.assert_allclose(y.astype(jnp.float32), 4096, rtol=0.01)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_weight_has_no_gradient(fmt):
    packed = packed_weight(fmt, 64, 24)
    x = jnp.asarray(normal(1, 3, 64))
    gradient = jax.jit(jax.grad(lambda packed: multiply(fmt)(x, packed).sum(), allow_int=True))(
        packed
    )
    assert gradient.q.dtype == jax.dtypes.float0
    for part in (gradient.scale, gradient.column_scale):
        if part is not None:
            assert part.dtype == jax.dtypes.float0 or not np.asarray(part).any()


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_derivative_keeps_the_packed_weight_and_nothing_else(fmt):
    packed = packed_weight(fmt, 64, 24)
    x = jnp.asarray(normal(1, 5, 64))
    _, vjp = jax.vjp(lambda x: multiply(fmt)(x, packed), x)
    kept = {(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(vjp) if leaf.ndim}
    assert kept == {(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(packed)}


@pytest.mark.parametrize("fmt", FORMATS)
def test_layers_in_a_scan_keep_no_dense_weight(fmt):
    """Of three stacked layers no float weights [3, K, N] exist in the compiled gradient."""
    one = packed_weight(fmt, 64, 64)
    packed = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), one)

    def loss(x, layer):
        step = lambda x, packed: (jnp.tanh(layer(x, packed)), None)  # noqa: E731
        return jax.lax.scan(step, x, packed)[0].sum()

    def hlo(layer):
        return jax.jit(jax.grad(functools.partial(loss, layer=layer))).lower(x).compile().as_text()

    x = jnp.ones((4, 64))
    assert "f32[3,64,64]" not in hlo(multiply(fmt))

    def dense(x, packed):
        weight = quant.dequantise(packed, fmt, 64)
        return x @ weight + 0 * (weight**2).sum()  # the square's derivative needs the weight

    assert "f32[3,64,64]" in hlo(dense)  # what it would look like


@pytest.mark.parametrize("fmt", ["int4", "nf4"])
def test_nibble_i_of_word_j_is_row_8j_plus_i(fmt):
    """One nibble set at a time: exactly one row of one column appears."""
    table = np.arange(16) if fmt == "nf4" else None
    words = np.zeros((8, 3), np.uint32)
    scale = np.ones((2, 3), np.float32 if fmt == "nf4" else np.int8)
    column_scale = None if fmt == "nf4" else jnp.ones((1, 3))
    zero = 7 if table is not None else 0  # NF4's code 7 is 0
    background = sum(zero << (4 * i) for i in range(8))
    unpack_words = jax.jit(functools.partial(int4_matmul.dequantise, fmt=fmt))
    for row, column, code in [(0, 0, 1), (5, 1, 15), (8, 2, 8), (23, 0, 12), (63, 2, 7)]:
        words[:] = background
        clear = np.uint32(~(15 << (4 * (row % 8))) & 0xFFFFFFFF)
        words[row // 8, column] &= clear
        words[row // 8, column] |= np.uint32(code << (4 * (row % 8)))
        weight = np.asarray(unpack_words(jnp.asarray(words), jnp.asarray(scale), column_scale))
        expected = np.zeros((64, 3), np.float32)
        signed = code if code < 8 else code - 16
        expected[row, column] = signed if fmt == "int4" else int4_matmul.NF4_CODE[code]
        np.testing.assert_array_equal(weight, expected)


def test_groups_share_a_scale_along_the_rows():
    words = np.full((8, 2), 0x11111111, np.uint32)  # every code is 1
    scale = np.array([[3, -5], [7, 0]], np.int8)
    weight = int4_matmul.dequantise(
        jnp.asarray(words), jnp.asarray(scale), jnp.array([[0.5, 2.0]]), dtype=jnp.bfloat16
    )
    assert weight.dtype == jnp.bfloat16
    expected = np.repeat(scale * np.array([[0.5, 2.0]]), 32, axis=0)
    np.testing.assert_array_equal(weight.astype(jnp.float32), expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(fmt="fp4"), "fp4"),
        (dict(implementation="cuda"), "cuda"),
        (dict(x=jnp.ones((3, 65))), "65"),
        (dict(scale=jnp.ones((3, 24), jnp.int8)), r"\(3, 24\)"),
    ],
)
def test_what_does_not_fit_is_an_error(change, match):
    packed = packed_weight("int4", 64, 24)
    arguments = dict(x=jnp.ones((3, 64)), **packed._asdict()) | change
    with pytest.raises(ValueError, match=match):
        int4_matmul.int4_matmul(**arguments)


def test_implementations_can_be_named():
    packed = packed_weight("int4", 64, 24)
    x = jnp.asarray(normal(1, 3, 64))
    expected = int4_matmul.int4_matmul(x, *packed)
    for name in int4_matmul.IMPLEMENTATIONS:
        y = int4_matmul.int4_matmul(x, *packed, implementation=name)
        np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("out_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dense_matmul_value_and_derivatives(dtype, out_dtype):
    """Both gradients; bfloat16 operands accumulate in float32 also on the way back."""
    x = jnp.asarray(normal(1, 2, 7, 40)).astype(dtype)
    w = jnp.asarray(normal(2, 40, 9))  # float32, as A and B are
    dy = jnp.asarray(normal(3, 2, 7, 9)).astype(out_dtype or dtype)

    @jax.jit
    def value_and_vjp(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: matmul.matmul(x, w, out_dtype), x, w)
        return y, *vjp(dy)

    y, dx, dw = value_and_vjp(x, w, dy)
    assert y.dtype == (out_dtype or dtype) and dx.dtype == dtype and dw.dtype == jnp.float32
    x64, w64, dy64 = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w, dy))
    expected = (x64 @ w64, dy64 @ w64.T, np.einsum("btk,btn->kn", x64, dy64))
    for found, value in zip((y, dx, dw), expected, strict=True):
        error = np.linalg.norm(np.asarray(found.astype(jnp.float32)) - value)
        assert error < TOLERANCE[dtype] * np.linalg.norm(value)
