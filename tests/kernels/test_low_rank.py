"""Products with the A and B of many adapters by kernels for GPUs: what they compute and refuse."""

import functools

import cases
import device_tier
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.kernels import choice, low_rank, partitioning
from lora_jax.kernels import platform as platforms
from lora_jax.kernels.low_rank import triton_gpu
from lora_jax.lora.nnx import bank
from lora_jax.models import cache, config, llama
from lora_jax.parallel import mesh as sharding

LAYERS, LAYER = 3, 1


def stack(draw, *shape, dtype):
    """NaN is in all layers but one."""
    array = np.full((LAYERS, *shape), np.nan)
    array[LAYER] = draw.normal(size=shape)
    return jnp.asarray(array, dtype)


def close(found, expected, tolerance):
    found = np.asarray(found, np.float64)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


# Rows that fill a tile and that do not; ranks in one column of tiles and in several.
@pytest.mark.device
@pytest.mark.parametrize("rows, k, rank", [(1, 64, 16), (5, 1088, 48), (64, 512, 128)])
@pytest.mark.parametrize("dtype", device_tier.TOLERANCE)
def test_shrink(rows, k, rank, dtype):
    draw = np.random.default_rng(0)
    x, A = jnp.asarray(draw.normal(size=(rows, k)), dtype), stack(draw, k, rank, dtype=dtype)
    shrink = functools.partial(triton_gpu.shrink, interpret=device_tier.interprets("gpu"))
    found = jax.jit(shrink)(x, A, jnp.int32(LAYER))
    assert found.dtype == jnp.float32
    close(found, np.asarray(x, np.float64) @ np.asarray(A[LAYER], np.float64), 1e-6)


@pytest.mark.device
@pytest.mark.parametrize("dtype", device_tier.TOLERANCE)
@pytest.mark.parametrize(
    "rows, n, slots, rank, has_bias",
    [(1, 64, 1, 16, False), (5, 192, 3, 48, True), (64, 4160, 2, 32, False)],
)
def test_expand(rows, n, slots, rank, has_bias, dtype):
    draw = np.random.default_rng(0)
    y, mixed, bias = (
        jnp.asarray(draw.normal(size=shape), dtype) for shape in ((rows, n), (rows, rank), (n,))
    )
    weights = jnp.asarray(draw.normal(size=(rows, slots)), jnp.float32)
    B, stretch = stack(draw, rank, n, dtype=dtype), stack(draw, slots, n, dtype=jnp.float32)
    expand = functools.partial(triton_gpu.expand, interpret=device_tier.interprets("gpu"))
    given = y, mixed, B, weights, stretch, bias if has_bias else None, jnp.int32(LAYER)
    found = jax.jit(expand)(*given)
    assert found.dtype == dtype
    y, mixed, B, weights, v, bias = (
        np.asarray(a, np.float64) for a in (y, mixed, B[LAYER], weights, stretch[LAYER], bias)
    )
    expected = y + mixed @ B + weights @ v * (y - has_bias * bias)
    close(found, expected, device_tier.TOLERANCE[dtype])


@pytest.fixture
def like_a_gpu(monkeypatch):
    """This device gets the GPU's kernels, interpreted; they count their calls."""
    calls = []

    def interpreted(function):
        def call(*operands):
            calls.append(function.__name__)
            return function(*operands, interpret=True)

        return call

    monkeypatch.setattr(platforms, "platform_here", lambda: "gpu")
    for name in ("shrink", "expand"):
        monkeypatch.setattr(triton_gpu, name, interpreted(getattr(triton_gpu, name)))
    with choice.restored():
        choice.leave_out(choice.ATTENTION_CACHED, "not of these tests")
        yield calls


@pytest.mark.long
def test_a_bank_computes_as_with_xla(like_a_gpu):
    """In the layers of a stack, one with a bias; for several tokens of a row."""
    c = config.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, max_position_embeddings=64,
        qkv_bias=True,
    )  # fmt: skip
    model = llama.LlamaForCausalLM(c, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    bank.add(model, slots=2, rank=8, targets=["q_proj", "down_proj"])
    draw = np.random.default_rng(0)
    graphdef, adapters, base = nnx.split(model, bank.BankParam, ...)
    adapters = jax.tree.map(lambda a: jnp.asarray(draw.normal(size=a.shape) / 4, a.dtype), adapters)
    ids = jnp.asarray(draw.integers(0, 64, (3, 2)))
    weights = jnp.asarray([[1.0, 0], [0.3, 0.7], [0, 0]])
    place = cache.Place(*(jnp.full(3, number) for number in (0, 2, 2)))

    @jax.jit
    def run(adapters):
        model = nnx.merge(graphdef, adapters, base)
        with bank.mixture(weights):
            return model.extend(ids, model.empty_cache(3, 8), place)[0].astype(jnp.float32)

    in_place = run(adapters)
    assert like_a_gpu.count("shrink") == like_a_gpu.count("expand") == 2
    choice.leave_out(choice.LOW_RANK, "compared")
    by_xla = run(adapters)
    assert like_a_gpu.count("shrink") == 2
    close(in_place, np.asarray(by_xla, np.float64), 2e-2)
    without = run(jax.tree.map(jnp.zeros_like, adapters))
    assert np.linalg.norm(by_xla - without) > 0.2 * np.linalg.norm(by_xla)


@pytest.mark.parametrize(
    "k, n", [("tensor", "fsdp"), *cases.long((None, "tensor"), ("fsdp", "tensor"))]
)
def test_a_mesh_splits_the_products(k, n, like_a_gpu):
    """A and B as their weight, which are not moved; the rows over data and fsdp."""
    draw = np.random.default_rng(0)
    partition = partitioning.Partition(("data", "fsdp"), k, n, gathered="fsdp")
    x, y, bias = (jnp.asarray(draw.normal(size=s), jnp.bfloat16) for s in ((8, 128), (8, 256), 256))
    A, B = (stack(draw, *shape, dtype=jnp.bfloat16) for shape in ((128, 32), (32, 256)))
    stretch = stack(draw, 2, 256, dtype=jnp.float32)
    weights = jnp.asarray(draw.normal(size=(8, 2)), jnp.float32)

    def both(x, y, A, B, weights, stretch, bias, partition):
        mixed = low_rank.shrink(x, A, jnp.int32(LAYER), partition)
        own = mixed.astype(B.dtype), B, weights, stretch, bias
        return mixed, low_rank.expand(y, *own, jnp.int32(LAYER), partition)

    alone = jax.jit(functools.partial(both, partition=partitioning.WHOLE))
    expected = alone(x, y, A, B, weights, stretch, bias)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        assert low_rank.kernel_of(x, A, B, partition) == choice.LOW_RANK
        split = [jax.P(None, k), jax.P(None, None, n), jax.P(None, None, n)]
        A, B, stretch = (
            jax.device_put(np.asarray(array), jax.NamedSharding(mesh, spec))
            for array, spec in zip((A, B, stretch), split, strict=True)
        )
        x, y, weights, bias = jax.tree.map(np.asarray, (x, y, weights, bias))  # cut on the host
        run = jax.jit(functools.partial(both, partition=partition))
        compiled = run.lower(x, y, A, B, weights, stretch, bias).compile()
        found = compiled(x, y, A, B, weights, stretch, bias)
    for own, other in zip(found, expected, strict=True):
        close(own, np.asarray(other, np.float64), 1e-2)
    moved = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert not any(f"[{LAYERS}," in line.split(" all-gather(")[0] for line in moved)


def refused(rows=64, k=4096, n=14336, rank=128, dtype="bfloat16", other=None, **how):
    x = jax.ShapeDtypeStruct((rows, k), dtype)
    A = jax.ShapeDtypeStruct((32, k, rank), other or dtype)
    B = jax.ShapeDtypeStruct((32, rank, n), dtype)
    return low_rank.kernel_of(x, A, B, **how) == choice.XLA


def test_what_the_kernels_do_not_take_is_left_to_xla(like_a_gpu, monkeypatch):
    assert not refused() and not refused(rows=1) and not refused(dtype="float16", rank=48)
    assert refused(rows=65)
    assert refused(rank=24) and refused(k=4128) and refused(n=100)
    assert refused(dtype="float32") and refused(other="float32")
    with jax.set_mesh(sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 1})):
        assert refused() and not refused(partition=partitioning.Partition(("data",)))
    with jax.set_mesh(sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 4})):
        assert not refused(rows=128, partition=partitioning.Partition(("data",), "tensor"))
        assert refused(rows=130, partition=partitioning.Partition(("data",), "tensor"))
        assert refused(k=4096 + 64, partition=partitioning.Partition(k="tensor"))
        assert refused(n=64 * 6, partition=partitioning.Partition(n="tensor"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(platforms, "compute_capability", lambda: 7.5)
    assert refused()
    monkeypatch.setattr(platforms, "compute_capability", lambda: 8.0)
    assert not refused()
    choice.leave_out(choice.LOW_RANK, "wrong on this device")
    assert refused()
