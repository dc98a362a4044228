"""The cases of a model: its own weights, stacks and shardings, at the shapes of a job."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from lora_jax.generation import chunks, steps
from lora_jax.generation import weights as decode_weights
from lora_jax.kernels import choice
from lora_jax.lora.nnx import bank
from lora_jax.models import decoder, llama, modules
from lora_jax.parallel import mesh as sharding
from lora_jax.quant import formats
from lora_jax.quant import linear as quant_linear
from lora_jax.selftest import (
    case,
    decoding,
    int4_products,
    low_rank,
    self_attention,
    vocabulary,
)

_PLACES = 300  # of the cache that attention is checked with
_CAP = 1.0  # of logits that are checked


def training(
    model: llama.LlamaForCausalLM, *, batch: int, length: int, packed: bool
) -> Iterator[case.Case]:
    """What a step with micro-batches [batch, length] computes, forward and backward."""
    yield from _products(model, batch * length, backward=True)
    config = model.config
    dtype = model.model.embed_tokens.embedding.dtype
    for window in dict.fromkeys(config.sliding_windows or (None,)):
        for several in (False, True) if packed else (False,):
            yield self_attention.self_attention(
                batch=batch,
                length=length,
                heads=config.num_attention_heads,
                kv_heads=config.num_key_value_heads,
                width=config.head_dim,
                dtype=dtype,
                packed=several,
                window=window,
                soft_cap=_cap(config.attn_logit_softcapping),
                partition=model.model.layers.self_attn.partition,
            )
    size = {"batch": batch, "length": length}
    table = model.model.embed_tokens
    if type(table) is modules.Embedding:
        yield vocabulary.embedding_lookup(table.embedding[...], **size, partition=table.partition)
    head = model.frozen_head()
    if head is not None:
        partition = sharding.partition(("lm_head",))
        yield vocabulary.vocabulary_loss(
            head.weight, **size, dtype=dtype, partition=partition, transposed=head.transposed,
            soft_cap=_cap(head.soft_cap),
        )  # fmt: skip


def generation(
    model: llama.LlamaForCausalLM, slots: int, kv_dtype: str | None = None, speculate: int = 0
) -> Iterator[case.Case]:
    """What kernels compute with a token of each slot, and with chunks of prompts.

    kv_dtype, speculate: see generation.Engine.
    """
    mesh = jax.sharding.get_abstract_mesh()
    groups = steps.num_groups(slots, mesh)
    own = slots // groups
    guessed = own * (1 + speculate)
    for rows in dict.fromkeys((own, guessed, *chunks.SIZES, own * chunks.common_size(own))):
        for found in _products(model, groups * rows, backward=False):
            if found.kernel != choice.XLA:
                yield found
    form = decode_weights.best(jax.local_devices()[0])
    if form in decode_weights.OF_INT4:
        for linears in decode_weights.concatenated(model):
            turned = _hopper(linears, slots, own) if form == "k_minor" else None
            if found := turned or _joined(linears, slots):
                yield found
    for found in (
        *(_cached_attention(model.model, slots, kv_dtype, tokens)
          for tokens in dict.fromkeys((1, 1 + speculate))),
        *_bank(model, groups, dict.fromkeys((own, guessed, *chunks.SIZES))),
    ):  # fmt: skip
        if found.kernel != choice.XLA:
            yield found


def _products(model: nnx.Module, rows: int, *, backward: bool) -> Iterator[case.Case]:
    """One for each kind of quantized layer, with the last layer of its stack."""
    seen = set()
    for _, layer in nnx.iter_graph(model):
        if not isinstance(layer, quant_linear.QuantLinear) or formats.codes(layer.fmt) == "int8":
            continue
        packed = layer.packed._replace(order=None)
        shapes = tuple(a if a is None else (a.shape, a.dtype) for a in packed)
        kind = (layer.fmt, shapes, layer.partition, layer.dtype, layer.param_dtype)
        if kind in seen:
            continue
        seen.add(kind)
        yield int4_products.int4_product(
            packed,
            rows=rows,
            dtype=layer.dtype or layer.param_dtype,
            codes=formats.codes(layer.fmt),
            layer=len(packed.q) - 1 if packed.q.ndim == 3 else None,
            partition=layer.partition,
            backward=backward,
        )


def _cached_attention(
    model: decoder.LlamaModel, slots: int, kv_dtype: str | None, tokens: int
) -> case.Case:
    c = model.config
    return decoding.cached_attention(
        slots=slots,
        places=_PLACES,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        width=c.head_dim,
        dtype=model.embed_tokens.embedding.dtype,
        kv_dtype=kv_dtype,
        tokens=tokens,
        window=_PLACES // 3 if c.sliding_windows else None,
        soft_cap=_cap(c.attn_logit_softcapping),
        partition=model.layers.self_attn.partition,
    )


def _cap(given: float | None) -> float | None:
    """A soft cap that random inputs reach; None for none."""
    return given and min(given, _CAP)


def _bank(model: nnx.Module, groups: int, each: Iterable[int]) -> Iterator[case.Case]:
    """The products with the bank of each kind of stacked layers, for so many rows in each group."""
    banked = [site for site in bank.find(model) if site.lead]
    slots, rank = bank.size(model) if banked else (0, 0)
    kinds = {
        (site.in_features, site.out_features, bank.dtype_of(site), bank.partition_of(site.module))
        for site in banked
    }
    for k, n, dtype, partition in sorted(kinds, key=str):
        for rows in each:
            yield low_rank.products(
                rows=groups * rows, k=k, n=n, slots=slots, rank=rank, dtype=dtype,
                partition=partition,
            )  # fmt: skip


def _joined(linears: Sequence[Any], rows: int) -> case.Case | None:
    """The products that decoding joins, with the last layer of each stack."""
    if decode_weights.join(linears) is None:
        return None
    found = int4_products.joined_products(
        [linear.packed for linear in linears], rows=rows, partition=linears[0].partition
    )
    return None if found.kernel == choice.XLA else found


def _hopper(linears: Sequence[Any], rows: int, own: int) -> case.Case | None:
    """The product with the last layer of weights that decoding concatenates.

    own: the rows of a device.
    """
    turned = decode_weights.k_minor(linears, own, slice(-1, None))
    if turned is None:
        return None
    last = [jax.tree.map(lambda a: a[-1:], linear.packed) for linear in linears]
    return int4_products.hopper_product(turned, last, rows=rows, partition=linears[0].partition)
