"""What a job takes before it is started: memory of a device, operations, and what would fit.

An analytic model of the step that XLA compiles, from shapes alone. Its terms are the arrays that
were found in the buffers of compiled steps, not factors fitted to their sums; benchmarks/plan.md
compares the two. `ahead.compiled` asks the compiler itself.

Letters: L layers, N tokens of a device, D hidden, F ffn, V vocab, R rows of a device, T tokens a
row, w bytes of the compute dtype. Sizes are those of one device.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from lora_jax import ahead, config, decode, formats, sharding, targets
from lora_jax.kernels import attention, cross_entropy

_REMATERIALISED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")  # not down_proj:
# no derivative needs its product


class Memory(NamedTuple):
    """Bytes on one device, by what they hold; insertion order is that of the table.

    resident: what is there from step to step. kept: what a forward pass leaves to the backward
    pass of all layers. work: what each phase of a step has besides, of which the largest counts.
    generation: what generating has besides the resident arrays, which is not during a step.
    """

    resident: dict[str, int]
    kept: dict[str, int]
    work: dict[str, int]
    generation: dict[str, int]

    @property
    def total(self) -> int:
        """The most that a train step holds at a time."""
        return sum(self.resident.values()) + sum(self.kept.values()) + max(self.work.values())


class Operations(NamedTuple):
    """Floating point operations of an optimizer step on all devices, 2 for a multiply and add."""

    base: int
    lora: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)


class Floor(NamedTuple):
    """Least seconds of an optimizer step, by what they would be spent on if all else were free."""

    compute: float
    memory: float
    communication: float | None  # None: not known, for nothing was compiled

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.communication or 0)


class _Sizes(NamedTuple):
    """Of one device's part of a micro-batch and of a layer."""

    rows: int
    tokens: int  # N
    width: int  # D
    ffn: int
    q: int  # heads · head_dim
    kv: int
    heads: int
    vocab: int
    item: int  # w
    pairs: float  # keys that a query meets, summed over the queries of a row
    ends: float  # keys of all parts of the queries, over T

    def bytes(self, *widths: int) -> int:
        """Of arrays [N, width] in the compute dtype."""
        return self.tokens * sum(widths) * self.item

    @property
    def probabilities(self) -> int:
        """Entries of the attention's [R, heads, T, keys]."""
        return int(self.rows * self.heads * self.pairs)


def mesh_of(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh without devices."""
    return AbstractMesh(tuple(sizes[axis] for axis in sharding.AXES), sharding.AXES)


def memory(job: ahead.Job, sizes: Mapping[str, int], platform: str) -> Memory:
    """Bytes of a train step on one device of a "cpu", "gpu" or "tpu" mesh.

    Raises: UserError for a mesh that does not divide the model or the batch.
    """
    mesh = mesh_of(sizes)
    sharding.check_batch(job.batch_size, mesh)
    _, trained, frozen, _ = ahead.model_parts(job, mesh)
    base = ahead.shapes(frozen.base, mesh)
    state = ahead.shapes(ahead.state(job, trained), mesh)
    resident: dict[str, int] = {"packed words": 0, "scales": 0, "linear layers": 0}
    resident["embedding, head, norms, biases"] = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        resident[_part(path)] += local_bytes(leaf)
    adapters = sum(map(local_bytes, jax.tree.leaves(state.lora)))
    resident["A and B"] = adapters
    resident["moments"] = sum(map(local_bytes, jax.tree.leaves(state.opt_state)))
    resident["batch"] = 3 * 4 * job.grad_accum * job.batch_size * job.seq_len // _shards(sizes)
    resident = {name: size for name, size in resident.items() if size}
    dims = _dims(job, sizes)
    layers = job.architecture.num_hidden_layers
    each = kept_by_layer(job, dims)
    kept = {
        # The sum over micro-batches, and this one's.
        "gradients of A and B": 2 * adapters,
        f"kept for the backward pass (remat {job.remat})": layers * each,
    }
    weights = layer_weights(base, layers)
    return Memory(resident, kept, _work(job, dims, weights, sizes, platform), _generation(job, sizes, platform))


def local_bytes(shape: jax.ShapeDtypeStruct) -> int:
    """Of one device's part of an array."""
    return math.prod(shape.sharding.shard_shape(shape.shape)) * shape.dtype.itemsize


def _part(path) -> str:
    names = [str(getattr(part, "key", part)) for part in path]
    if "layers" in names and names[-1] == "kernel":
        return "linear layers"
    if names[-1] == "q":
        return "packed words"
    if names[-1] in ("scale", "column_scale", "group_bias", "nested_scale", "nested_offset"):
        return "scales"
    return "embedding, head, norms, biases"


def _shards(sizes: Mapping[str, int]) -> int:
    return sizes["data"] * sizes["fsdp"]


def _dims(job: ahead.Job, sizes: Mapping[str, int]) -> _Sizes:
    c, split = job.architecture, sizes["tensor"]
    rows = job.batch_size // _shards(sizes)
    parts = attention.parts(job.seq_len, causal=True)
    return _Sizes(
        rows=rows,
        tokens=rows * job.seq_len,
        width=c.hidden_size,
        ffn=c.intermediate_size // split,
        q=c.num_attention_heads * c.head_dim // split,
        kv=max(1, c.num_key_value_heads // split) * c.head_dim,
        heads=c.num_attention_heads // split,
        vocab=c.vocab_size // split,
        item=jnp.dtype(job.dtype).itemsize,
        pairs=sum((end - start) * end for start, end in parts),
        ends=sum(end for _, end in parts) / job.seq_len,
    )


def kept_by_layer(job: ahead.Job, dims: _Sizes) -> int:
    """Bytes that a layer leaves to its backward pass under the remat policy."""
    carry = dims.bytes(dims.width)
    if job.remat == "full":
        return carry
    gate_up = dims.bytes(2 * dims.ffn)
    if job.remat == "dots":  # every product that a derivative needs
        return carry + dims.bytes(dims.q, 2 * dims.kv, dims.width) + gate_up
    # Each norm keeps what it normalised, before and after, in float32.
    norms = 4 * 4 * dims.tokens * dims.width
    return norms + _attention(dims) + gate_up + _adapter_inputs(job, dims)


def _attention(dims: _Sizes) -> int:
    """What attention's derivative needs: probabilities, and q, k, v and the output by parts."""
    return dims.probabilities * dims.item + dims.bytes(2 * dims.q, round(2 * dims.ends * dims.kv))


def _adapted(job: ahead.Job) -> set[str]:
    """Names of the linear layers with an adapter."""
    from lora_jax import lora

    names = [f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"]
    names += [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]
    chosen = (n for n in names if lora.matches(n, job.lora.targets)
              and not lora.matches(n, job.lora.exclude))  # fmt: skip
    return {name.split(".")[-1] for name in chosen}


def _adapter_inputs(job: ahead.Job, dims: _Sizes) -> int:
    """What the gradients of A need: each input once, or with dropout each adapter's own."""
    inputs = {"q_proj": ("attention", dims.width), "k_proj": ("attention", dims.width),
              "v_proj": ("attention", dims.width), "o_proj": ("o", dims.q),
              "gate_proj": ("mlp", dims.width), "up_proj": ("mlp", dims.width),
              "down_proj": ("down", dims.ffn)}  # fmt: skip
    used = [inputs[name] for name in sorted(_adapted(job))]
    if job.lora.dropout:
        masks = dims.tokens * sum(width for _, width in used)  # a byte for each
        return masks + dims.bytes(*(width for _, width in used))
    return dims.bytes(*(width for _, width in set(used)))


def layer_weights(base: Any, layers: int) -> dict[str, tuple[int, int, int]]:
    """{linear layer: bytes (of its part here, of its part gathered over fsdp, dequantised so)}.

    Of one layer; "dequantised" counts the entries, in no dtype yet.
    """
    found: dict[str, list[int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        names = [str(getattr(part, "key", part)) for part in path]
        if "layers" not in names or not any(name.endswith("_proj") for name in names):
            continue
        name = next(name for name in names if name.endswith("_proj"))
        here = local_bytes(leaf) // layers
        spec = [axis for axis in leaf.sharding.spec if axis]
        gathered = here * (leaf.sharding.mesh.shape["fsdp"] if "fsdp" in spec else 1)
        total = found.setdefault(name, [0, 0, 0])
        total[0] += here
        total[1] += gathered
        if names[-1] in ("q", "kernel"):
            total[2] += gathered // leaf.dtype.itemsize * (8 if leaf.dtype == jnp.uint32 else 1)
    return {name: tuple(sizes) for name, sizes in found.items()}


def _work(
    job: ahead.Job,
    dims: _Sizes,
    weights: dict[str, tuple[int, int, int]],
    sizes: Mapping[str, int],
    platform: str,
) -> dict[str, int]:
    """Bytes that each phase of a step has besides what is resident and kept."""
    mlp = [weights[name] for name in ("gate_proj", "up_proj", "down_proj")]
    gathered = sizes["fsdp"] > 1
    words = sum(part[1] for part in mlp) if gathered or platform != "tpu" else 0
    dense = sum(part[2] for part in mlp) * dims.item
    if job.quant == "none" or (platform == "tpu" and formats.codes(job.quant) == "int4"):
        dense = 0  # kernels read the packed words
    hidden, gate_up = dims.bytes(dims.width), dims.bytes(2 * dims.ffn)
    # XLA:GPU takes what attention hides out of the loop over the layers, a byte and a float32 for
    # each logit, and unpacks the three weights of the MLP at a time.
    hoisted = 5 * dims.probabilities if platform == "gpu" else 0
    visible = dims.rows * job.seq_len**2
    kept = kept_by_layer(job, dims)
    forward = hoisted + visible + kept + hidden + max(words + dense, 2 * dense // 3 + gate_up)
    # d_gate, d_up, d_swiglu beside gate and up; then the residual and its two norms.
    backward = visible + 2 * hidden + max(words + dense + hidden, 5 * dims.bytes(dims.ffn))
    if job.remat == "none":
        backward += 4 * dims.tokens * dims.width
    else:
        backward += _attention(dims) + _adapter_inputs(job, dims)
    return {
        "a layer, forward": forward,
        "a layer, backward": backward,
        "logits of a chunk": _loss(job, dims, sizes),
    }


def _loss(job: ahead.Job, dims: _Sizes, sizes: Mapping[str, int]) -> int:
    """Hidden states with their gradient, and a chunk of logits, its normalised, in float32."""
    chunk = dims.rows * cross_entropy.chunk_size(dims.rows, job.seq_len)
    head = dims.width * dims.vocab * dims.item if sizes["fsdp"] > 1 else 0
    return 3 * dims.bytes(dims.width) + 2 * 4 * chunk * dims.vocab + head


def _generation(job: ahead.Job, sizes: Mapping[str, int], platform: str) -> dict[str, int]:
    if job.generation is None:
        return {}
    rows, prompt, new = job.generation
    c = job.architecture
    own = rows if rows % _shards(sizes) else rows // _shards(sizes)
    cache = 2 * c.num_hidden_layers * own * (prompt + new) * c.num_key_value_heads * c.head_dim
    return {"KV cache": cache * jnp.dtype(job.dtype).itemsize}
