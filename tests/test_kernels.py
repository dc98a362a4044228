"""Attention, the gated activation and the cross-entropy against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.kernels import attention, cross_entropy, swiglu

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "heads", "groups"),
    [(300, 300, 4, 2), (130, 130, 2, 2), (1, 40, 4, 2), (1, 40, 2, 2), (3, 40, 6, 1)],
)
def test_attention(num_queries, num_keys, heads, groups, dtype):
    """Self-attention in parts, and steps with a cache, whose key mask hides some rows' starts."""
    causal = num_queries == num_keys
    q, k, v = (
        normal(i, 2, length, n, 16, dtype=dtype)
        for i, (length, n) in enumerate(
            [(num_queries, heads), (num_keys, groups), (num_keys, groups)]
        )
    )
    # In the second row the first keys are padding: some queries see nothing at all.
    real = np.arange(num_keys)[None] >= np.array([[0], [7]])
    first = 0 if causal else 20
    seen = np.arange(num_keys)[None] <= first + np.arange(num_queries)[:, None]
    visible = jnp.asarray(seen[None] & real[:, None])
    blind = ~np.asarray(visible).any(axis=-1)
    cotangent = normal(9, 2, num_queries, heads, 16, dtype=dtype)

    def reference(q, k, v):
        wide = (a.astype(jnp.float32) for a in (q, k, v))
        return jax.nn.dot_product_attention(*wide, mask=visible[:, None]).astype(dtype)

    ours = functools.partial(attention.attention, visible=visible, causal=causal)
    # A blind query's gradient to itself is none, and what it gets is defined up to its part only.
    d_q = value_and_vjp(ours, (q, k, v), cotangent)[1]
    assert not np.asarray(d_q, np.float32)[blind].any()
    cotangent = jnp.asarray(np.where(blind[..., None, None], 0, cotangent), dtype)
    found = value_and_vjp(ours, (q, k, v), cotangent)
    expected = value_and_vjp(reference, (q, k, v), cotangent)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == dtype
        if index == 0:
            a, b = (np.where(blind[..., None, None], 0, np.asarray(y, np.float32)) for y in (a, b))
        close(a, b, dtype)


def test_causal_attention_never_holds_all_logits():
    """Of 1024 × 1024 logits for each head only an eighth of the queries' exist at a time."""
    q = jnp.zeros((1, 1024, 2, 16))
    visible = jnp.tril(jnp.ones((1, 1024, 1024), bool))

    def text(causal):
        function = functools.partial(attention.attention, causal=causal)
        return jax.jit(function).lower(q, q, q, visible).compile().as_text()

    assert "f32[1,2,1024,1024]" not in text(True) and "f32[1,2,1024,1024]" in text(False)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu(dtype):
    gate, up, cotangent = (normal(i, 5, 40, dtype=dtype, scale=3) for i in range(3))

    def reference(gate, up):
        gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
        return (gate / (1 + jnp.exp(-gate)) * up).astype(dtype)

    found = value_and_vjp(swiglu.swiglu, (gate, up), cotangent)
    for a, b in zip(found, value_and_vjp(reference, (gate, up), cotangent), strict=True):
        assert a.dtype == dtype
        close(a, b, dtype)


def naive(hidden, head, targets):
    logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.where(targets >= 0, each, 0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "length"), [(2, 600), (3, 7), (600, 2)])
def test_cross_entropy(rows, length, dtype):
    """Value and gradient, with ignored targets, over several chunks and a part of one."""
    hidden = normal(0, rows, length, 8, dtype=dtype, scale=4)
    head = normal(1, 8, 50, dtype=dtype)
    targets = jnp.asarray(np.random.default_rng(2).integers(-20, 50, (rows, length)))
    weights = normal(3, rows, length)
    ours, theirs = (
        value_and_vjp(lambda h, f=f: f(h, head, targets), (hidden,), weights)
        for f in (cross_entropy.cross_entropy, naive)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        close(a, b, dtype)
    value = jax.jit(cross_entropy.cross_entropy)(hidden, head, targets)
    np.testing.assert_allclose(value, ours[0], rtol=1e-6)


def test_cross_entropy_never_holds_all_logits():
    hidden, head = jnp.zeros((4, 512, 8)), jnp.zeros((8, 64))
    targets = jnp.zeros((4, 512), jnp.int32)

    def text(function):
        gradient = jax.jit(jax.grad(lambda h: function(h, head, targets).sum()))
        return gradient.lower(hidden).compile().as_text()

    assert "[4,512,64]" not in text(cross_entropy.cross_entropy) and "[4,512,64]" in text(naive)


def test_cross_entropy_of_logits_beyond_exp():
    value = cross_entropy.cross_entropy(
        jnp.full((1, 1, 1), 1e4), jnp.array([[1.0, -1.0]]), jnp.zeros((1, 1), jnp.int32)
    )
    assert value == 0


def test_a_trained_vocabulary_projection_is_refused():
    """Its gradient would silently be zero."""
    hidden, targets = jnp.ones((1, 2, 3)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="frozen"):
        jax.grad(lambda head: cross_entropy.cross_entropy(hidden, head, targets).sum())(
            jnp.ones((3, 4))
        )
