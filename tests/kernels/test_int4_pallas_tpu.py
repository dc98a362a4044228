"""The fused TPU kernel, interpreted on a CPU, against the dequantized weight in float32."""

import device_tier
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax.kernels import packed
from lora_jax.kernels.int4_matmul import pallas_tpu, tpu_tiles

LAYERS = 3
Tile = tpu_tiles.Tile


def weight(k, n, group, scale_dtype, seed=0):
    """A stack of random packed weights whose products with unit vectors are of order one."""
    random = np.random.default_rng(seed)
    q = jnp.asarray(random.integers(0, 2**32, (LAYERS, k // 8, n), np.uint32))
    size = 0.2 / np.sqrt(k)
    if scale_dtype == jnp.int8:
        scale = jnp.asarray(random.integers(-127, 128, (LAYERS, k // group, n)), jnp.int8)
        column = jnp.asarray(random.uniform(0.5, 2, (LAYERS, 1, n)) * size / 127, jnp.float32)
        return packed.Packed(q, scale, column)
    scale = jnp.asarray(random.uniform(-size, size, (LAYERS, k // group, n)), scale_dtype)
    return packed.Packed(q, scale)


@jax.jit
def dense_layer(stack, index):
    return packed.dequantize(packed.layer(stack, index))


def check(rows, k, n, group, *, dtype, scale_dtype=jnp.int8, transpose=False):
    stack = weight(k, n, group, scale_dtype)
    x = np.random.default_rng(1).standard_normal((rows, n if transpose else k))
    x = jnp.asarray(x, dtype)
    how = {"transpose": transpose, "interpret": device_tier.interprets("tpu")}
    y = pallas_tpu.matmul(x, *stack[:3], jnp.int32(1), **how)
    dense = np.asarray(dense_layer(stack, 1))
    expected = np.asarray(x, np.float32) @ (dense.T if transpose else dense)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    error = np.abs(np.asarray(y, np.float32) - expected).max() / np.abs(expected).max()
    assert error < (2e-6 if dtype == jnp.float32 else 8e-3)


@pytest.mark.device
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("rows", "k", "n", "group", "dtype", "scale_dtype"),
    [
        (5, 352, 200, 32, jnp.float32, jnp.int8),
        (1, 256, 128, 64, jnp.bfloat16, jnp.bfloat16),
        (70, 640, 96, 128, jnp.bfloat16, jnp.int8),
        (3, 128, 40, 128, jnp.float32, jnp.float32),
    ],
)
def test_multiplies_with_one_layer(rows, k, n, group, dtype, scale_dtype, transpose):
    check(rows, k, n, group, dtype=dtype, scale_dtype=scale_dtype, transpose=transpose)


@pytest.mark.device
@pytest.mark.parametrize(
    ("tile", "shape", "transpose"),
    [
        # Rows and outputs that end within a tile.
        (Tile(16, 256, 352), (37, 352, 400, 32), False),
        # Partial sums over two steps, each with a block of scales.
        (Tile(16, 256, 1024), (16, 2048, 256, 32), False),
        # Tiles that share a block of int8 scales, K not a multiple of the tile, two steps.
        (Tile(16, 256, 128), (20, 864, 256, 32), True),
        (Tile(16, 512, 128), (16, 2304, 128, 64), True),
    ],
)
def test_tiles_cover_the_whole_product(monkeypatch, tile, shape, transpose):
    monkeypatch.setattr(tpu_tiles, "choose", lambda *_: tile)
    check(*shape, dtype=jnp.float32, transpose=transpose)


def test_scales_in_bfloat16_if_the_registers_multiply_in_it(monkeypatch):
    chip = tpu_tiles.chip_here()._replace(bf16_registers=True)
    monkeypatch.setattr(tpu_tiles, "chip_here", lambda: chip)
    check(16, 256, 128, 32, dtype=jnp.bfloat16)


def test_scan_picks_every_layer_and_shards_compute_their_columns():
    stack = weight(128, 256, 32, jnp.int8)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((8, 128)), jnp.float32)

    def layers(x, *arrays):
        def body(carry, layer):
            return carry, pallas_tpu.matmul(x, *arrays, layer, interpret=True)

        return lax.scan(body, None, jnp.arange(LAYERS))[1]

    columns = PartitionSpec(None, None, "model")
    sharded = jax.shard_map(
        layers,
        mesh=jax.make_mesh((2,), ("model",), (jax.sharding.AxisType.Auto,)),
        in_specs=(PartitionSpec(), columns, columns, columns),
        out_specs=columns,
        check_vma=False,
    )
    y = jax.jit(sharded)(x, *stack[:3])
    dense = np.stack([dense_layer(stack, i) for i in range(LAYERS)])
    np.testing.assert_allclose(y, np.einsum("mk,lkn->lmn", x, dense), atol=2e-6)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": jnp.float16}, "float16"),
        ({"scale_dtype": jnp.uint8}, "uint8"),
        ({"group": 16}, "groups"),
        ({"k": 4000}, "groups"),
        ({"num_rows": 0}, "row"),
        ({"n": 2**20 + 8, "transpose": True}, "memory"),
    ],
)
def test_refuses_with_the_reason(changed, reason):
    shape = dict(num_rows=64, k=4096, n=4096, group=64, dtype=jnp.bfloat16, scale_dtype=jnp.int8)
    assert pallas_tpu.refusal(**shape) is None
    assert reason in pallas_tpu.refusal(**{**shape, **changed})


def test_matmul_raises_what_it_refuses():
    stack = weight(128, 128, 32, jnp.int8)
    with pytest.raises(ValueError, match="float16"):
        pallas_tpu.matmul(jnp.ones((1, 128), jnp.float16), *stack[:3], jnp.int32(0), interpret=True)


@pytest.mark.parametrize("transpose", [False, True])
def test_takes_the_shapes_of_real_models(transpose):
    widths = [256, 768, 1376, 3584, 4096, 11008, 18944, 28672]
    for rows in (1, 5000):
        for k in widths:
            for n in widths:
                shape = (rows, k, n, 32, jnp.bfloat16, jnp.int8)
                assert pallas_tpu.refusal(*shape, transpose=transpose) is None, shape
