"""The cases of int4 products. Their inputs are random; weights are given."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lora_jax.kernels import choice, int4_matmul, partitioning
from lora_jax.kernels import packed as packing
from lora_jax.selftest import case, draws


def int4_product(
    packed: packing.Packed,
    *,
    rows: int,
    dtype: jax.typing.DTypeLike,
    codes: str = "int4",
    layer: int | None = None,
    partition: partitioning.Partition = partitioning.WHOLE,
    backward: bool = False,
) -> case.Case:
    """x · W and, with `backward`, dy · Wᵀ. packed: W, or a stack of which `layer` is one."""
    k, n = packed.q.shape[-2] * 8, packed.q.shape[-1]
    groups = packed.scale.shape[-2]
    how = {"codes": codes, "partition": partition}
    x = jax.ShapeDtypeStruct((rows, k), dtype)
    found = [int4_matmul.kernel_of(x, packed, **how)]
    if backward:
        dy = jax.ShapeDtypeStruct((rows, n), dtype)
        found.append(int4_matmul.kernel_of(dy, packed, **how, transpose=True))
    compared = draws.some(rows)

    def product(packed, x, number, **more):
        index = None if layer is None else (layer + jnp.int32(number)) % len(packed.q)
        return int4_matmul.int4_matmul(x, packed, layer=index, **how, **more)

    def inputs():
        return draws.random(0, (rows, k), dtype), draws.random(1, (rows, n), dtype)

    def compute(packed, given, number):
        x, dy = given
        if not backward:
            return {"y": product(packed, x, number)[compared]}
        y, vjp = jax.vjp(lambda x: product(packed, x, number), x)
        return {"y": y[compared], "dx": vjp(dy)[0][compared]}

    def reference(packed, given, number):
        x, dy = (a[compared].astype(jnp.float32) for a in given)
        y, vjp = jax.vjp(lambda x: product(packed, x, number, implementation="xla"), x)
        return {"y": y, "dx": vjp(dy)[0]} if backward else {"y": y}

    kernel = next((each for each in found if each != choice.XLA), choice.XLA)
    passes = 2 if backward else 1
    num_bytes = jnp.dtype(dtype).itemsize * rows * (k + n)
    stack = "" if layer is None else f" {layer + 1} of {len(packed.q)}"
    return case.Case(
        kernel,
        f"{codes} product" + (" and gradient" if backward else ""),
        f"{jnp.dtype(dtype).name} [{rows}, {k}] × W{stack} [{k}, {n}], groups of {k // groups}, "
        f"{packed.scale.dtype} scales{'' if packed.group_bias is None else ' and bias'}"
        + case.of_mesh(partition),
        packed, inputs, compute, reference,
        flops=2.0 * rows * k * n * passes,
        num_bytes=passes * (case.bytes_of(packed, layer) + num_bytes),
    )  # fmt: skip


def hopper_product(
    turned: packing.Packed,
    stacks: Sequence[packing.Packed],
    *,
    rows: int,
    partition: partitioning.Partition = partitioning.WHOLE,
) -> case.Case:
    """x · W of decoding on Hopper. turned: `stacks`, concatenated, with K minor."""
    layers = len(turned.q)
    widths = [packed.q.shape[-1] for packed in stacks]

    def compute(weights, x, number):
        how = {"layer": jnp.int32(number) % layers, "widths": widths, "partition": partition}
        return {"y": jnp.concatenate(int4_matmul.from_k_minor(x, weights[0], **how), axis=-1)}

    def reference(weights, x, number):
        return _products(x, weights[1], jnp.int32(number) % layers)

    return _decoding(choice.INT4_HOPPER, (turned, stacks), stacks, rows, partition, compute,
                     reference)  # fmt: skip


def joined_products(
    stacks: Sequence[packing.Packed],
    *,
    rows: int,
    partition: partitioning.Partition = partitioning.WHOLE,
) -> case.Case:
    """x · W of the last layer of stacks of weights that decoding joins, in one kernel on a GPU."""
    layers = len(stacks[0].q)
    x = jax.ShapeDtypeStruct((rows, 8 * stacks[0].q.shape[-2]), jnp.bfloat16)
    kernels = {int4_matmul.kernel_of(x, packed, partition=partition) for packed in stacks}

    def compute(stacks, x, number):
        layer = (layers - 1 + jnp.int32(number)) % layers
        found = int4_matmul.joined(x, stacks, layer=layer, partition=partition)
        return {"y": jnp.concatenate(found, axis=-1)}

    def reference(stacks, x, number):
        return _products(x, stacks, (layers - 1 + jnp.int32(number)) % layers)

    kernel = kernels.pop() if len(kernels) == 1 else choice.XLA
    return _decoding(kernel, stacks, stacks, rows, partition, compute, reference)


def _products(x, stacks, layer):
    each = (int4_matmul.int4_matmul(x.astype(jnp.float32), packed, layer=layer,
                                    implementation="xla")
            for packed in stacks)  # fmt: skip
    return {"y": jnp.concatenate([*each], axis=-1)}


def _decoding(kernel, weights, stacks, rows, partition, compute, reference) -> case.Case:
    """Of products with a layer of stacks of weights, computed together."""
    k, n = 8 * stacks[0].q.shape[-2], [packed.q.shape[-1] for packed in stacks]
    return case.Case(
        kernel,
        "int4 product of decoding",
        f"bfloat16 [{rows}, {k}] × W [{k}, {' + '.join(map(str, n))}], "
        f"{stacks[0].scale.dtype} scales" + case.of_mesh(partition),
        weights,
        lambda: draws.random(0, (rows, k), jnp.bfloat16),
        compute,
        reference,
        flops=2.0 * rows * k * sum(n),
        num_bytes=case.bytes_of(stacks, 0) + 2.0 * rows * (k + sum(n)),
    )
