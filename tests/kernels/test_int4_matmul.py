"""The contract of the quantized matmuls, for every format, shape and dtype."""

import functools
import math
import re

import cases
import device_tier
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.kernels import int4_matmul, int8_matmul, matmul, partitioning
from lora_jax.kernels import packed as packing
from lora_jax.quant import formats

FORMATS = ("int4", "int4-g64", "int4-g128", "nf4", "nf4-dq", "fp4", "asymmetric", "int8")
# (leading axes of x, K, N): odd and single rows, K not a multiple of the group or of 8, odd N
SHAPES = [((1,), 128, 16), ((2, 3), 100, 13), ((), 44, 1), ((33, 1), 300, 130)]
TOLERANCE = device_tier.TOLERANCE


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def float64(array):
    return np.asarray(array, np.float64)


@functools.cache
def packed_weight(fmt, rows, columns):
    if fmt == "asymmetric":
        draw = np.random.default_rng(0)
        padded, groups = -(-rows // 32) * 32, -(-rows // 32)
        levels = draw.integers(0, 16, (padded, columns)).astype(np.uint8)
        scale = (draw.integers(2, 26, (groups, columns)) / 256).astype(np.float32)
        zero = draw.integers(0, 16, (groups, columns)).astype(np.float32)
        return jax.jit(formats.asymmetric)(levels, scale, zero)
    return formats.quantize(jnp.asarray(normal(0, rows, columns)), fmt)


def codes_of(fmt):
    return "int4" if fmt == "asymmetric" else formats.codes(fmt)


def unpack(q):
    """Packed words [K/8, N] → nibbles [K, N], one by one, as the layout is defined."""
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
    if codes_of(fmt) in packing.TABLES:
        values = packing.TABLES[codes_of(fmt)].astype(np.float64)[codes]
    else:
        values = np.where(codes < 8, codes, codes - 16).astype(np.float64)
    scale = np.asarray(packed.scale, np.float64)
    if packed.nested_scale is not None:
        block = np.arange(scale.size).reshape(scale.shape[::-1]).T // 256
        scale = packing.dynamic_map().astype(np.float64)[np.asarray(packed.scale)]
        scale = scale * np.asarray(packed.nested_scale, np.float64)[block]
        scale = scale + np.asarray(packed.nested_offset, np.float64)
    if packed.column_scale is not None:
        scale = scale * np.asarray(packed.column_scale, np.float64)
    weight = values * np.repeat(scale, len(values) // len(scale), axis=0)
    if packed.group_bias is not None:
        bias = np.asarray(packed.group_bias, np.float64)
        weight = weight + np.repeat(bias, len(values) // len(scale), axis=0)
    return weight[:rows]


def multiply(fmt, **how):
    if fmt == "int8":
        return lambda x, packed: int8_matmul.int8_matmul(x, packed.q, packed.column_scale)
    how["codes"] = codes_of(fmt)
    return lambda x, packed: int4_matmul.int4_matmul(x, packed, **how)


@functools.partial(jax.jit, static_argnums=0)
def value_and_vjp(function, x, packed, dy):
    y, vjp = jax.vjp(lambda x: function(x, packed), x)
    return y, *vjp(dy)


def check(fmt, lead, rows, columns, dtype, **how):
    """Value and derivative against float64 products with the dequantized weight."""
    packed = packed_weight(fmt, rows, columns)
    x = jnp.asarray(normal(1, *lead, rows), dtype)
    dy = jnp.asarray(normal(2, *lead, columns), dtype)

    y, dx = value_and_vjp(multiply(fmt, **how), x, packed, dy)
    weight = reference(packed, fmt, rows)
    for found, operand, matrix in ((y, float64(x), weight), (dx, float64(dy), weight.T)):
        expected = operand @ matrix
        assert found.shape == expected.shape and found.dtype == dtype
        # Relative to the size of the summands: a sum may cancel, its rounding errors do not.
        size = np.linalg.norm(operand, axis=-1, keepdims=True) * np.linalg.norm(matrix, axis=0)
        error = np.abs(float64(found) - expected)
        assert (error <= TOLERANCE[dtype] * size).all()


# In the quarter that is not long, every format has two shapes, of one row and of several, and both
# dtypes.
CASES = [
    pytest.param(fmt, *shape, dtype, marks=[pytest.mark.long] * ((i + j) % 2 or (j // 2 + k) % 2))
    for i, fmt in enumerate(FORMATS)
    for j, shape in enumerate(SHAPES)
    for k, dtype in enumerate(TOLERANCE)
]


@pytest.mark.device
@pytest.mark.parametrize(("fmt", "lead", "rows", "columns", "dtype"), CASES)
def test_contract(fmt, lead, rows, columns, dtype):
    check(fmt, lead, rows, columns, dtype)


@pytest.mark.device
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("implementation", "fmt"),
    [("xla", "int4"), ("pallas_tpu", "int4"), ("pallas_tpu", "int4-g128"),
     ("pallas_tpu", "asymmetric")],
)  # fmt: skip
def test_contract_of_each_implementation(implementation, fmt, dtype):
    if implementation == "pallas_tpu":
        device_tier.interprets("tpu")
    check(fmt, (5, 1), 300, 130, dtype, implementation=implementation)


@pytest.mark.device
@pytest.mark.parametrize("implementation", [None, "pallas_tpu"])
def test_a_layer_of_a_stack(implementation):
    """In a scan over the index of a whole stack, the result is that of each layer alone."""
    if implementation == "pallas_tpu":
        device_tier.interprets("tpu")
    layers = [formats.quantize(jnp.asarray(normal(i, 64, 24)), "int4") for i in range(3)]
    whole = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    x = jnp.asarray(normal(9, 4, 64))

    @jax.jit
    def each(x, whole):
        def at(x, index):
            how = {"layer": index, "implementation": implementation}
            y, vjp = jax.vjp(lambda x: int4_matmul.int4_matmul(x, whole, **how), x)
            return x, (y, *vjp(jnp.cos(y)))

        return jax.lax.scan(at, x, jnp.arange(3))[1]

    for index, (y, dx) in enumerate(zip(*each(x, whole), strict=True)):
        weight = reference(layers[index], "int4", 64)
        np.testing.assert_allclose(y, x @ weight, atol=1e-4)
        np.testing.assert_allclose(dx, np.cos(x @ weight) @ weight.T, atol=1e-3)


@pytest.mark.device
@pytest.mark.parametrize("fmt", ["int4", *cases.long("nf4", "nf4-dq"), "int8"])
def test_bfloat16_accumulates_in_float32(fmt):
    """4096 ones: a bfloat16 sum would stop at 256."""
    packed = formats.quantize(jnp.ones((4096, 8)), fmt)
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
    for part in jax.tree.leaves(gradient):
        assert part.dtype == jax.dtypes.float0 or not np.asarray(part).any()


@pytest.mark.parametrize("fmt", ["int4", "int8"])
def test_the_derivative_has_a_derivative(fmt):
    """As of a penalty on the gradient with respect to the input, in a program for any platform."""
    packed, x = packed_weight(fmt, 64, 24), jnp.asarray(normal(1, 12, 64))
    dense = multiply(fmt)(jnp.eye(64), packed)

    def penalty(x, product):
        return (jax.grad(lambda x: jnp.tanh(product(x)).sum())(x) ** 2).sum()

    quantized, expected = (
        jax.jit(jax.grad(functools.partial(penalty, product=product)))(x)
        for product in (lambda x: multiply(fmt)(x, packed), lambda x: x @ dense)
    )
    np.testing.assert_allclose(quantized, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("fmt", ["int4", "int8"])
def test_exported_for_any_number_of_rows(fmt):
    packed = packed_weight(fmt, 64, 24)
    shape = jax.export.symbolic_shape("rows, 64")
    product = jax.jit(lambda x: multiply(fmt)(x, packed))
    exported = jax.export.export(product, platforms=["cpu", "cuda", "tpu"])(
        jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    for rows in (1, 20):
        x = jnp.asarray(normal(1, rows, 64))
        np.testing.assert_allclose(exported.call(x), product(x), atol=1e-4)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_derivative_keeps_the_packed_weight_and_nothing_else(fmt):
    packed = packed_weight(fmt, 64, 24)
    x = jnp.asarray(normal(1, 5, 64))
    derivative = lambda x, packed: jax.vjp(lambda x: multiply(fmt)(x, packed), x)[1]  # noqa: E731
    vjp = jax.eval_shape(derivative, x, packed)
    kept = {(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(vjp) if leaf.ndim}
    assert kept == {(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(packed)}


@pytest.mark.parametrize("fmt", ["int4", *cases.long("nf4-dq", "asymmetric", "int8")])
def test_layers_in_a_scan_keep_no_dense_weight(fmt):
    """The compiled gradient has no float weights [3, K, N] of three stacked layers."""
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
        if fmt == "int8":
            weight = formats.dequantize(packed, fmt, 64)
        else:
            weight = packing.dequantize(packed, codes_of(fmt))[:64]
        return x @ weight + 0 * (weight**2).sum()  # the square's derivative needs the weight

    assert "f32[3,64,64]" in hlo(dense)  # so the search would find them


@pytest.mark.device
@pytest.mark.parametrize("fmt", ["int4", *cases.long("nf4")])
def test_experts_are_mapped_over(fmt):
    """Each with its own weight: the kernels for all platforms are traced."""
    each = [packed_weight(fmt, 256, 128), packed_weight(fmt, 256, 128)._replace(
        scale=2 * packed_weight(fmt, 256, 128).scale
    )]  # fmt: skip
    packed, x = jax.tree.map(lambda *parts: jnp.stack(parts), *each), normal(1, 2, 5, 256)
    dy = normal(2, 2, 5, 128)
    run = functools.partial(value_and_vjp, multiply(fmt))
    found = jax.jit(jax.vmap(run))(jnp.asarray(x), packed, jnp.asarray(dy))
    for number, own in enumerate(each):
        expected = run(jnp.asarray(x[number]), own, jnp.asarray(dy[number]))
        for value, alone in zip(found, expected, strict=True):
            np.testing.assert_allclose(value[number], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt", ["int4", "nf4", "fp4"])
def test_nibble_i_of_word_j_is_row_8j_plus_i(fmt):
    """Setting one nibble changes exactly one row of one column."""
    table = packing.TABLES.get(fmt)
    words = np.zeros((8, 3), np.uint32)
    scale = np.ones((2, 3), np.int8 if table is None else np.float32)
    column_scale = jnp.ones((1, 3)) if table is None else None
    zero = 7 if fmt == "nf4" else 0  # the code of 0
    background = sum(zero << (4 * i) for i in range(8))
    unpack_words = jax.jit(functools.partial(packing.dequantize, codes=fmt))
    for row, column, code in [(0, 0, 1), (5, 1, 15), (8, 2, 8), (23, 0, 12), (63, 2, 7)]:
        words[:] = background
        clear = np.uint32(~(15 << (4 * (row % 8))) & 0xFFFFFFFF)
        words[row // 8, column] &= clear
        words[row // 8, column] |= np.uint32(code << (4 * (row % 8)))
        packed = packing.Packed(jnp.asarray(words), jnp.asarray(scale), column_scale)
        weight = np.asarray(unpack_words(packed))
        expected = np.zeros((64, 3), np.float32)
        signed = code if code < 8 else code - 16
        expected[row, column] = signed if table is None else table[code]
        np.testing.assert_array_equal(weight, expected)


def test_groups_share_a_scale_along_the_rows():
    words = np.full((8, 2), 0x11111111, np.uint32)  # every code is 1
    scale = np.array([[3, -5], [7, 0]], np.int8)
    packed = packing.Packed(jnp.asarray(words), jnp.asarray(scale), jnp.array([[0.5, 2.0]]))
    weight = packing.dequantize(packed, dtype=jnp.bfloat16)
    assert weight.dtype == jnp.bfloat16
    expected = np.repeat(scale * np.array([[0.5, 2.0]]), 32, axis=0)
    np.testing.assert_array_equal(weight.astype(jnp.float32), expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(codes="fp3"), "fp3"),
        (dict(implementation="cuda"), "cuda"),
        (dict(x=jnp.ones((3, 65))), "65"),
        (dict(packed=packed_weight("int4", 64, 24)._replace(scale=jnp.ones((3, 24)))), "3, 24"),
        (dict(layer=jnp.int32(0)), "3 axes"),
        (dict(implementation="mosaic_gpu"), "mosaic_gpu takes"),
        (dict(implementation="pallas_tpu", codes="nf4"), "codes 'nf4'"),
    ],
)
def test_operands_that_do_not_match_are_an_error(change, match):
    arguments = dict(x=jnp.ones((3, 64)), packed=packed_weight("int4", 64, 24)) | change
    with pytest.raises(ValueError, match=match):
        int4_matmul.int4_matmul(**arguments)


@pytest.mark.device
@pytest.mark.parametrize("out_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dense_matmul_value_and_derivatives(dtype, out_dtype):
    """Both gradients; bfloat16 operands accumulate in float32, also in the backward pass."""
    x = jnp.asarray(normal(1, 2, 7, 40), dtype)
    w = jnp.asarray(normal(2, 40, 9))  # float32, as A and B are
    dy = jnp.asarray(normal(3, 2, 7, 9), out_dtype or dtype)

    @jax.jit
    def value_and_vjp(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: matmul.matmul(x, w, out_dtype), x, w)
        return y, *vjp(dy)

    y, dx, dw = value_and_vjp(x, w, dy)
    assert y.dtype == (out_dtype or dtype) and dx.dtype == dtype and dw.dtype == jnp.float32
    x64, w64, dy64 = map(float64, (x, w, dy))
    expected = (x64 @ w64, dy64 @ w64.T, np.einsum("btk,btn->kn", x64, dy64))
    for found, value in zip((y, dx, dw), expected, strict=True):
        error = np.linalg.norm(float64(found) - value)
        assert error < TOLERANCE[dtype] * np.linalg.norm(value)


def value_and_vjp_of_layer(x, stack, dy, layer, **how):
    function = functools.partial(int4_matmul.int4_matmul, packed=stack, layer=layer, **how)
    y, vjp = jax.vjp(function, x)
    return y, *vjp(dy)


@functools.cache
def on_one_device(rows):
    """The operands of a layer in a stack, on the host, and its value and derivative."""
    one = packed_weight("int4", 512, 256)
    stack = jax.tree.map(lambda a: np.stack([a, a, a]), one)
    given = normal(1, rows, 512), stack, normal(2, rows, 256), np.int32(1)
    return given, jax.jit(value_and_vjp_of_layer)(*given)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
@pytest.mark.parametrize(
    ("k", "n", "rows"),
    [
        (None, "tensor", 8),
        ("fsdp", "tensor", 8),
        ("tensor", "fsdp", 256),
        *cases.long(("tensor", None, 8), ("tensor", "fsdp", 8), ("fsdp", "tensor", 256)),
    ],
)
def test_a_product_is_split_over_a_mesh(k, n, rows, implementation):
    """Column- and row-parallel over tensor, x's rows over data and fsdp: as on one device."""
    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Auto,) * 3)
    (x, stack, dy, layer), expected = on_one_device(rows)
    partition = partitioning.Partition(("data", "fsdp"), k, n, gathered="fsdp")
    how = {"partition": partition, "implementation": implementation}
    with jax.set_mesh(mesh):
        cut, columns = (NamedSharding(mesh, PartitionSpec(None, axis, n)) for axis in (k, None))
        placed = packing.Packed(
            jax.device_put(stack.q, cut),
            jax.device_put(stack.scale, cut),
            jax.device_put(stack.column_scale, columns),
        )
        step = jax.jit(functools.partial(value_and_vjp_of_layer, **how))
        compiled = step.lower(x, placed, dy, layer).compile()
        found = compiled(x, placed, dy, layer)
    for value, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, other, atol=2e-4)
    # Over fsdp, packed words of a single layer are gathered if there are many rows; over tensor, or
    # with few rows, nothing is.
    gathered = re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* all-gather", compiled.as_text())
    kinds = {kind for kind, _ in gathered}
    of_fsdp = {"u32", "s8", "f32"} if n == "fsdp" else {"u32", "s8"}
    assert kinds == (of_fsdp if rows == 256 else set())
    sizes = {kind: math.prod(map(int, shape.split(","))) for kind, shape in gathered}
    most = {"u32": 512 * 256 // 8 // 2, "s8": 512 // 32 * 256 // 2, "f32": 256}
    assert all(size <= most[kind] for kind, size in sizes.items())


@pytest.mark.parametrize("fmt", ["asymmetric", "nf4-dq", *cases.long("nf4")])
@pytest.mark.parametrize(
    ("k", "n", "rows"), [("tensor", "fsdp", 8), *cases.long(("fsdp", "tensor", 3), (None, None, 8))]
)
def test_every_format_is_split(fmt, k, n, rows):
    """Also with rows that the devices do not divide, and without a partition."""
    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Auto,) * 3)
    packed = packed_weight(fmt, 512, 256)
    x, packed = normal(1, rows, 512), jax.tree.map(np.asarray, packed)
    partition = partitioning.Partition(("data", "fsdp"), k, n, "fsdp") if k else partitioning.WHOLE
    with jax.set_mesh(mesh):
        y = jax.jit(multiply(fmt, partition=partition))(x, packed)
    np.testing.assert_allclose(y, x @ reference(packed, fmt, 512), atol=1e-2)


def test_activations_in_int8():
    """Forward within 1 % of the exact product; the derivative is exact."""
    for fmt in ("int4", "int4-g64", "asymmetric"):
        packed = packed_weight(fmt, 300, 130)
        for rows in (1, 5):
            x, dy = jnp.asarray(normal(1, rows, 300)), jnp.asarray(normal(2, rows, 130))
            y, dx = value_and_vjp(multiply(fmt, implementation="int8_activations"), x, packed, dy)
            exact = float64(x) @ reference(packed, fmt, 300)
            assert 0 < np.linalg.norm(y - exact) < 0.01 * np.linalg.norm(exact)
            np.testing.assert_allclose(dx, dy @ reference(packed, fmt, 300).T, atol=1e-3)
    with pytest.raises(ValueError, match="codes 'nf4'"):
        multiply("nf4", implementation="int8_activations")(x, packed_weight("nf4", 300, 130))


def test_few_rows_are_exchanged_and_many_gather_the_weight():
    """Up to an eighth of the weight's rows on each device along the axes that split only x."""
    partition = partitioning.Partition(("data", "fsdp"), "fsdp", "tensor", gathered="fsdp")
    few = partitioning.Partition(("data",), "fsdp", "tensor")
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        assert partition.for_rows(128, 512) == few
        assert partition.for_rows(129, 512) == partition
