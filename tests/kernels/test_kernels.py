"""The implementations of attention, SwiGLU and the cross-entropy, against their definitions."""

import functools
import sys
import types

import cases
import device_tier
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from lora_jax import extras
from lora_jax.kernels import attention, cross_entropy, embedding, glu
from lora_jax.kernels import platform as platforms
from lora_jax.kernels.attention import cudnn, splash, tokamax_gpu, xla
from lora_jax.kernels.attention import dense as dense_attention
from lora_jax.parallel import mesh as sharding

TOLERANCE = device_tier.TOLERANCE


def normal(seed, *shape, dtype="float32", scale=1):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def close(found, expected, dtype):
    found, expected = (np.asarray(a, np.float32) for a in (found, expected))
    assert np.linalg.norm(found - expected) <= TOLERANCE[dtype] * np.linalg.norm(expected)


def value_and_vjp(function, arguments, cotangent):
    @jax.jit
    def both(arguments, cotangent):
        y, vjp = jax.vjp(function, *arguments)
        return y, *vjp(cotangent)

    return both(arguments, cotangent)


def dense(q, k, v, visible, soft_cap=None):
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    if soft_cap is not None:
        return capped(*wide, visible, soft_cap).astype(q.dtype)
    return jax.nn.dot_product_attention(*wide, mask=visible[:, None]).astype(q.dtype)


def capped(q, k, v, visible, soft_cap):
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    logits = soft_cap * jnp.tanh(logits / soft_cap)
    p = jax.nn.softmax(jnp.where(visible[:, None], logits, -1e30), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", p, v)


@pytest.mark.device
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_queries", "heads", "groups", "soft_cap"),
    [(1, 4, 2, None), (1, 2, 2, None), (3, 6, 1, 1.0)],
)
def test_attention_to_a_cache(num_queries, heads, groups, soft_cap, dtype):
    """The key mask hides the start of some sequences."""
    shapes = (num_queries, heads), (40, groups), (40, groups)
    q, k, v = (normal(i, 2, *shape, 16, dtype=dtype) for i, shape in enumerate(shapes))
    real = np.arange(40)[None] >= np.array([[0], [7]])
    seen = np.arange(40)[None] <= 20 + np.arange(num_queries)[:, None]
    visible = jnp.asarray(seen[None] & real[:, None])
    stored = k.swapaxes(1, 2), v.swapaxes(1, 2)
    attend = functools.partial(dense_attention.attention, soft_cap=soft_cap)
    found = jax.jit(attend)(q, *stored, visible)
    assert found.dtype == dtype
    close(found, dense(q, k, v, visible, soft_cap), dtype)


LENGTH = 300
# Two sequences: several examples with padding at both ends; one example, then padding.
PACKED = np.stack([1 + np.arange(LENGTH) // 140, np.ones(LENGTH, int)])
PACKED[0, :5] = PACKED[0, -9:] = PACKED[1, 200:] = 0


def reference(q, k, v, examples, window, soft_cap):
    """The definition of self-attention on real tokens; zero on padding."""
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    seen = (distance >= 0) & (distance < window)
    visible = (examples[:, :, None] == examples[:, None]) & seen
    return dense(q, k, v, visible, soft_cap) * (examples != 0)[..., None, None].astype(q.dtype)


def operands(dtype, groups):
    """[q, k, v, the derivative by the result]"""
    shapes = [(4, 16), (groups, 16), (groups, 16), (4, 16)]
    return [normal(i, 2, LENGTH, *s, dtype=dtype) for i, s in enumerate(shapes)]


@functools.cache
def referred(dtype, groups, window, is_packed, soft_cap):
    """The definition's value and derivatives."""
    examples = PACKED if is_packed else np.ones_like(PACKED)
    how = {"window": window, "soft_cap": soft_cap}
    expected = functools.partial(reference, examples=examples, **how)
    *qkv, cotangent = operands(dtype, groups)
    return jax.tree.map(np.asarray, value_and_vjp(expected, qkv, cotangent))


def attend_and_check(attend, *, dtype, groups, window, examples=PACKED, soft_cap=None):
    *qkv, cotangent = operands(dtype, groups)
    real = jnp.asarray(examples != 0)[..., None, None].astype(dtype)

    def masked(q, k, v):
        out = attend(q, k, v)
        assert out.dtype == dtype
        return out * real

    found = value_and_vjp(masked, qkv, cotangent)
    window = min(window or LENGTH, LENGTH)
    expected = referred(dtype, groups, window, examples is PACKED, soft_cap)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        close(a, b, dtype)


@pytest.mark.device
@pytest.mark.parametrize(
    ("dtype", "groups", "window", "soft_cap"),
    [("bfloat16", 4, 150, 1.0), *cases.long(
        ("float32", 2, None, None), ("bfloat16", 2, None, None), ("float32", 1, 50, None),
        ("float32", 2, None, 1.0))],
)  # fmt: skip
@pytest.mark.parametrize("size", [128, 512])
def test_self_attention_in_blocks(size, dtype, groups, window, soft_cap, monkeypatch):
    """Value and gradient, in several blocks and in one."""
    monkeypatch.setattr(xla, "block_size", lambda length: min(size, length))
    how = {"window": window, "soft_cap": soft_cap}
    attend = functools.partial(xla.attend, examples=jnp.asarray(PACKED), **how)
    attend_and_check(attend, dtype=dtype, groups=groups, **how)


@pytest.mark.device
@pytest.mark.parametrize("window, soft_cap", [*cases.long((None, None), (50, None)), (50, 1.0)])
def test_splash_attention(window, soft_cap):
    how = {"window": window, "soft_cap": soft_cap}
    interpret = device_tier.interprets("tpu")
    attend = functools.partial(splash.attend, **how, interpret=interpret)
    attend = functools.partial(attend, examples=jnp.asarray(PACKED))
    attend_and_check(attend, dtype="float32", groups=2, **how)


def keys_in_a_range(q, k, v, first, soft_cap):
    """What tokamax's kernel computes."""
    slots = jnp.arange(q.shape[1])[None]
    visible = (slots[:, None] >= first[:, :, None]) & (slots[:, :, None] >= slots[:, None])
    return dense(q, k, v, visible, soft_cap)


@pytest.mark.parametrize(
    "dtype, window, soft_cap",
    [("float32", 50, 1.0), *cases.long(
        ("bfloat16", None, None), ("float32", None, None), ("bfloat16", 50, None))],
)  # fmt: skip
def test_packed_examples_are_ranges_of_keys(dtype, window, soft_cap, monkeypatch):
    """As tokamax is asked to compute them, which is not installed here."""
    monkeypatch.setattr(tokamax_gpu, "_flash", keys_in_a_range)
    how = {"window": window, "soft_cap": soft_cap}
    attend = functools.partial(tokamax_gpu.attend, examples=jnp.asarray(PACKED), **how)
    attend_and_check(attend, dtype=dtype, groups=2, **how)

    q = normal(0, 2, LENGTH, 4, 16, dtype=dtype)
    of_padding = jnp.asarray(PACKED == 0, dtype)[..., None, None] * q
    found, *gradients = map(np.asarray, value_and_vjp(attend, [q, q, q], of_padding))
    assert np.isfinite(found.astype(np.float32)).all()
    assert gradients[2].any()
    for gradient in gradients:  # padding has an output, but sees no other token
        assert not gradient[PACKED != 0].any()


def test_the_first_key_that_a_query_sees():
    """That of its example or of the window; padding, here on all sides, sees itself alone."""
    examples = jnp.asarray([[0, 0, 1, 1, 1, 1, 0, 2, 2, 0], [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]])
    first = tokamax_gpu.first_keys(examples, None)
    assert first.tolist() == [[0, 1, 2, 2, 2, 2, 6, 7, 7, 9], [0, 1, *[2] * 8]]
    first = tokamax_gpu.first_keys(examples, 3)
    assert first.tolist() == [[0, 1, 2, 2, 2, 3, 6, 7, 7, 9], [0, 1, 2, 2, 2, 3, 4, 5, 6, 7]]


def test_an_example_that_is_not_side_by_side_is_not_computed_wrong(monkeypatch):
    monkeypatch.setattr(tokamax_gpu, "_flash", lambda q, *_: q)
    examples = jnp.asarray([[1, 1, 2, 2, 0], [1, 1, 0, 1, 1], [1, 2, 2, 1, 0], [0, 0, 1, 1, 2]])
    q = jnp.ones((4, 5, 1, 8))
    wrong = jnp.isnan(tokamax_gpu.attend(q, q, q, examples))
    assert wrong.all(axis=(1, 2, 3)).tolist() == [False, True, True, False]
    assert wrong.any(axis=(1, 2, 3)).tolist() == [False, True, True, False]


@pytest.mark.device
@pytest.mark.parametrize(
    "dtype, packed",
    [("float32", True), *cases.long(("bfloat16", False), ("float32", False), ("bfloat16", True))],
)
def test_self_attention_as_the_platform_chooses(dtype, packed):
    """cuDNN on a GPU where it takes the operands, splash attention on a TPU, blocks elsewhere."""
    examples = PACKED if packed else np.ones_like(PACKED)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    with jax.set_mesh(mesh):
        attend = functools.partial(attention.self_attention, examples=jnp.asarray(examples))
        attend_and_check(attend, dtype=dtype, groups=2, window=None, examples=examples)


def test_layers_may_have_different_windows():
    """In a scan over layers; one of the windows is wider than the sequence."""
    windows, examples = (50, None, 1000), jnp.asarray(PACKED)
    for kind, window in enumerate(windows):
        attend = functools.partial(
            attention.self_attention, examples=examples, windows=windows, kind=jnp.int32(kind)
        )
        attend_and_check(attend, dtype="float32", groups=2, window=window)


@pytest.mark.parametrize("examples", [PACKED, *cases.long(np.ones_like(PACKED))])
def test_a_mesh_splits_sequences_and_heads(examples):
    """One group of keys for two devices with two heads each; with packed examples and without."""
    given = None if examples is not PACKED else jnp.asarray(examples)
    partition = sharding.partition(("q_proj",))
    with jax.set_mesh(sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])):
        attend = functools.partial(attention.self_attention, examples=given, partition=partition)
        attend_and_check(attend, dtype="float32", groups=1, window=None, examples=examples)


def test_blocks_that_no_query_sees_are_skipped():
    """The first block of keys is that of the example a block begins in, or that of the window."""
    examples = np.repeat([[1, 1, 2, 2, 3, 0]], 4, axis=1).reshape(6, 1, 4)
    first = functools.partial(xla._first, jnp.asarray(examples))
    assert first(24).tolist() == [0, 0, 2, 2, 4, 6]
    assert first(5).tolist() == [0, 0, 2, 2, 4, 6]
    assert xla._first(jnp.ones_like(jnp.asarray(examples)), 5).tolist() == [0, 0, 1, 2, 3, 4]
    assert xla._first(jnp.ones_like(jnp.asarray(examples)), 6).tolist() == [0, 0, 0, 1, 2, 3]


def test_self_attention_never_holds_all_logits():
    """A gradient at 32,768 tokens, whose logits would take 4 GiB for each head."""
    q = jax.ShapeDtypeStruct((1, 32768, 2, 16), jnp.float32)
    examples = jax.ShapeDtypeStruct((1, 32768), jnp.int32)

    def total(q, k, v, examples):
        return attention.self_attention(q, k, v, examples).sum()

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, q, q, examples).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * q.size * 4


def test_cudnn_computes_sequences_of_one_example(monkeypatch):
    """Lowered without a GPU: cuDNN's flash attention, or blocks if sequences are packed."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    q, k = (jax.ShapeDtypeStruct((2, 256, n, 64), jnp.bfloat16) for n in (4, 2))
    examples = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def lowered(*arguments, window=None):
        def total(q, k, v, *examples):
            return cudnn.attend(q, k, v, *examples, window=window).astype(jnp.float32).sum()

        gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        return (
            gradient.trace(*arguments)
            .lower(lowering_platforms=("cuda",))
            .as_text()
            .replace(r"\22", '"')
        )

    alone, packed = lowered(q, k, k), lowered(q, k, k, examples)
    for text in (alone, packed):
        assert "__cudnn$fmhaSoftmaxBackward" in text and '"CAUSAL"' in text
    assert "stablehlo.case" in packed and "stablehlo.while" in packed
    assert "stablehlo.case" not in alone and "stablehlo.while" not in alone
    assert '"sliding_window_length": 50' in lowered(q, k, k, window=50)


def test_the_implementation_suits_the_platform(monkeypatch):
    q = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    for platform, form in {"tpu": splash, "cpu": xla, "gpu": xla, None: xla}.items():
        monkeypatch.setattr(platforms, "platform_here", lambda platform=platform: platform)
        assert attention._form(q, q, q) is form.attend
    monkeypatch.setattr(platforms, "platform_here", lambda: "gpu")
    for form in (cudnn, tokamax_gpu):  # which is preferred
        monkeypatch.setattr(form, "refusal", lambda *_: None)
        assert attention._form(q, q, q) is form.attend
        # cuDNN's has no soft cap.
        capped = xla if form is cudnn else form
        assert attention._form(q, q, q, soft_cap=50.0) is capped.attend


@pytest.mark.parametrize(
    ("kind", "platform"),
    [("cpu", "cpu"), ("TPU v5 lite", "tpu"), ("TPU7x", "tpu"), ("NVIDIA H100 80GB HBM3", "gpu")],
)
def test_the_platform_is_that_of_the_ambient_mesh(monkeypatch, kind, platform):
    mesh = types.SimpleNamespace(abstract_device=types.SimpleNamespace(device_kind=kind))
    assert platforms.platform_here() is None
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert platforms.platform_here() == platform


def test_cudnn_refuses_what_it_cannot_take():
    q = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    assert "float32" in cudnn.refusal(*[q.astype(jnp.float32)] * 3)
    assert "no NVIDIA GPU" in cudnn.refusal(q, q, q)


def test_tokamax_refuses_what_it_cannot_take(monkeypatch):
    q = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    refusal = tokamax_gpu.refusal
    assert "float32" in refusal(*[q.astype(jnp.float32)] * 3)
    assert "width 192" in refusal(*[jnp.zeros((1, 8, 2, 192), jnp.bfloat16)] * 3)
    assert "no NVIDIA GPU" in refusal(q, q, q)
    for capability, refused in ((8.0, True), (8.9, True), (12.0, True), (9.0, False)):
        monkeypatch.setattr(platforms, "compute_capability", lambda found=capability: found)
        monkeypatch.setattr(extras, "require", lambda **_: None)
        assert (str(capability) in (refusal(q, q, q) or "")) is refused
    monkeypatch.undo()
    monkeypatch.setattr(platforms, "compute_capability", lambda: 9.0)
    monkeypatch.setitem(sys.modules, "tokamax", None)
    assert "not installed: tokamax" in refusal(q, q, q)


@pytest.mark.parametrize(("found", "capability"), [("9.0", 9.0), ("10.3", 10.3), ("gfx942", None)])
def test_the_compute_capability_is_that_of_an_nvidia_gpu(found, capability, monkeypatch):
    assert platforms.compute_capability() is None
    device = types.SimpleNamespace(compute_capability=found)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert platforms.compute_capability() == capability


@pytest.mark.device
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu(dtype):
    gate, up, cotangent = (normal(i, 5, 40, dtype=dtype, scale=3) for i in range(3))

    def reference(gate, up):
        gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
        return (gate / (1 + jnp.exp(-gate)) * up).astype(dtype)

    found = value_and_vjp(glu.swiglu, (gate, up), cotangent)
    for a, b in zip(found, value_and_vjp(reference, (gate, up), cotangent), strict=True):
        assert a.dtype == dtype
        close(a, b, dtype)


@pytest.mark.device
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_embedding(dtype):
    table, ids = normal(0, 50, 24, dtype=dtype), np.array([[0, 49, 7], [7, 7, 1]])
    found = jax.jit(embedding.lookup)(table, jnp.asarray(ids))
    np.testing.assert_array_equal(found, np.asarray(table)[ids])


def naive(hidden, head, targets, soft_cap=None):
    logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.where(targets >= 0, each, 0)


@pytest.mark.device
@pytest.mark.parametrize(
    ("sequences", "length", "soft_cap", "dtype"),
    [(2, 600, 9.0, "float32"), (3, 7, None, "bfloat16"), *cases.long(
        (2, 600, 9.0, "bfloat16"), (3, 7, None, "float32"),
        *((*sizes, None, dtype) for sizes in ((600, 2), (2, 600)) for dtype in TOLERANCE))],
)  # fmt: skip
def test_cross_entropy(sequences, length, soft_cap, dtype):
    """Value and gradient, with ignored targets, over several chunks and a part of one."""
    hidden = normal(0, sequences, length, 8, dtype=dtype, scale=4)
    head = normal(1, 8, 50, dtype=dtype)
    table = head.T
    targets = jnp.asarray(np.random.default_rng(2).integers(-20, 50, (sequences, length)))
    weights = normal(3, sequences, length)
    ours, theirs = (
        value_and_vjp(lambda h, f=f: f(h, head, targets, soft_cap=soft_cap), (hidden,), weights)
        for f in (cross_entropy.cross_entropy, naive)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        close(a, b, dtype)
    ours_alone = functools.partial(cross_entropy.cross_entropy, soft_cap=soft_cap)
    value = jax.jit(ours_alone)(hidden, head, targets)
    np.testing.assert_allclose(value, ours[0], rtol=1e-6)
    of_table = functools.partial(ours_alone, transposed=True)
    found = value_and_vjp(lambda h: of_table(h, table, targets), (hidden,), weights)
    for a, b in zip(found, ours, strict=True):
        close(a, b, dtype)


def test_cross_entropy_never_holds_all_logits():
    """With Llama 3's vocabulary, those of 4,096 tokens would take 2 GiB; 512 are held at a time."""
    tokens, vocab = 4096, 128256
    hidden = jax.ShapeDtypeStruct((4, tokens // 4, 16), jnp.float32)
    head = jax.ShapeDtypeStruct((16, vocab), jnp.float32)
    targets = jax.ShapeDtypeStruct((4, tokens // 4), jnp.int32)

    def compiled(function):
        gradient = jax.jit(jax.grad(lambda h, w, t: function(h, w, t).sum()))
        return gradient.lower(hidden, head, targets).compile()

    ours, theirs = compiled(cross_entropy.cross_entropy), compiled(naive)
    assert f"[4,1024,{vocab}]" not in ours.as_text() and f"[4,1024,{vocab}]" in theirs.as_text()
    assert ours.memory_analysis().temp_size_in_bytes < 2.1 * 512 * vocab * 4


@pytest.mark.parametrize(("trained", "chunks"), [(0, 0), (300, 1), (600, 2), (2048, 4)])
def test_logits_are_computed_only_for_trained_tokens(trained, chunks, monkeypatch):
    """The 2,048 tokens are 4 chunks."""
    taken, contract = [], cross_entropy.matmul.contract

    def counted(a, b, *axes):
        jax.debug.callback(taken.append, 1)
        return contract(a, b, *axes)

    monkeypatch.setattr(cross_entropy.matmul, "contract", counted)
    hidden, head = normal(0, 4, 512, 8), normal(1, 8, 50)
    targets = np.full(2048, -100)
    targets[np.random.default_rng(0).permutation(2048)[:trained]] = 7
    targets = jnp.asarray(targets.reshape(4, 512))
    found = jax.jit(lambda h: cross_entropy.cross_entropy(h, head, targets))(hidden)
    jax.effects_barrier()
    assert len(taken) == chunks
    np.testing.assert_allclose(found, naive(hidden, head, targets), rtol=1e-5)


@pytest.mark.device
def test_cross_entropy_of_logits_whose_exponential_overflows():
    value = jax.jit(cross_entropy.cross_entropy)(
        jnp.full((1, 1, 1), 1e4), jnp.array([[1.0, -1.0]]), jnp.zeros((1, 1), jnp.int32)
    )
    assert value == 0


def test_a_trained_vocabulary_projection_is_refused():
    """Otherwise its gradient would be zero, without an error."""
    hidden, targets = jnp.ones((1, 2, 3)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="frozen"):
        jax.grad(lambda head: cross_entropy.cross_entropy(hidden, head, targets).sum())(
            jnp.ones((3, 4))
        )
