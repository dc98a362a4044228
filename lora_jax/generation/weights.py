"""Second forms of the frozen weights that make one-token steps fast, derived once per generation.

A step of a few rows costs what it takes to read the weights. So they should lie as the platform
reads them best, and siblings (q, k and v; gate and up) side by side:

  dense    [N, K] in the compute dtype, an array a layer: a CPU's products neither unpack nor
           fuse, and would copy a layer out of a stack first
  k_minor  int4 [L, N, K], for the tensor cores of a Hopper GPU
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from lora_jax.kernels import int4_matmul, matmul
from lora_jax.kernels import packed as packing
from lora_jax.models import llama
from lora_jax.parallel import devices, processes
from lora_jax.quant import formats
from lora_jax.quant import linear as quant_linear

_HOPPER = "9.0"  # compute capability
_SHARE = 0.5  # of the free memory that a form may take


def choose(model: llama.LlamaForCausalLM, mesh: Mesh) -> str | None:
    """The form that suits the mesh's devices and fits: "dense", "k_minor", or None for neither."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        return None  # the forms are of whole weights
    several = jax.process_count() > 1
    device = mesh.local_devices[0] if several else mesh.devices.flat[0]
    form = best(device)
    if form is None or (form == "k_minor" and not any(map(_is_int4, _linears(model)))):
        return None
    free = devices.free_bytes(device)
    fits = free is None or num_bytes(model, form) <= _SHARE * free
    return form if processes.told(fits) else None  # all must run the same program


def best(device: Any) -> str | None:
    """The form that a jax.Device reads best; None: the weights as they are."""
    if device.platform == "gpu":
        return "k_minor" if device.compute_capability == _HOPPER else None
    return "dense" if device.platform == "cpu" else None


def derive(
    model: llama.LlamaForCausalLM, form: str, num_rows: int
) -> Sequence[llama.Forms] | Callable[[jax.Array], llama.Forms]:
    """What `model.extend` takes as `forms` for steps of num_rows rows; to be called under jit.

    num_rows: on each device. A weight that has no such form, or not for so many rows, stays as it
    is.
    """
    attention, mlp = model.model.layers.self_attn, model.model.layers.mlp
    siblings = llama.Forms(
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        o=(attention.o_proj,),
        gate_up=(mlp.gate_proj, mlp.up_proj),
        down=(mlp.down_proj,),
    )
    if form == "dense":
        dtype = model.model.embed_tokens.embedding.dtype
        return [
            llama.Forms(*(_dense(linears, index, dtype) for linears in siblings))
            for index in range(model.config.num_hidden_layers)
        ]
    turned = [_k_minor(linears, num_rows) for linears in siblings]

    def forms(index):
        return llama.Forms(*(product and functools.partial(product, layer=index)
                             for product in turned))  # fmt: skip

    return forms


def num_bytes(model: llama.LlamaForCausalLM, form: str) -> int:
    """How much memory the form takes, but for the scales."""
    width = model.model.embed_tokens.embedding.dtype.itemsize if form == "dense" else 0.5
    weights = sum(
        linear.in_features * linear.out_features
        for linear in _linears(model)
        if form == "dense" or _is_int4(linear)
    )
    return int(weights * width * model.config.num_hidden_layers)


def _linears(model: llama.LlamaForCausalLM) -> list[nnx.Linear | quant_linear.QuantLinear]:
    return [node for _, node in nnx.iter_graph(model.model.layers)
            if isinstance(node, nnx.Linear | quant_linear.QuantLinear)]  # fmt: skip


def _is_int4(linear: nnx.Linear | quant_linear.QuantLinear) -> bool:
    """Whether the Hopper kernel reads its weight and takes what it is given."""
    return (
        isinstance(linear, quant_linear.QuantLinear)
        and formats.codes(linear.fmt) == "int4"
        and (linear.dtype or linear.param_dtype) == jnp.bfloat16
    )


def _dense(linears: Sequence, index: int, dtype) -> Callable[[jax.Array], jax.Array]:
    """x → x · Wᵀ with the weights of one layer as one dense W [ΣN, K]."""

    def weight(linear):
        if isinstance(linear, nnx.Linear):
            return linear.kernel[index].astype(dtype)
        packed = packing.layer(linear.packed, index)
        return formats.dequantize(packed, linear.fmt, linear.in_features, dtype)

    whole = jnp.concatenate([weight(linear).T for linear in linears])
    # Otherwise XLA turns it back for each product, in the loop.
    whole = lax.optimization_barrier(whole)
    return lambda x: (
        matmul.contract(x.reshape(-1, x.shape[-1]), whole, -1, 1)
        .astype(x.dtype)
        .reshape(*x.shape[:-1], -1)
    )


def _k_minor(linears: Sequence, num_rows: int) -> Callable[..., jax.Array] | None:
    """(x, layer) → products with the stacked weights side by side, or None if they refuse."""
    from lora_jax.kernels.int4_matmul import mosaic_gpu  # see int4_matmul

    first = linears[0]
    if not all(_is_int4(linear) and linear.fmt == first.fmt for linear in linears):
        return None
    each = [linear.packed for linear in linears]
    kinds = {tuple(a if a is None else a.shape[:-1] for a in packed) for packed in each}
    if len(kinds) > 1 or first.packed.order is not None:
        return None  # not in the same groups, or each wants x in an order of its own
    packed = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *each)
    _, words, columns = packed.q.shape
    k, groups = 8 * words, packed.scale.shape[-2]
    shape = (num_rows, k, columns, k // groups)
    if mosaic_gpu.refusal(*shape, jnp.bfloat16, packed.scale.dtype):
        return None
    packed = packed._replace(q=mosaic_gpu.k_minor(packed.q))
    return functools.partial(int4_matmul.from_k_minor, packed=packed, partition=first.partition)
