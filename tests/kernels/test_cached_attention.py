"""Attention to a stacked KV cache by the kernel for GPUs: what it computes, reads and refuses."""

import functools

import cases
import device_tier
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels import choice, partitioning
from lora_jax.kernels import platform as platforms
from lora_jax.kernels.attention import cached, flash_decoding
from lora_jax.models import cache
from lora_jax.parallel import mesh as sharding

LAYERS, LAYER, WIDTH = 3, 1, 32
MANY = np.iinfo(np.int32).max


def attend(*operands, **how):
    how |= {"interpret": device_tier.interprets("gpu")}
    attend = functools.partial(flash_decoding.attend, **how)
    return jax.jit(attend)(*operands)


def visible(start, num_real, token, size, window):
    """The places that a new token sees, by the rule of a cache in which p is in place p mod S."""
    end, position = start + num_real, start + token
    first = max(0, end - size, position - window + 1)
    return [key % size for key in range(first, min(end, position + 1))]


def operands(start, num_real, *, tokens, heads, groups, size, window, dtype, seed=0):
    """NaN is in all places that no real token sees, in the other layers too."""
    draw = np.random.default_rng(seed)
    q = draw.normal(size=(len(start), tokens, heads, WIDTH))
    k, v = np.full((2, LAYERS, len(start), groups, size, WIDTH), np.nan)
    for sequence, (first, count) in enumerate(zip(start, num_real, strict=True)):
        for token in range(count):
            seen = visible(first, count, token, size, window)
            for array in (k, v):
                new = draw.normal(size=(groups, len(seen), WIDTH))
                array[LAYER, sequence][:, seen] = new
    q, k, v = (jnp.asarray(a, dtype) for a in (q, k, v))
    where = (jnp.asarray(a, jnp.int32) for a in (LAYER, start, num_real, window))
    return q, k, v, None, None, *where


def expected(q, k, v, k_scale, v_scale, layer, start, num_real, window, soft_cap=None):
    """The definition, for one query after the other; zero for tokens that are not real."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k[layer], v[layer]))
    if k_scale is not None:
        k, v = (a * np.asarray(s[layer])[..., None] for a, s in ((k, k_scale), (v, v_scale)))
    out = np.zeros(q.shape)
    for sequence, token, head in np.ndindex(q.shape[:3]):
        if token < num_real[sequence]:
            group = head // (q.shape[2] // k.shape[1])
            size = k.shape[2]
            seen = visible(*map(int, (start[sequence], num_real[sequence], token, size, window)))
            logits = k[sequence, group, seen] @ q[sequence, token, head] / np.sqrt(q.shape[-1])
            logits = soft_cap * np.tanh(logits / soft_cap) if soft_cap else logits
            p = np.exp(logits - logits.max())
            out[sequence, token, head] = p / p.sum() @ v[sequence, group, seen]
    return out


def check(given, tolerance, **how):
    found = np.asarray(attend(*given, **how), np.float64)
    assert np.isfinite(found).all()
    real = np.arange(found.shape[1])[None] < np.asarray(given[7])[:, None]
    found = found * real[..., None, None]
    wanted = expected(*given, **how)
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


SIZE = 200  # places: a block of keys and a half
# The last ones have no new token: a free slot, and one whose prompt is being read.
STARTS = [0, 1, 77, 128, SIZE - 1, -1, 90]
LIVE = [1, 1, 1, 1, 1, 0, 0]


@pytest.mark.device
@pytest.mark.parametrize("groups, dtype", [  # 1, 4 and 8 queries of a kv-head
    (2, "bfloat16"), (1, "float32"),
    *cases.long((1, "bfloat16"), (2, "float32"), (8, "float32"), (8, "bfloat16"))
])  # fmt: skip
def test_a_token_sees_its_sequence(groups, dtype):
    how = {"tokens": 1, "heads": 8, "groups": groups, "size": SIZE, "window": MANY}
    check(operands(STARTS, LIVE, dtype=dtype, **how), device_tier.TOLERANCE[dtype])


@pytest.mark.device
@pytest.mark.parametrize(
    "dtype, soft_cap", [("float32", 0.7), ("bfloat16", None), *cases.long(("float32", None))]
)
def test_several_tokens_see_a_window(dtype, soft_cap):
    """Some sequences are longer than the cache; not all new tokens are real."""
    how = {"tokens": 5, "heads": 8, "groups": 2, "size": SIZE, "window": 70}
    start, num_real = [0, 30, 150, 330, 1000, 60], [5, 1, 4, 5, 2, 0]
    given = operands(start, num_real, dtype=dtype, **how)
    check(given, device_tier.TOLERANCE[dtype], soft_cap=soft_cap)


@pytest.mark.device
def test_keys_and_values_in_int8():
    draw = np.random.default_rng(0)
    q = draw.normal(size=(3, 1, 4, WIDTH))
    k, v = draw.integers(-127, 128, (2, LAYERS, 3, 2, SIZE, WIDTH))
    scales = draw.uniform(0.005, 0.02, (2, LAYERS, 3, 2, SIZE))
    where = (jnp.asarray(a, jnp.int32) for a in (LAYER, [3, 150, SIZE - 1], [1, 1, 1], MANY))
    k, v = (jnp.asarray(a, jnp.int8) for a in (k, v))
    given = jnp.asarray(q, jnp.float32), k, v, *map(jnp.asarray, np.float32(scales)), *where
    check(given, device_tier.TOLERANCE["float32"])


@pytest.mark.device
def test_a_sequence_does_not_depend_on_the_others():
    how = {"tokens": 1, "heads": 4, "groups": 2, "size": SIZE, "window": MANY, "dtype": "float32"}
    q, k, v, *_ = one = operands([120, 3, 7], [1, 1, 1], **how)
    others = operands([120, 190, 60], [1, 1, 0], **how, seed=1)
    mixed = [others[0].at[0].set(q[0])]
    mixed += [others[1].at[:, 0].set(k[:, 0]), others[2].at[:, 0].set(v[:, 0])]
    np.testing.assert_array_equal(attend(*one)[0], attend(*mixed, *others[3:])[0])


@pytest.fixture
def like_a_gpu(monkeypatch):
    """This device gets the GPU's kernel, interpreted."""
    interpreted = functools.partial(flash_decoding.attend, interpret=True)
    monkeypatch.setattr(platforms, "platform_here", lambda: "gpu")
    monkeypatch.setattr(flash_decoding, "attend", interpreted)
    with choice.restored():
        yield


@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 2, 1), (4, 1, 1)])
def test_a_mesh_splits_sequences_and_heads(sizes, like_a_gpu):
    """Or leaves them whole: 4 devices do not share 6 sequences."""
    how = {"tokens": 1, "heads": 4, "groups": 2, "size": 40, "window": MANY, "dtype": "float32"}
    given = operands([3, 39, 0, 20, 8, 9], [1, 1, 1, 1, 0, 1], **how)
    q, k, v, _, _, layer, start, num_real, window = given
    split = partitioning.Partition(("data", "fsdp"), n="tensor")
    where = {"start": start, "num_real": num_real, "window": window, "partition": split}
    where["soft_cap"] = 0.7
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    with jax.set_mesh(mesh):
        k, v = jax.device_put((k, v), sharding.cache(6, 2, mesh))
        assert cached.kernel_of(q, k, split) == choice.ATTENTION_CACHED
        found = jax.jit(lambda q, k, v: cached.attend(q, k, v, layer=layer, **where))(q, k, v)
    np.testing.assert_allclose(found, expected(*given, soft_cap=0.7), atol=1e-5)


@pytest.mark.parametrize(
    "size, window, kv_dtype, soft_cap",
    [(24, 9, "int8", 0.7), *cases.long(
        (40, None, None, None), (40, None, "int8", None), (24, 9, None, None),
        (24, 9, "int8", None))],
)  # fmt: skip
def test_a_cache_is_attended_as_by_xla(size, window, kv_dtype, soft_cap, like_a_gpu):
    """After the new tokens are in it; the second layer has the window. XLA's is left to chunks."""
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.normal(size=(4, 2, n, 16)), jnp.float32) for n in (6, 3, 3))
    stored = cache.empty((2, 4, 3, size, 16), jnp.float32, kv_dtype)
    past = jnp.asarray(draw.normal(size=(2, 4, 20, 3, 16)), jnp.float32)
    begin = cache.Place(jnp.zeros(4, jnp.int32), jnp.full(4, 20), jnp.full(4, 20))
    place = cache.Place(jnp.asarray([20, 20, 11, 5]), jnp.asarray([2, 1, 0, 2]), begin.length)

    @jax.jit
    def run(stored):
        windows = (None, window), jnp.arange(2)
        many = jnp.zeros((4, 20, 30, 16))  # more queries than the kernel takes
        fill = cache.attention_to(stored, begin, 20, *windows, soft_cap)
        _, stored = fill(jnp.int32(1), stored, many, *past, partitioning.WHOLE)
        add = cache.attention_to(stored, place, 2, *windows, soft_cap)
        return add(jnp.int32(1), stored, q, k, v, partitioning.WHOLE)

    by_kernel, kept = run(stored)
    choice.leave_out(choice.ATTENTION_CACHED, "compared")
    by_xla, same = run(stored)
    real = np.arange(2)[None] < np.asarray(place.num_real)[:, None]
    np.testing.assert_allclose(by_kernel[real], by_xla[real], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, kept, same)
    assert not np.array_equal(by_kernel, by_xla)  # another order of sums


def refused(*, dtype="bfloat16", stored=None, tokens=1, groups=8, width=128, places=1024, **how):
    q = jax.ShapeDtypeStruct((64, tokens, 32, width), dtype)
    k = jax.ShapeDtypeStruct((32, 64, groups, places, width), stored or dtype)
    return cached.kernel_of(q, k, **how) == choice.XLA


def test_what_the_kernel_does_not_take_is_left_to_xla(like_a_gpu, monkeypatch):
    assert not refused() and not refused(tokens=16) and not refused(width=64)
    assert refused(tokens=17)
    assert refused(width=96) and refused(width=512)
    assert refused(stored="float8_e4m3fn")
    # 2³¹ keys and 2³¹ + 1, of one byte each; and of two, whose places take 64 bits.
    assert not refused(stored="int8") and refused(stored="int8", places=1025)
    assert not refused(places=1025)
    with jax.set_mesh(sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 8})):
        split = partitioning.Partition(n="tensor")
        assert not refused(partition=split) and refused(partition=split, groups=4)
    with choice.restored():
        choice.leave_out(choice.ATTENTION_CACHED, "wrong on this device")
        assert refused()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability, takes in ((7.5, False), (8.0, True), (10.0, False), (None, False)):
        monkeypatch.setattr(platforms, "compute_capability", lambda value=capability: value)
        assert refused() != takes
    monkeypatch.setattr(platforms, "platform_here", lambda: "tpu")
    assert refused()
