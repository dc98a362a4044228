"""Bytes that `generation.Engine` holds on one device, and the tokens/s that its chip allows.

From shapes alone; all sizes are those of one device. `programs.compiled` asks the compiler for the
temporaries of "decode" and "prefill".
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.generation import chunks, steps
from lora_jax.lora import config, targets
from lora_jax.models import config as model_config
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips, memory, resident, serving
from lora_jax.planning import job as jobs

HEADROOM = 0.95  # share of the memory to plan for; the rest covers the model's error
_MOST_SLOTS = 1 << 16


class Memory(NamedTuple):
    """resident: the arrays that stay. work: the temporaries of each program; the largest counts."""

    resident: dict[str, int]
    work: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.resident.values()) + max(self.work.values())


class Known(NamedTuple):
    """What does not depend on slots and context: bytes of arrays, and of a layer's MLP weights.

    arrays: by part. form: of the weights' second form. streamed: what a decode step reads of the
    weights. words, dense: packed, and in the compute dtype.
    """

    arrays: dict[str, int]
    form: int
    streamed: int
    words: int
    dense: int
    entries: int


def known(job: serving.Serving, sizes: Mapping[str, int], chip: str) -> Known:
    """chip: as in memory.memory. Raises: UserError for a mesh that does not divide the model."""
    lora = config.LoRAConfig(targets=targets.ALL_LINEAR)  # which the base does not depend on
    of_weights = jobs.Job(job.architecture, job.dtype, job.quant, lora)
    found = resident.resident(of_weights, sizes, chip)
    arrays = found.base
    c, item = job.architecture, jnp.dtype(job.dtype).itemsize
    entries = sum(entries for _, entries in found.weights.values()) * c.num_hidden_layers
    if job.adapters:
        shapes = serving.shapes(job, sharding.mesh_of(sizes), form=None)
        bank = jax.tree.leaves(shapes.weights.adapters)
        arrays["bank of adapters"] = sum(map(resident.local_bytes, bank))
    form = 0
    if sizes["fsdp"] * sizes["tensor"] == 1:  # see generation.weights.choose
        form = memory.second_form(entries, job.quant, chip, item)
        if form and chip in memory.HOPPER:
            form += arrays["scales"]  # side by side, as the words
    mlp = memory.of_mlp(found.weights)
    head = c.hidden_size * c.vocab_size * item // sizes["tensor"]
    layers = sum(size for size, _ in found.weights.values()) * c.num_hidden_layers
    streamed = head + arrays.get("bank of adapters", 0)
    streamed += form if form and chip == "cpu" else layers
    return Known(
        arrays, form, streamed, sum(size for size, _ in mlp),
        sum(entries for _, entries in mlp) * item, entries,
    )  # fmt: skip


def of(job: serving.Serving, sizes: Mapping[str, int], chip: str, own: Known) -> Memory:
    """The memory of the engine. own: what `known` returned for it."""
    c, platform = job.architecture, chip.split(":")[0]
    item = 4 if platform == "cpu" else jnp.dtype(job.dtype).itemsize
    groups = steps.num_groups(job.slots, sharding.mesh_of(sizes))
    rows = job.slots // groups
    places = chunks.spans_of(c, job.context).size
    width = _kv_heads(c, sizes) * c.head_dim
    found = dict(own.arrays)
    hopper = chip in memory.HOPPER
    if own.form and not (hopper and rows > memory.HOPPER_ROWS):
        name = "int4" if hopper else "dense"
        found[f"{name} copy of the weights"] = own.form
    found["KV cache"] = rows * places * _bytes_of_place(job, sizes)
    # bias, counts and seen of each token of the vocabulary, whole on every device
    found["sampling state"] = 9 * job.slots * c.vocab_size
    span = min(job.span or places, places)
    logits = 4 * job.slots * c.vocab_size // sizes["tensor"]
    layer = 2 * span * width * item  # keys and values of a layer and a sequence
    heads = c.num_attention_heads // sizes["tensor"]
    in_kernel = platform == "tpu" and own.form == 0
    unpacked = 0 if in_kernel or job.quant == "none" else own.words + own.dense
    decode = max(3 * logits, 0 if platform == "tpu" else rows * layer)
    has_form = f"{'int4' if hopper else 'dense'} copy of the weights" in found
    reads_words = job.quant.startswith("int4") and item == 2 and rows <= memory.GPU_ROWS
    if unpacked and not has_form and not (platform == "gpu" and reads_words):
        decode += unpacked if rows > 1 else own.words
    tokens = min(serving.CHUNK, job.context)
    most = max(tokens, rows * chunks.common_size(rows))  # short prompts, in all slots at once
    activations = most * 2 * (c.intermediate_size // sizes["tensor"]) * item
    attention = tokens * span * heads * (4 + item) if platform != "tpu" else 4 * tokens * span
    if platform == "cpu":
        unpacked = 0 if own.form else own.dense
    prefill = unpacked + activations + attention
    return Memory(found, {"decode": decode, f"prefill of {tokens} tokens": prefill})


def most_slots(
    job: serving.Serving, sizes: Mapping[str, int], chip: str, limit: float, own: Known
) -> int:
    """The most slots of this context that fit; 0: none do."""
    unit = sharding.batch_shards(sizes)
    return unit * _largest(
        lambda count: _fits(dataclasses.replace(job, slots=unit * count), sizes, chip, limit, own),
        _MOST_SLOTS // unit,
    )


def longest_context(
    job: serving.Serving, sizes: Mapping[str, int], chip: str, limit: float, own: Known
) -> int:
    """The longest context that fits, in multiples of 128 or whole; 0: none does."""
    whole = job.architecture.context
    if _fits(dataclasses.replace(job, context=whole), sizes, chip, limit, own):
        return whole
    return 128 * _largest(
        lambda count: _fits(dataclasses.replace(job, context=128 * count), sizes, chip, limit, own),
        whole // 128,
    )


def tokens_per_second(
    job: serving.Serving, sizes: Mapping[str, int], target: chips.Target, own: Known, live: int
) -> float:
    """An upper bound: all slots decode, each with `live` tokens, at the chip's published peaks.

    A step takes max(weights / bandwidth, operations / peak) + keys and values / bandwidth.
    """
    c, peaks = job.architecture, target.peaks
    groups = steps.num_groups(job.slots, sharding.mesh_of(sizes))
    rows = job.slots // groups
    item = jnp.dtype(job.dtype).itemsize
    cache = rows * min(live, chunks.spans_of(c, job.context).size) * _bytes_of_place(job, sizes)
    entries = own.entries + c.hidden_size * c.vocab_size // sizes["tensor"]
    entries += own.arrays.get("bank of adapters", 0) // item
    seconds = max(own.streamed / peaks.bandwidth, 2 * rows * entries / peaks.flops)
    return job.slots / (seconds + cache / peaks.bandwidth)


def _kv_heads(c: model_config.LlamaConfig, sizes: Mapping[str, int]) -> int:
    """On each device; they are not split if the mesh does not divide them."""
    uneven = c.num_key_value_heads % sizes["tensor"]
    return c.num_key_value_heads if uneven else c.num_key_value_heads // sizes["tensor"]


def _bytes_of_place(job: serving.Serving, sizes: Mapping[str, int]) -> int:
    """Bytes of the keys and values of a token, in all layers; in int8 with their scales."""
    c = job.architecture
    head = c.head_dim * jnp.dtype(job.kv_dtype or job.dtype).itemsize
    head += 0 if job.kv_dtype is None else 4
    return 2 * c.num_hidden_layers * _kv_heads(c, sizes) * head


def _fits(job, sizes, chip, limit, own) -> bool:
    return of(job, sizes, chip, own).total <= HEADROOM * limit


def _largest(fits: Callable[[int], bool], most: int) -> int:
    low, high = 0, most
    while low < high:
        middle = math.ceil((low + high) / 2)
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
