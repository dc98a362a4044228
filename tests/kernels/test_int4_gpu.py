"""The 4-bit matmul's implementations for GPUs: what they compute, refuse and lower to."""

import dataclasses

import cases
import device_tier
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.state import types as state
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import triton as pltriton
from jax.sharding import AxisType

from lora_jax.generation import weights as decode_weights
from lora_jax.kernels import choice, int4_matmul, partitioning, platform
from lora_jax.kernels import packed as packing
from lora_jax.kernels.int4_matmul import mosaic_gpu, triton_gpu, xla_gpu

draw = np.random.default_rng(0)


def random_packed(k, n, fmt, layers=()):
    """Random arrays of a format's shapes and dtypes."""

    def real(*shape):
        return jnp.asarray(draw.uniform(0.5, 2, (*layers, *shape)), jnp.float32)

    group = 32 if fmt.startswith("int4") else 64
    groups = k // group
    words = jnp.asarray(draw.integers(0, 2**32, (*layers, k // 8, n), np.uint32))
    if fmt == "int4":
        scale = jnp.asarray(draw.integers(-127, 128, (*layers, groups, n), np.int8))
        return packing.Packed(words, scale, real(1, n))
    if fmt == "asymmetric":
        bias = real(groups, n).astype(jnp.bfloat16)
        return packing.Packed(words, real(groups, n).astype(jnp.bfloat16), group_bias=bias)
    if fmt == "nf4":
        return packing.Packed(words, real(groups, n))
    scale = jnp.asarray(draw.integers(0, 256, (*layers, groups, n), np.uint8))
    return packing.Packed(
        words, scale, nested_scale=real(-(-groups * n // 256)), nested_offset=real(1)
    )


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(draw.normal(size=shape), dtype)


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.device
@pytest.mark.parametrize(
    "fmt, num_rows",
    [("int4", 1), ("int4", 4), ("asymmetric", 1), ("asymmetric", 3), ("nf4", 1), ("nf4-dq", 1)],
)
def test_matvec_is_the_product_with_the_dequantized_weight(fmt, num_rows):
    codes = "nf4" if fmt.startswith("nf4") else "int4"
    x, packed = normal(num_rows, 192), random_packed(192, 40, fmt)
    dequantize = jax.jit(packing.dequantize, static_argnames="codes")
    weight = np.asarray(dequantize(packed, codes), np.float64)
    expected = np.asarray(x, np.float64) @ weight
    matvec = jax.jit(xla_gpu.matvec, static_argnames="codes")
    found = matvec(x, packed, codes)
    assert found.dtype == x.dtype
    assert relative_error(found, expected) < 1e-6
    found = matvec(x.astype(jnp.bfloat16), packed, codes)
    assert found.dtype == jnp.bfloat16
    assert relative_error(found, expected) < 1e-2


@pytest.mark.parametrize("codes, num_rows", [("int4", 5), ("nf4", 2)])
def test_matvec_takes_few_rows(codes, num_rows):
    with pytest.raises(ValueError, match=f"at most {num_rows - 1} rows"):
        xla_gpu.matvec(normal(num_rows, 64), random_packed(64, 8, codes), codes)


def test_a_layer_is_read_without_arithmetic_on_its_index():
    """With that of a negative index, XLA's GPU backend copies the words of the layer."""
    program = str(jax.make_jaxpr(packing.layer)(random_packed(64, 8, "int4", layers=(3,)), 1))
    assert "dynamic_slice" in program and "select_n" not in program


@pytest.mark.device
def test_k_minor_is_the_transposed_nibbles():
    q = random_packed(64, 24, "int4", layers=(3,)).q
    found = jax.jit(mosaic_gpu.k_minor)(q)
    assert found.dtype == jnp.int4
    for row in range(64):
        nibble = (np.asarray(q)[:, row // 8] >> np.uint32(4 * (row % 8))) & 15
        signed = np.where(nibble < 8, nibble, nibble.astype(np.int64) - 16)
        np.testing.assert_array_equal(np.asarray(found[:, :, row], np.int64), signed)


@pytest.fixture
def on_hopper(monkeypatch):
    """Runs Mosaic GPU kernels on a Hopper GPU, or interpreted on a CPU, with their copies, barriers
    and indices.

    The interpreter lacks the arithmetic in registers; plain sums replace it.
    """
    if not device_tier.interprets("gpu"):
        if decode_weights.best(jax.devices()[0]) != "k_minor":
            pytest.skip("a kernel for GPUs of compute capability 9.0")
        yield
        return
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    if not hasattr(params, "force_gpu_interpret_mode"):
        pytest.skip("jax 0.10.1 and older cannot be told to interpret every kernel")

    write = state.TransformedRef.__setitem__

    def as_stored(ref):
        return dataclasses.replace(ref, transforms=ref.transforms[:-1])

    def store(ref, index, value):
        if isinstance(ref.transforms[-1], state.TransposeTransform):
            ref, value = as_stored(ref), value.T
        write(ref, index, value)

    def wgmma(acc, a, b):
        b = as_stored(b)[...].T  # it cannot transpose
        acc[...] += jnp.dot(a, b, preferred_element_type=jnp.float32)

    monkeypatch.setattr(plgpu, "layout_cast", lambda array, layout: array)
    monkeypatch.setattr(state.TransformedRef, "__setitem__", store)
    monkeypatch.setattr(plgpu, "wgmma", wgmma)
    monkeypatch.setattr(plgpu, "wgmma_wait", lambda in_flight: None)
    monkeypatch.setattr(plgpu, "ACC", plgpu.SMEM)
    memory = params.InterpretGPUParams(uninitialized_memory="zero")
    with params.force_gpu_interpret_mode(memory):
        yield


@pytest.mark.device
# One row, padded; five steps in two parts of K; one group per product, and two; tiles of 128
# columns, which are written in place, and parts of y that are not whole tiles.
@pytest.mark.parametrize(
    "num_rows, k, widths, group, scale_dtype, splits",
    [
        (3, 1280, (64, 64), 32, "int8", 2),
        *cases.long((1, 256, (64,), 32, "int8", 1), (16, 512, (64,), 64, "bfloat16", 1)),
        *cases.long((33, 640, (128, 256), 128, "float32", 1)),
        (64, 256, (64, 192), 32, "int8", 1),
    ],
)
def test_mosaic_kernel(on_hopper, num_rows, k, widths, group, scale_dtype, splits):
    layers, n = 3, sum(widths)
    padded = max(8, 1 << (num_rows - 1).bit_length())
    tile = mosaic_gpu._tile(padded, k, n, group, scale_dtype)
    assert mosaic_gpu._splits(n // tile.columns, k // tile.step, padded, k) == splits
    codes = draw.integers(-8, 8, (layers, n, k))
    scale = draw.integers(-127, 128, (layers, k // group, n))
    column_scale = draw.uniform(0.5, 2, (layers, 1, n))
    x = normal(num_rows, k, dtype=jnp.bfloat16)
    found = mosaic_gpu.matmuls(
        x,
        jnp.asarray(codes, jnp.int4),
        jnp.asarray(scale, scale_dtype),
        jnp.asarray(column_scale, jnp.float32),
        jnp.int32(1),
        widths,
    )
    assert [y.shape for y in found] == [(num_rows, width) for width in widths]
    found = jnp.concatenate(found, axis=1)
    weight = codes[1].T * np.repeat(scale[1], group, axis=0) * column_scale[1]
    assert found.dtype == x.dtype
    assert relative_error(found, np.asarray(x, np.float64) @ weight) < 5e-3


@pytest.mark.parametrize("split", ["k", "n"])
def test_mosaic_kernel_over_a_mesh_has_the_parts_of_all_devices(split):
    packed = packing.Packed(
        jax.ShapeDtypeStruct((3, 384, 512), jnp.int4),
        jax.ShapeDtypeStruct((3, 4, 384), jnp.bfloat16),
        group_bias=jax.ShapeDtypeStruct((3, 4, 384), jnp.bfloat16),
    )
    over = partitioning.Partition(**{split: "tensor"})

    def product(x, packed, layer):
        how = {"layer": layer, "widths": (256, 128), "partition": over}
        return int4_matmul.from_k_minor(x, packed, **how)

    with jax.set_mesh(jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))):
        x = jax.ShapeDtypeStruct((5, 512), jnp.bfloat16)
        found = jax.eval_shape(product, x, packed, jax.ShapeDtypeStruct((), jnp.int32))
    assert [y.shape for y in found] == [(5, 256), (5, 128)]


def mosaic_shapes(num_rows, k, n, group, scale_dtype="int8", layers=32):
    shape = jax.ShapeDtypeStruct
    return (
        shape((num_rows, k), jnp.bfloat16),
        shape((layers, n, k), jnp.int4),
        shape((layers, k // group, n), scale_dtype),
        shape((layers, 1, n), jnp.float32),
        shape((), jnp.int32),
    )


@pytest.mark.parametrize(
    "shapes",
    [
        (2, 4096, 4096, 32),
        (16, 11008, 4096, 32),
        (16, 4096, 4096, 128, "bfloat16"),
        (64, 4096, 11008, 64),
    ],
)
def test_mosaic_kernel_lowers_for_cuda(shapes):
    traced = jax.jit(mosaic_gpu.matmul).trace(*mosaic_shapes(*shapes))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({}, None),
        ({"scale_dtype": jnp.float32}, None),
        ({"num_rows": 65}, "65 rows"),
        ({"dtype": jnp.float32}, "float32"),
        ({"group": 16}, "groups of 16"),
        ({"scale_dtype": jnp.uint8}, "uint8"),
        ({"k": 4160}, "multiples of 128"),
        ({"n": 4128}, "of 64"),
        ({"k": 5504, "group": 128}, "multiples of 256"),
    ],
)
def test_mosaic_kernel_says_what_it_refuses(changed, reason):
    taken = {
        "num_rows": 16,
        "k": 4096,
        "n": 4096,
        "group": 32,
        "dtype": jnp.bfloat16,
        "scale_dtype": jnp.int8,
    }
    found = mosaic_gpu.refusal(**(taken | changed))
    assert found is None if reason is None else reason in found


def test_mosaic_kernel_refuses_by_name():
    with pytest.raises(ValueError, match="does not take 65 rows"):
        jax.eval_shape(mosaic_gpu.matmul, *mosaic_shapes(65, 4096, 4096, 32))


LAYERS = 3


def stack_of(k, n, group, scale_dtype="int8", bias_dtype=None):
    """A stack of random weights: integer scales of columns of floats, or a bias of groups."""
    words = jnp.asarray(draw.integers(0, 2**32, (LAYERS, k // 8, n), np.uint32))
    scale = jnp.asarray(draw.integers(-127, 128, (LAYERS, k // group, n)), scale_dtype)
    if bias_dtype:
        bias = jnp.asarray(draw.normal(size=scale.shape) * 100, bias_dtype)
        return packing.Packed(words, scale, group_bias=bias)
    column = jnp.asarray(draw.uniform(0.5, 2, (LAYERS, 1, n)), jnp.float32)
    return packing.Packed(words, scale, column)


@jax.jit
def second_layer(stack):
    return packing.dequantize(packing.layer(stack, 1))


@pytest.mark.device
# One row; eleven steps in two parts, with a bias; two tiles of rows, and one group for all of K.
@pytest.mark.parametrize(
    "num_rows, k, n, group, scale_dtype, bias_dtype, dtype",
    [
        (1, 256, 64, 32, "int8", None, "bfloat16"),
        (5, 1408, 128, 64, "bfloat16", "float32", "float16"),
        (100, 384, 192, 384, "float32", None, "bfloat16"),
    ],
)
def test_triton_kernel(num_rows, k, n, group, scale_dtype, bias_dtype, dtype):
    stack = stack_of(k, n, group, scale_dtype, bias_dtype)
    x = normal(num_rows, k, dtype=dtype)
    if not device_tier.interprets("gpu") and not platform.is_ampere_to_hopper():
        pytest.skip("a kernel for GPUs of compute capability 8.0 to 9.0")
    splits = triton_gpu._tile(num_rows, k, [n], stack).splits
    assert splits == (2 if k == 1408 else 1)
    found = int4_matmul.int4_matmul(x, stack, layer=jnp.int32(1), implementation="triton_gpu")
    assert found.dtype == x.dtype and found.shape == (num_rows, n)
    expected = np.asarray(x, np.float64) @ np.asarray(second_layer(stack), np.float64)
    assert relative_error(found, expected) < (5e-3 if dtype == "bfloat16" else 6e-4)


@pytest.mark.device
# One part of K, and two with a bias.
@pytest.mark.parametrize(
    "num_rows, k, widths, bias_dtype, splits",
    [*cases.long((20, 256, (128, 64, 64), None, 1)), (3, 1408, (64, 128), "bfloat16", 2)],
)
def test_triton_kernel_of_several_weights(num_rows, k, widths, bias_dtype, splits):
    if not device_tier.interprets("gpu") and not platform.is_ampere_to_hopper():
        pytest.skip("a kernel for GPUs of compute capability 8.0 to 9.0")
    stacks = tuple(stack_of(k, n, 32, "int8", bias_dtype) for n in widths)
    x = normal(num_rows, k, dtype=jnp.bfloat16)
    assert triton_gpu._tile(num_rows, k, widths, stacks[0]).splits == splits
    interpret = device_tier.interprets("gpu")
    found = triton_gpu.matmuls(x, stacks, jnp.int32(1), interpret=interpret)
    for y, stack, n in zip(found, stacks, widths, strict=True):
        assert y.dtype == x.dtype and y.shape == (num_rows, n)
        expected = np.asarray(x, np.float64) @ np.asarray(second_layer(stack), np.float64)
        assert relative_error(y, expected) < 5e-3


def test_triton_kernel_takes_weights_that_are_alike():
    stacks = tuple(stack_of(256, 64, group) for group in (32, 64))
    with pytest.raises(ValueError, match="that differ in their columns only"):
        triton_gpu.matmuls(normal(3, 256, dtype=jnp.bfloat16), stacks, jnp.int32(1))


@pytest.fixture
def triton_calls(monkeypatch):
    """The shapes of what the Triton kernel is called with: interpreted, as if this were a GPU."""
    calls, matmuls = [], triton_gpu.matmuls

    def interpreted(x, weights, layer):
        calls.append((x.shape, [packed.q.shape[2] for packed in weights]))
        return matmuls(x, weights, layer, interpret=True)

    monkeypatch.setattr(platform, "platform_here", lambda: "gpu")
    monkeypatch.setattr(triton_gpu, "matmuls", interpreted)
    monkeypatch.setattr(triton_gpu, "matmul", lambda x, packed, layer, interpret=False: interpreted(
        x, (packed,), layer)[0])  # fmt: skip
    return calls


@pytest.mark.parametrize("groups, together", [((32, 32), True), ((32, 64), False)])
def test_joined_weights_have_one_kernel_if_they_are_alike(groups, together, triton_calls):
    stacks = [stack_of(256, n, group) for n, group in zip((128, 64), groups, strict=True)]
    x = normal(2, 3, 250, dtype=jnp.bfloat16)  # narrower than the padded K
    found = jax.jit(lambda x: int4_matmul.joined(x, stacks, layer=jnp.int32(1)))(x)
    for y, stack in zip(found, stacks, strict=True):
        assert y.dtype == x.dtype and y.shape == (2, 3, stack.q.shape[2])
        expected = np.asarray(x, np.float64) @ np.asarray(second_layer(stack), np.float64)[:250]
        assert relative_error(y, expected) < 5e-3
    assert [widths for _, widths in triton_calls] == ([[128, 64]] if together else [[128], [64]])


def test_joined_weights_over_a_mesh(triton_calls):
    """Each of two devices has half of the rows; where it has part of a weight, one at a time."""
    stacks = [stack_of(256, n, 32) for n in (128, 64)]
    x = normal(6, 256, dtype=jnp.bfloat16)
    expected = [
        np.asarray(x, np.float64) @ np.asarray(second_layer(stack), np.float64) for stack in stacks
    ]
    for own, calls in (
        (partitioning.Partition(rows=("data",)), [((3, 256), [128, 64])]),
        (partitioning.Partition(k="data"), [((6, 128), [128]), ((6, 128), [64])]),
    ):
        triton_calls.clear()
        with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))):
            found = jax.jit(
                lambda x, own=own: int4_matmul.joined(x, stacks, layer=jnp.int32(1), partition=own)
            )(x)
        assert triton_calls == calls
        for y, right in zip(found, expected, strict=True):
            assert relative_error(y, right) < 5e-3


def test_triton_kernel_over_a_mesh():
    """Each of two devices has half of K; the derivative is that of the dense product."""
    stack, x = stack_of(512, 64, 32), normal(4, 512, dtype=jnp.bfloat16)

    def product(x, **how):
        return int4_matmul.int4_matmul(x, stack, layer=jnp.int32(1), **how)

    @jax.jit
    def value_and_vjp(x):
        over = partitioning.Partition(k="tensor")
        y, vjp = jax.vjp(lambda x: product(x, partition=over, implementation="triton_gpu"), x)
        return y, *vjp(y)

    with jax.set_mesh(jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))):
        y, dx = value_and_vjp(x)
    weight = np.asarray(second_layer(stack), np.float64)
    assert relative_error(y, np.asarray(x, np.float64) @ weight) < 5e-3
    assert relative_error(dx, np.asarray(y, np.float64) @ weight.T) < 5e-3


@pytest.mark.skipif(
    hasattr(pltriton, "get_gpu_info"), reason="jax 0.11 and newer must know the GPU to lower"
)
def test_a_gpu_gets_the_triton_kernel_alone_and_batched():
    """The words reach it as they are stored: the whole stack, and no slice of it."""
    stack = stack_of(256, 128, 32)

    def product(x):
        return int4_matmul.int4_matmul(x, stack, layer=jnp.int32(1))

    for function, shape in ((product, (20, 256)), (jax.vmap(product), (3, 20, 256))):
        traced = jax.jit(function).trace(jax.ShapeDtypeStruct(shape, jnp.bfloat16))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        call = next(line for line in text.splitlines() if "xla.gpu.triton" in line)
        assert "tensor<3x32x128xui32>" in call
        assert "dynamic_slice" not in text


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({}, None),
        ({"num_rows": 128, "k": 384, "n": 64, "group": 384, "dtype": jnp.float16}, None),
        ({"num_rows": 129}, "129 rows"),
        ({"dtype": jnp.float32}, "float32"),
        ({"scale_dtype": jnp.uint8}, "uint8"),
        ({"group": 12}, "groups of 12"),
        ({"k": 4160}, "multiples of 128"),
        ({"n": 4128}, "of 64"),
    ],
)
def test_triton_kernel_says_what_it_refuses(changed, reason):
    taken = {"num_rows": 8, "k": 4096, "n": 4096, "group": 32, "dtype": jnp.bfloat16}
    found = triton_gpu.refusal(**({**taken, "scale_dtype": jnp.int8} | changed))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    "capability, takes", [("7.5", False), ("8.0", True), ("8.9", True), ("9.0", True),
                          ("10.0", False), ("12.0", False), ("gfx942", False)]
)  # fmt: skip
def test_triton_kernel_is_for_some_gpus(capability, takes, monkeypatch):
    device = type("Device", (), {"compute_capability": capability})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    found = triton_gpu.refusal(8, 4096, 4096, 32, jnp.bfloat16, jnp.int8)
    assert found is None if takes else "8.0 to 9.0" in found


def test_a_gpu_has_its_kernel_for_each_product(monkeypatch):
    monkeypatch.setattr(platform, "platform_here", lambda: "gpu")
    shape = jax.ShapeDtypeStruct
    int4, biased = stack_of(256, 128, 32), stack_of(256, 128, 32, "bfloat16", "bfloat16")
    nf4 = random_packed(256, 128, "nf4", layers=(LAYERS,))

    def kernel(rows, packed=int4, dtype=jnp.bfloat16, **how):
        return int4_matmul.kernel_of(shape((rows, 256), dtype), packed, **how)

    assert kernel(1) == kernel(128) == kernel(8, biased) == choice.INT4_TENSOR_CORES
    assert kernel(129) == choice.XLA
    assert kernel(8, transpose=True) == choice.XLA
    assert kernel(4, dtype=jnp.float32) == kernel(1, nf4, codes="nf4") == choice.INT4_FEW_ROWS
    assert kernel(5, dtype=jnp.float32) == kernel(2, nf4, codes="nf4") == choice.XLA
    both = biased._replace(column_scale=int4.column_scale)
    assert kernel(8, both) == choice.XLA
    huge = jax.tree.map(lambda a: shape((2**21, *a.shape[1:]), a.dtype), int4)
    assert kernel(8, huge) == choice.XLA
    # XLA would gather the weight for a kernel that it cannot split.
    with jax.set_mesh(jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))):
        assert kernel(8, partition=partitioning.Partition(k="tensor")) == choice.INT4_TENSOR_CORES
        assert kernel(8) == choice.XLA
    with choice.restored():
        choice.leave_out(choice.INT4_TENSOR_CORES, "wrong")
        assert (kernel(4), kernel(8)) == (choice.INT4_FEW_ROWS, choice.XLA)


def test_k_is_split_until_every_processor_has_its_share():
    """64 tiles of 64 columns for the 108 processors of an A100: five parts make 3 for each. The
    partial sums of many rows outweigh what more parts would gain."""
    assert triton_gpu._splits(64, num_rows=8, k=4096) == 5
    assert triton_gpu._splits(32, num_rows=64, k=4096) == 3
    assert triton_gpu._splits(108, num_rows=8, k=4096) == 1
    assert triton_gpu._splits(1, num_rows=1, k=128) == 1
