"""Second forms of the frozen weights that make one-token steps fast, derived once per generation.

The time of a step with few sequences is the time to read the weights. So each platform gets them in
the layout that it reads fastest, with the weights that share an input (q, k and v; gate and up) in
one product:

  dense    in the compute dtype, one array per layer: on a CPU, XLA does not fuse unpacking into a
           product, and it would first copy a layer out of a stack. [K, N] in float32, in which a
           product of 2 to 32 rows takes 0.75 times as long as with [N, K]; bfloat16 has [N, K],
           with which it is faster by up to 15 %
  k_minor  int4 [L, N, K], for the tensor cores of a Hopper GPU
  joined   the weights as they are, on other GPUs: one kernel for those that share an input
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lora_jax.kernels import choice, int4_matmul, matmul
from lora_jax.kernels import packed as packing
from lora_jax.layers import registry, stack
from lora_jax.models import decoder, llama
from lora_jax.parallel import devices, processes
from lora_jax.quant import formats
from lora_jax.quant import linear as quant_linear

_HOPPER = "9.0"  # compute capability
OF_INT4 = ("k_minor", "joined")
_SHARE = 0.5  # the largest part of the free memory that a second form may take


def choose(model: llama.LlamaForCausalLM, mesh: Mesh) -> str | None:
    """The form that suits the mesh's devices and fits: "dense", "k_minor", "joined", or None."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        return None  # the forms need whole weights
    several = jax.process_count() > 1
    device = mesh.local_devices[0] if several else mesh.devices.flat[0]
    form = best(device)
    if form is None or (form in OF_INT4 and not any(map(_is_int4, _linears(model)))):
        return None
    free = devices.free_bytes(device)
    fits = free is None or num_bytes(model, form) <= _SHARE * free
    return form if processes.broadcast(fits) else None  # all processes must run the same program


def best(device: Any) -> str | None:
    """The form that a jax.Device reads fastest; None: the weights as they are."""
    if device.platform == "gpu":
        hopper = device.compute_capability == _HOPPER
        if hopper and not choice.refusal(choice.INT4_HOPPER):
            return "k_minor"
        return None if choice.refusal(choice.INT4_TENSOR_CORES) else "joined"
    return "dense" if device.platform == "cpu" else None


def derive(model: llama.LlamaForCausalLM, form: str, num_rows: int) -> Any:
    """The arrays of the form, for steps of num_rows sequences on each device; call it under jit.

    "joined" has none.
    """
    if form == "dense":
        dtype = model.model.embed_tokens.embedding.dtype
        return [
            [_dense(linears, index, dtype) for linears in concatenated(model)]
            for index in range(model.config.num_hidden_layers)
        ]
    if form == "joined":
        return ()
    return [k_minor(linears, num_rows) for linears in concatenated(model)]


def forms(
    model: llama.LlamaForCausalLM, form: str, arrays: Any
) -> Sequence[decoder.Forms] | Callable[[jax.Array], decoder.Forms]:
    """The `forms` argument of `model.extend` from what `derive` returned.

    A weight that has no such form, or none for so many sequences, stays as it is.
    """
    together = concatenated(model)
    if form == "dense":
        return [decoder.Forms(*(functools.partial(_products, weight=own, widths=_widths(linears))
                              for own, linears in zip(layer, together, strict=True)))
                for layer in arrays]  # fmt: skip
    if form == "joined":
        each = [join(linears) for linears in together]
    else:
        each = [join(linears) if packed is None else
                functools.partial(int4_matmul.from_k_minor, packed=packed,
                                  widths=_widths(linears), partition=linears[0].partition)
                for packed, linears in zip(arrays, together, strict=True)]  # fmt: skip

    def of(index):
        return decoder.Forms(*(product and functools.partial(product, layer=index)
                             for product in each))  # fmt: skip

    return of


def spread(adapters: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a bank for steps with the dense form: one per layer too; call it under jit."""
    found = dict(adapters)
    if layers := adapters.get("model", {}).get("layers"):
        found["model"] = {**adapters["model"], "layers": stack.unstacked(layers)}
    return found


def concatenated(model: llama.LlamaForCausalLM) -> decoder.Forms:
    """The layers of which each form computes the products together."""
    attention, mlp = model.model.layers.self_attn, model.model.layers.mlp
    return decoder.Forms(
        qkv=attention.qkv,
        o=(attention.o_proj,),
        gate_up=mlp.gate_up,
        down=(mlp.down_proj,),
    )


def num_bytes(model: llama.LlamaForCausalLM, form: str) -> int:
    """Bytes of the form, without its scales."""
    if form == "joined":
        return 0
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
    """Whether the kernels can read this layer's weight and its input."""
    return (
        isinstance(linear, quant_linear.QuantLinear)
        and formats.codes(linear.fmt) == "int4"
        and (linear.dtype or linear.param_dtype) == jnp.bfloat16
    )


def _dense(linears: Sequence, index: int, dtype) -> jax.Array:
    """W [ΣN, K], dense, which concatenates the weights of one layer; in float32 W [K, ΣN]."""

    def weight(linear):
        if isinstance(linear, nnx.Linear):
            return registry.weight_of(linear)[index].astype(dtype)
        packed = packing.layer(linear.packed, index)
        return formats.dequantize(packed, linear.fmt, linear.in_features, dtype)

    each = [weight(linear) for linear in linears]
    if dtype == jnp.float32:
        return jnp.concatenate(each, axis=1)
    return jnp.concatenate([weight.T for weight in each])


def _products(x: jax.Array, weight: jax.Array, widths: Sequence[int]) -> list[jax.Array]:
    """The products of x with what `_dense` returned."""
    axis = 0 if weight.dtype == jnp.float32 else 1
    product = matmul.contract(x.reshape(-1, x.shape[-1]), weight, -1, axis)
    product = product.astype(x.dtype).reshape(*x.shape[:-1], -1)
    return jnp.split(product, [*itertools.accumulate(widths)][:-1], axis=-1)


def _widths(linears: Sequence) -> list[int]:
    return [linear.out_features for linear in linears]


def join(linears: Sequence) -> Callable | None:
    """int4_matmul.joined of the stacked weights; None for one, and for those that it cannot have.

    (x, layer) → the products.
    """
    if len(linears) == 1 or not all(map(_is_int4, linears)):
        return None
    each = [linear.packed for linear in linears]
    if any(packed.order is not None for packed in each):
        return None  # each weight needs its own order of x's features
    return functools.partial(int4_matmul.joined, weights=each, partition=linears[0].partition)


def k_minor(linears: Sequence, num_rows: int, layers: slice = slice(None)) -> packing.Packed | None:
    """The concatenated weights of these layers of the stacks; None if the kernel refuses them."""
    from lora_jax.kernels.int4_matmul import mosaic_gpu  # its imports take a second

    first = linears[0]
    if not all(_is_int4(linear) and linear.fmt == first.fmt for linear in linears):
        return None
    each = [linear.packed for linear in linears]
    kinds = {tuple(a if a is None else a.shape[:-1] for a in packed) for packed in each}
    if len(kinds) > 1 or first.packed.order is not None:
        return None  # different groups, or each weight needs its own order of x's features
    packed = jax.tree.map(
        lambda *parts: jnp.concatenate([part[layers] for part in parts], axis=-1), *each
    )
    _, words, columns = packed.q.shape
    k, groups = 8 * words, packed.scale.shape[-2]
    shape = (num_rows, k, columns, k // groups)
    if mosaic_gpu.refusal(*shape, jnp.bfloat16, packed.scale.dtype):
        return None
    return packed._replace(q=mosaic_gpu.k_minor(packed.q))
