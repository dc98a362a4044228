"""Operations of an optimizer step, the bytes it moves, and the least time both take.

`benchmarks/plan.md` compares the operations with those in compiled steps.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from lora_jax.kernels import cross_entropy
from lora_jax.kernels.attention import xla
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips, memory, resident
from lora_jax.planning import job as jobs


class Operations(NamedTuple):
    """Floating point operations of an optimizer step on all devices; a multiply-add counts as 2."""

    base: int
    lora: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)


class Floor(NamedTuple):
    """The least seconds of an optimizer step that each resource allows on its own."""

    compute: float
    memory: float
    communication: float | None  # None: unknown, because nothing was compiled

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.communication or 0)


def operations(job: jobs.Job) -> Operations:
    """Operations of an optimizer step's matrix products, including recomputation."""
    c = job.architecture
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    linear = c.hidden_size * (2 * heads + 2 * kv + 2 * c.intermediate_size)
    down = c.hidden_size * c.intermediate_size  # its product is never recomputed
    again = job.remat == "full"
    sequences = job.batch_size * job.grad_accum
    tokens, layers = sequences * job.length, c.num_hidden_layers
    of_pairs = job.beta is not None  # one more forward pass, for the reference
    base = 2 * tokens * layers * ((2 + again + of_pairs) * linear + (2 + of_pairs) * down)
    # q kᵀ and p v; their derivatives recompute q kᵀ and take four more products.
    products = (9 if again else 7) + 2 * of_pairs
    attended = 2 * sequences * layers * heads * _pairs(job.length) * products
    _, trained, _, _ = jobs.model_parts(job, sharding.mesh_of(sharding.ONE))
    adapters = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        names = sharding.names(path)
        in_layers = "layers" in names
        # The gradient of B needs x A; recomputing what follows the layer needs (x A) B.
        if names[-1] == "lora_A":
            passes = 3 + of_pairs + (in_layers and job.remat != "none")
        elif names[-1] in ("lora_B", "lora_embedding_B"):
            passes = 3 + of_pairs + (in_layers and again and "down_proj" not in names)
        else:  # the gradient of a fully trained weight; other arrays are in no product
            passes = int(names[-1] == "kernel")
        adapters += 2 * tokens * leaf.size * passes
    # As if all tokens were trained; with DPO, also those of the reference.
    head = 2 * (2 + of_pairs) * tokens * c.hidden_size * c.vocab_size
    return Operations(base, adapters, attended, head)


def useful(job: jobs.Job) -> int:
    """Operations of an optimizer step that the model requires, whatever the implementation.

    Model FLOP/s utilization (MFU) counts these: no recomputation, the logits of all tokens, and
    attention of each query to the keys up to its own position. The base weights have no gradient,
    so each weight takes 4 operations per token, not 6.
    Source: Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B.
    """
    once, c = operations(dataclasses.replace(job, remat="none")), job.architecture
    width = c.num_hidden_layers * c.num_attention_heads * c.head_dim
    pairs = job.batch_size * job.grad_accum * math.comb(job.length + 1, 2)
    products = 6 if job.beta is None else 8
    return once.total - once.attention + 2 * products * width * pairs


def bytes_moved(
    job: jobs.Job, sizes: Mapping[str, int], known: resident.Resident, platform: str
) -> int:
    """An estimate of the bytes that one device reads and writes in an optimizer step.

    It counts the linear layers' weights in each pass, and their dense form where that is written;
    the inputs and outputs of their products; the head for each chunk of logits, and the logits;
    A and B with their moments and gradients. It leaves out everything else, and arrays that stay in
    a cache.
    """
    dims = memory.dims_of(job, sizes, platform)
    layers = job.architecture.num_hidden_layers
    of_pairs = job.beta is not None
    passes = (3 if job.remat == "full" else 2) + of_pairs
    size = sum(size for size, _ in known.weights.values())
    entries = sum(entries for _, entries in known.weights.values())
    if memory.dequantizes(job, platform):
        size += 2 * entries * dims.item
    ins_and_outs = 2 * dims.q + 2 * dims.kv + 4 * dims.width + 2 * dims.width + 3 * dims.ffn
    products = dims.bytes(ins_and_outs)
    in_layers = layers * passes * (size + products)
    chunks = -(-dims.tokens // cross_entropy.chunk_size(dims.tokens))
    head = (2 + of_pairs) * chunks * dims.width * dims.vocab * dims.item
    head += (3 + 2 * of_pairs) * 4 * dims.tokens * dims.vocab
    return job.grad_accum * (in_layers + head) + 8 * known.adapters


def communicated(collectives: Mapping[str, Mapping[str, int]]) -> int:
    """The least bytes that a device sends; an all-reduce is a reduce-scatter and an all-gather."""
    return sum(
        total["bytes"] * (2 if kind == "all-reduce" else 1) for kind, total in collectives.items()
    )


def floor(
    flops: int,
    moved: int,
    collectives: Mapping[str, Mapping[str, int]] | None,
    target: chips.Target,
) -> Floor:
    """The least time of a step with `flops` operations (all devices) and `moved` bytes (each one).

    At the target's published peaks, in one direction of its interconnect, with all three
    overlapping.
    """
    peaks = target.peaks
    each_way = chips.INTERCONNECT[target.chip] / 2
    communication = None if collectives is None else communicated(collectives) / each_way
    return Floor(flops / target.count / peaks.flops, moved / peaks.bandwidth, communication)


def _pairs(length: int) -> int:
    """Logits computed for one head and one sequence: whole blocks, up to the diagonal."""
    size = xla.block_size(length)
    return size**2 * math.comb(-(-length // size) + 1, 2)
