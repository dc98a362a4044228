"""The operations that `doctor` checks and times, in the shapes of Llama-3.1-8B."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.generation import weights
from lora_jax.kernels import attention, cross_entropy, embedding, int4_matmul
from lora_jax.kernels import packed as packing
from lora_jax.kernels.attention import dense, xla

_DTYPE = jnp.bfloat16
_GROUP = 32
_DENSE = 2048  # the most tokens whose attention is also computed as one T × T matrix


class Sizes(NamedTuple):
    """matmuls: (d_in, d_out). stack: bytes of weights to cycle through, so that a cache does not
    help. rows: of x, forward and backward. tokens: of a sequence. heads: (heads, groups, width).
    vocabulary: (rows, width)."""

    matmuls: tuple[tuple[int, int], ...]
    stack: float
    rows: tuple[tuple[int, ...], tuple[int, ...]]
    tokens: tuple[int, ...]
    heads: tuple[int, int, int]
    vocabulary: tuple[int, int]


FULL = Sizes(
    matmuls=((4096, 4096), (4096, 14336)),
    stack=400e6,
    rows=((1, 8, 64, 2048), (2048,)),
    tokens=(2048, 8192),
    heads=(32, 8, 128),
    vocabulary=(32000, 4096),
)
SMALL = Sizes(  # for a CPU
    matmuls=((512, 1024),),
    stack=1e6,
    rows=((1, 64), (64,)),
    tokens=(256,),
    heads=(4, 2, 64),
    vocabulary=(4096, 512),
)


class Case(NamedTuple):
    """run and reference take the number of the call and the arguments; reference computes in
    float32. flops and num_bytes: what the operation takes at least."""

    operation: str
    shapes: str
    implementation: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: tuple
    flops: float
    num_bytes: float


def cases(device: jax.Device, sizes: Sizes) -> Iterator[Case]:
    """Made one after the other on the ambient mesh of that device, with random arguments."""
    for shape in sizes.matmuls:
        stack = _weights(*shape, sizes.stack)
        for backward, every in enumerate(sizes.rows):
            for rows in every:
                yield _product(device.platform, stack, rows, backward=bool(backward))
        if weights.best(device) == "k_minor":
            yield from _decoding(stack, sizes.rows[0])
    for tokens in sizes.tokens:
        for packed in (False, True):
            yield _attention(sizes.heads, tokens, packed)
    yield _cross_entropy(max(sizes.rows[0]), *sizes.vocabulary)
    yield _embedding(max(sizes.tokens), *sizes.vocabulary)


def _normal(seed: int, *shape: int) -> jax.Array:
    # By numpy: jax.random would be compiled for each shape.
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(values.astype(_DTYPE))


def _ids(tokens: int, vocabulary: int) -> jax.Array:
    drawn = np.random.default_rng(0).integers(0, vocabulary, (1, tokens), np.int32)
    return jnp.asarray(drawn)


def _num_bytes(*trees: Any) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(trees))


def _float32(*trees: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float32), trees)


def _weights(d_in: int, d_out: int, num_bytes: float) -> packing.Packed:
    """A stack [L, …] of random int4 weights of that many bytes, at least one."""
    layers = max(1, math.ceil(num_bytes / (d_in * d_out / 2)))
    draw = np.random.default_rng(0)
    shape = layers, d_in // 8, d_out
    return packing.Packed(
        jnp.asarray(draw.integers(0, 2**32, shape, np.uint32)),
        jnp.asarray(draw.integers(-127, 128, (layers, d_in // _GROUP, d_out), np.int8)),
        jnp.full((layers, 1, d_out), 1 / (300 * math.sqrt(d_in)), jnp.float32),
    )


def _product(platform: str, stack: packing.Packed, rows: int, *, backward: bool) -> Case:
    layers, words, d_out = stack.q.shape
    width, out = (d_out, 8 * words) if backward else (8 * words, d_out)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), stack)
    x = _normal(1, rows, width)

    def run(number, x, stack):
        product = functools.partial(int4_matmul.int4_matmul, packed=stack, layer=number % layers)
        if not backward:
            return product(x)
        _, derivative = jax.vjp(product, jnp.zeros((rows, out), x.dtype))
        return derivative(x)[0]

    def reference(number, x, stack):
        weight = packing.dequantize(packing.layer(stack, number % layers))
        return x.astype(jnp.float32) @ (weight.T if backward else weight)

    return Case(
        "int4 backward" if backward else "int4", f"{rows} × {width} → {out}",
        int4_matmul.chosen(platform, x, one, transpose=backward),
        run, reference, (x, stack),
        2 * rows * width * out, _num_bytes(stack) / layers + 2 * rows * (width + out),
    )  # fmt: skip


def _decoding(stack: packing.Packed, every: tuple[int, ...]) -> Iterator[Case]:
    """The product with the second form of the weights, which generation uses on Hopper GPUs."""
    from lora_jax.kernels.int4_matmul import mosaic_gpu  # its imports take a second

    turned = stack._replace(q=jax.jit(mosaic_gpu.k_minor)(stack.q))
    for rows in every:
        case = _product("gpu", stack, rows, backward=False)
        x, _ = case.arguments
        columns, k = turned.q.shape[1:]
        refused = mosaic_gpu.refusal(rows, k, columns, _GROUP, x.dtype, stack.scale.dtype)
        if refused:
            continue

        def run(number, x, turned, stack):
            return int4_matmul.from_k_minor(x, turned, layer=number % len(stack.q))

        def reference(number, x, turned, stack, case=case):
            return case.reference(number, x, stack)

        yield case._replace(
            operation="int4 decoding", implementation="mosaic", run=run, reference=reference,
            arguments=(x, turned, stack),
        )  # fmt: skip


def _attention(heads: tuple[int, int, int], tokens: int, packed: bool) -> Case:
    """Forward and backward. Packed: four examples."""
    heads, groups, width = heads
    count = 4 if packed else 1  # examples
    q, k, v = (_normal(n, 1, tokens, h, width) for n, h in enumerate((heads, groups, groups)))
    numbers = jnp.asarray(np.arange(tokens)[None] * count // tokens + 1, jnp.int32)

    def dense_attention(q, k, v, numbers):
        visible = (numbers[:, :, None] == numbers[:, None]) & jnp.tri(tokens, dtype=bool)[None]
        return dense.attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), visible)

    def with_gradients(attend, q, k, v, numbers):
        out, derivative = jax.vjp(lambda *qkv: attend(*qkv, numbers), q, k, v)
        return out, derivative(jnp.cos(out))

    def run(number, q, k, v, numbers):
        return with_gradients(attention.self_attention, q, k, v, numbers if packed else None)

    def reference(number, q, k, v, numbers):
        attend = dense_attention if tokens <= _DENSE else xla.attend
        return with_gradients(attend, *_float32(q, k, v), numbers)

    pairs = count * (tokens // count) ** 2 / 2
    return Case(
        "attention, packed" if packed else "attention", f"{tokens} tokens",
        attention.chosen(q, k, v, packed=packed),
        run, reference, (q, k, v, numbers),
        2 * 7 * pairs * heads * width,  # two products, and five in the derivative
        2 * _num_bytes(q, k, v) + 2 * _num_bytes(q),
    )  # fmt: skip


def _cross_entropy(tokens: int, vocabulary: int, width: int) -> Case:
    """The losses and their gradient."""
    hidden = _normal(0, 1, tokens, width)
    head = _normal(1, width, vocabulary) / math.sqrt(width)
    targets = _ids(tokens, vocabulary)

    def both(losses, hidden):
        each, derivative = jax.vjp(losses, hidden)
        return each, derivative(jnp.ones_like(each))[0]

    def run(number, hidden, head, targets):
        return both(lambda h: cross_entropy.cross_entropy(h, head, targets), hidden)

    def reference(number, hidden, head, targets):
        hidden, head = _float32(hidden, head)
        return both(lambda h: cross_entropy.of_logits(h @ head, targets), hidden)

    return Case(
        "cross-entropy", f"{tokens} × {vocabulary}", "xla", run, reference,
        (hidden, head, targets),
        4 * tokens * width * vocabulary, _num_bytes(head) + 2 * _num_bytes(hidden),
    )  # fmt: skip


def _embedding(tokens: int, vocabulary: int, width: int) -> Case:
    table = _normal(0, vocabulary, width)
    ids = _ids(tokens, vocabulary)

    def run(number, table, ids):
        return embedding.lookup(table, ids)

    def reference(number, table, ids):
        return table.astype(jnp.float32)[ids]

    moved = 2 * tokens * width * table.dtype.itemsize
    return Case("embedding", f"{tokens} × {width}", "xla", run, reference, (table, ids), 0, moved)
