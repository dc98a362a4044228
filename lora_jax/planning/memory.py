"""Bytes that a train step and generation hold on one device.

An analytic model of the step that XLA compiles, from shapes alone. Its terms are the arrays that
were found in the buffers of compiled steps, not factors fitted to their sums; benchmarks/plan.md
compares the two. `programs.compiled` asks the compiler itself.

All sizes are those of one device. Letters: N tokens of a micro-batch, D hidden size, w bytes of the
compute dtype.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from lora_jax.kernels import cross_entropy
from lora_jax.lora import targets, tied_head
from lora_jax.optim import loss as train_loss
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import job as jobs
from lora_jax.planning import resident
from lora_jax.quant import formats

HOPPER = ("gpu:h100", "gpu:h100_pcie", "gpu:h200")
HOPPER_ROWS = 64  # the most of its kernel for decoding
GPU_ROWS = 128  # the most of the kernel that reads words as they are stored


class Memory(NamedTuple):
    """Bytes on one device, by what they hold, in the order in which a table shows them.

    resident: the arrays that stay from step to step. kept: what the forward pass saves for the
    backward pass, in all layers. work: what each phase of a step needs in addition; only the
    largest counts. generation: what generation needs in addition to the resident arrays; it does
    not run during a step.
    """

    resident: dict[str, int]
    kept: dict[str, int]
    work: dict[str, int]
    generation: dict[str, int]

    @property
    def total(self) -> int:
        """Peak bytes of a train step."""
        return sum(self.resident.values()) + sum(self.kept.values()) + max(self.work.values())

    @property
    def generating(self) -> int:
        """Bytes in use during generation; 0 for a job that does not generate."""
        return sum(self.resident.values()) + sum(self.generation.values()) if self.generation else 0

    def need(self, step: int | None = None) -> int:
        """Peak bytes of a run. step: the peak of a train step, if XLA reported it."""
        return max(self.total if step is None else step, self.generating)


class Dims(NamedTuple):
    """The dimensions of one device's part of a micro-batch and of a layer."""

    sequences: int
    tokens: int  # N
    width: int  # D
    ffn: int
    q: int  # heads · head_dim
    kv: int
    heads: int
    vocab: int
    item: int  # w

    def bytes(self, *widths: int) -> int:
        """Bytes of arrays [N, width] in the compute dtype."""
        return self.tokens * sum(widths) * self.item


def memory(
    job: jobs.Job, sizes: Mapping[str, int], chip: str, known: resident.Resident | None = None
) -> Memory:
    """Bytes that the job needs on one device of a mesh of these axis sizes.

    chip: "cpu", or a key of chips.PEAKS. known: what `resident.resident` returned for the job, if
    the caller has it. Raises: UserError for a mesh that does not divide the model or the batch.
    """
    sharding.check_batch(job.batch_size, sharding.mesh_of(sizes))
    known = known or resident.resident(job, sizes, chip)
    platform = chip.split(":")[0]
    dims = dims_of(job, sizes, platform)
    batch = 3 * 4 * job.grad_accum * dims.tokens
    kept = {
        # The sum over micro-batches, and the current one's.
        "gradients of A and B": 2 * known.adapters,
        f"activations kept (remat {job.remat})": job.architecture.num_hidden_layers
        * kept_by_layer(job, dims),
    }
    if known.copied:
        kept["packed weights, copied"] = known.copied
    return Memory(
        known.arrays | {"batch": batch},
        kept,
        _work(job, dims, known.weights, sizes, platform),
        _generation(job, known, sizes, chip),
    )


def dims_of(job: jobs.Job, sizes: Mapping[str, int], platform: str) -> Dims:
    """One device's dimensions, on a mesh of these axis sizes."""
    c, split = job.architecture, sizes["tensor"]
    sequences = job.batch_size // sharding.batch_shards(sizes)
    return Dims(
        sequences=sequences,
        tokens=sequences * job.length,
        width=c.hidden_size,
        ffn=c.intermediate_size // split,
        q=c.num_attention_heads * c.head_dim // split,
        kv=max(1, c.num_key_value_heads // split) * c.head_dim,
        heads=c.num_attention_heads // split,
        vocab=c.vocab_size // split,
        # XLA:CPU computes in float32, and also stacks the results of a scan in float32.
        item=4 if platform == "cpu" else jnp.dtype(job.dtype).itemsize,
    )


def kept_by_layer(job: jobs.Job, dims: Dims) -> int:
    """Bytes that a layer saves for its backward pass under the remat policy."""
    carry = dims.bytes(dims.width)
    if job.remat == "full":
        return carry
    gate_up = dims.bytes(2 * dims.ffn)
    if job.remat == "dots":  # every product that a derivative needs
        normalizer = 4 * dims.tokens * dims.heads
        return carry + dims.bytes(2 * dims.q, 2 * dims.kv, dims.width) + normalizer + gate_up
    adapters = _adapter_inputs(job, dims) + _dora_outputs(job, dims)
    return _norms(job, dims) + _attention(dims) + gate_up + adapters


def _norms(job: jobs.Job, dims: Dims) -> int:
    """Bytes of what the norms of a layer save: their inputs and outputs, in float32."""
    c = job.architecture
    width = dims.width * (4 if c.norms == "both" else 2)
    return 2 * 4 * dims.tokens * (width + (dims.q + dims.kv if c.qk_norm else 0))


def _attention(dims: Dims) -> int:
    """Bytes that attention's derivative needs: q, k, v, the output, and log Σ exp of the logits."""
    return dims.bytes(2 * dims.q, 2 * dims.kv) + 4 * dims.tokens * dims.heads


class Linear(NamedTuple):
    """A linear layer of a transformer layer: its input, which others may share, and its sizes."""

    path: str
    input: str
    width: int
    outputs: int


def _linears(job: jobs.Job, dims: Dims) -> list[Linear]:
    """The linear layers of a transformer layer."""
    width, q, kv, ffn = dims.width, dims.q, dims.kv, dims.ffn
    if job.architecture.fused_projections:
        inward = [Linear("self_attn.qkv_proj", "attention", width, q + 2 * kv),
                  Linear("mlp.gate_up_proj", "mlp", width, 2 * ffn)]  # fmt: skip
    else:
        sizes = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv,
                 "mlp.gate_proj": ffn, "mlp.up_proj": ffn}  # fmt: skip
        inward = [Linear(path, "mlp" if path.startswith("mlp") else "attention", width, outputs)
                  for path, outputs in sizes.items()]  # fmt: skip
    return [*inward, Linear("self_attn.o_proj", "o", q, width),
            Linear("mlp.down_proj", "down", ffn, width)]  # fmt: skip


def _adapted(job: jobs.Job, dims: Dims) -> list[Linear]:
    """The linear layers with an adapter."""
    lora = job.lora
    return [linear for linear in _linears(job, dims)
            if targets.matches(path := f"model.layers.0.{linear.path}", lora.targets)
            and not targets.matches(path, lora.exclude)]  # fmt: skip


def _adapter_inputs(job: jobs.Job, dims: Dims) -> int:
    """Bytes that the gradients of A need: each input once; with dropout, each adapter's own."""
    adapted = _adapted(job, dims)
    if job.lora.dropout:
        widths = [linear.width for linear in adapted]
        return dims.tokens * sum(widths) + dims.bytes(*widths)  # a byte for each mask
    return dims.bytes(*{linear.input: linear.width for linear in adapted}.values())


def _dora_outputs(job: jobs.Job, dims: Dims) -> int:
    """Bytes that the gradients of DoRA's magnitudes need: the output of each adapted layer."""
    if not job.lora.use_dora:
        return 0
    return dims.bytes(*(linear.outputs for linear in _adapted(job, dims)))


def of_mlp(weights: Mapping[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of resident.Resident.weights that an MLP has."""
    names = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
    return [weights[name] for name in names if name in weights]


def dequantizes(job: jobs.Job, platform: str) -> bool:
    """Whether a product first writes a dense copy of the weight; TPU kernels read packed words."""
    if job.quant == "none":
        return False
    return platform != "tpu" or formats.codes(job.quant) != "int4"


def _work(
    job: jobs.Job,
    dims: Dims,
    weights: dict[str, tuple[int, int]],
    sizes: Mapping[str, int],
    platform: str,
) -> dict[str, int]:
    """Bytes that each phase of a step needs in addition to what is resident and kept."""
    mlp = of_mlp(weights)
    gathered = sizes["fsdp"] > 1
    words = sum(size for size, _ in mlp) if gathered or platform != "tpu" else 0
    dense = sum(entries for _, entries in mlp) * dims.item
    if not dequantizes(job, platform):
        dense = 0
    hidden, gate_up = dims.bytes(dims.width), dims.bytes(2 * dims.ffn)
    kept = kept_by_layer(job, dims)
    # XLA:GPU unpacks the three weights of the MLP at the same time.
    forward = kept + hidden + max(words + dense, 2 * dense // 3 + gate_up)
    # d_gate, d_up, d_swiglu, gate and up; then the residual and its two norms.
    backward = 2 * hidden + max(words + dense + hidden, 5 * dims.bytes(dims.ffn))
    if job.remat == "none":
        backward += 4 * dims.tokens * dims.width
    else:
        backward += _attention(dims) + _adapter_inputs(job, dims) + _dora_outputs(job, dims)
    return {
        "a layer, forward": forward,
        "a layer, backward": backward,
        "logits of a chunk": _loss(job, dims, sizes),
    }


def _loss(job: jobs.Job, dims: Dims, sizes: Mapping[str, int]) -> int:
    """Bytes of the hidden states, their gradient, and a chunk of logits and of their gradient.

    Logits are float32. Their gradient has the compute dtype, unless the head is trained.
    """
    if tied_head.trains_head(job.lora, tied=job.architecture.tie_word_embeddings):
        chunk = dims.sequences * min(train_loss.HEAD_CHUNK, job.length)
        return 3 * dims.bytes(dims.width) + 3 * 4 * chunk * dims.vocab
    chunk = cross_entropy.chunk_size(dims.tokens)
    head = dims.width * dims.vocab * dims.item if sizes["fsdp"] > 1 else 0
    return 3 * dims.bytes(dims.width) + (4 + dims.item) * chunk * dims.vocab + head


def _generation(
    job: jobs.Job, known: resident.Resident, sizes: Mapping[str, int], chip: str
) -> dict[str, int]:
    """Bytes of the KV cache, and of the weights' second form for decoding."""
    if job.generation is None:
        return {}
    rows, prompt, new = job.generation
    c = job.architecture
    item = jnp.dtype(job.dtype).itemsize
    shape = (c.num_hidden_layers, rows, c.num_key_value_heads, prompt + new, c.head_dim)
    own = sharding.cache(rows, c.num_key_value_heads, sharding.mesh_of(sizes)).shard_shape(shape)
    found = {"KV cache": 2 * math.prod(own) * item}
    # bias, counts and seen of each token of the vocabulary
    found["sampling state"] = 9 * rows * c.vocab_size
    entries = sum(entries for _, entries in known.weights.values()) * c.num_hidden_layers
    if sizes["fsdp"] * sizes["tensor"] == 1:  # see generation.weights.choose
        form = second_form(entries, job.quant, chip, item)
        if form and not (chip in HOPPER and rows > HOPPER_ROWS):
            kind = "int4" if chip in HOPPER else "dense"
            found[f"{kind} copy of the weights"] = form
    return found


def second_form(entries: int, quant: str, chip: str, item: int) -> int:
    """Bytes of the second form of weights with so many entries, see generation.weights."""
    if chip == "cpu":
        return entries * item
    return entries // 2 if chip in HOPPER and quant.startswith("int4") else 0
