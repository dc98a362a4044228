"""What a job takes before it is started: memory of a device, operations, and what would fit.

An analytic model of the step that XLA compiles, from shapes alone. Its terms are the arrays that
were found in the buffers of compiled steps, not factors fitted to their sums; benchmarks/plan.md
compares the two. `ahead.compiled` asks the compiler itself.

Letters: L layers, N tokens of a device, D hidden, F ffn, V vocab, R lines of a device, T tokens a
line, w bytes of the compute dtype. Sizes are those of one device.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax.kernels import cross_entropy
from lora_jax.kernels import packed as packing
from lora_jax.kernels.attention import xla
from lora_jax.lora import targets
from lora_jax.models import config as model_config
from lora_jax.optim import step as train_step
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips, programs
from lora_jax.quant import formats

_DENSE = "embedding, head, norms, biases"


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

    @property
    def generating(self) -> int:
        """What is held while generating; 0 for a job that does not."""
        return sum(self.resident.values()) + sum(self.generation.values()) if self.generation else 0

    def need(self, step: int | None = None) -> int:
        """The most that a run holds at a time; step: in a train step, where XLA told that."""
        return max(self.total if step is None else step, self.generating)


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

    def bytes(self, *widths: int) -> int:
        """Of arrays [N, width] in the compute dtype."""
        return self.tokens * sum(widths) * self.item


class Resident(NamedTuple):
    """What is there from step to step, and what `memory` needs to know of the weights.

    arrays: bytes by part. weights: of one layer's linear layers, {name: (bytes of its part
    gathered over fsdp, entries)}. adapters: bytes of A and B. copied: bytes of the packed arrays
    that XLA keeps a second time, in an order of its own.
    """

    arrays: dict[str, int]
    weights: dict[str, tuple[int, int]]
    adapters: int
    copied: int


def resident(job: programs.Job, sizes: Mapping[str, int], chip: str) -> Resident:
    """Of one device, whatever the batch; chip: see `memory`.

    Raises: UserError for a mesh that cannot cut the model.
    """
    mesh = sharding.mesh_of(sizes)
    _, trained, frozen, _ = programs.model_parts(job, mesh)
    base = programs.shapes(frozen.base, mesh)
    state = programs.shapes(programs.state(job, trained), mesh)
    _check_cuts((base, state), sizes)
    arrays = {"packed words": 0, "scales": 0, "linear layers": 0, _DENSE: 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        arrays[_part(path)] += local_bytes(leaf)
    adapters = sum(map(local_bytes, jax.tree.leaves(state.lora)))
    arrays["A and B"] = adapters
    arrays["A and B, reference"] = 0 if job.beta is None else adapters
    arrays["their moments"] = sum(map(local_bytes, jax.tree.leaves(state.opt_state)))
    arrays = {name: size for name, size in arrays.items() if size}
    copied = sum(
        _copied(leaf, sizes, chip.split(":")[0])
        for path, leaf in jax.tree_util.tree_leaves_with_path(base)
        if _part(path) in ("packed words", "scales") and leaf.ndim == 3
    )
    return Resident(arrays, _layer_weights(base, job), adapters, copied)


def _copied(packed: jax.ShapeDtypeStruct, sizes: Mapping[str, int], platform: str) -> int:
    """Bytes of the second copy that XLA makes of a stack [L, K, N] before the loop over its layers.

    XLA:GPU turns over what is gathered along the last axis. On a TPU the kernels want whole tiles
    of 8 × 128, and what has none lies otherwise in the arguments.
    """
    layers, rows, columns = packed.sharding.shard_shape(packed.shape)
    if rows == 1:
        return 0
    item = packed.dtype.itemsize
    if platform == "gpu" and sizes["fsdp"] > 1 and packed.sharding.spec[-1:] == ("fsdp",):
        return layers * rows * columns * item
    if platform == "tpu" and sizes["tensor"] > 1 and (rows % 8 or columns % 128):
        return layers * -(-rows // 8) * 8 * -(-columns // 128) * 128 * item
    return 0


def base_bytes(there: Resident) -> int:
    """Of the frozen base alone."""
    adapted = ("A and B", "A and B, reference", "their moments")
    return sum(size for name, size in there.arrays.items() if name not in adapted)


def memory(
    job: programs.Job, sizes: Mapping[str, int], chip: str, there: Resident | None = None
) -> Memory:
    """Bytes of a train step on one device of a mesh; `there` where `resident` was asked already.

    chip: "cpu", or as in targets.PEAKS. Raises: UserError for a mesh that does not divide the
    model or the batch.
    """
    sharding.check_batch(job.batch_size, sharding.mesh_of(sizes))
    there = there or resident(job, sizes, chip)
    platform = chip.split(":")[0]
    dims = _dims(job, sizes, platform)
    batch = 3 * 4 * job.grad_accum * dims.tokens
    kept = {
        # The sum over micro-batches, and this one's.
        "gradients of A and B": 2 * there.adapters,
        f"activations kept (remat {job.remat})": job.architecture.num_hidden_layers
        * kept_by_layer(job, dims),
    }
    if there.copied:
        kept["packed weights, copied"] = there.copied
    return Memory(
        there.arrays | {"batch": batch},
        kept,
        _work(job, dims, there.weights, sizes, platform),
        _generation(job, there, sizes, chip),
    )


def local_bytes(shape: jax.ShapeDtypeStruct) -> int:
    """Of one device's part of an array."""
    return math.prod(shape.sharding.shard_shape(shape.shape)) * shape.dtype.itemsize


def _part(path) -> str:
    names = [str(getattr(part, "key", part)) for part in path]
    if "layers" in names and names[-1] == "kernel":
        return "linear layers"
    if names[-1] == "q":
        return "packed words"
    if names[-1] in packing.Packed._fields:
        return "scales"
    return _DENSE


def _shards(sizes: Mapping[str, int]) -> int:
    return sizes["data"] * sizes["fsdp"]


def _dims(job: programs.Job, sizes: Mapping[str, int], platform: str) -> _Sizes:
    c, split = job.architecture, sizes["tensor"]
    rows = job.batch_size // _shards(sizes)
    return _Sizes(
        rows=rows,
        tokens=rows * job.length,
        width=c.hidden_size,
        ffn=c.intermediate_size // split,
        q=c.num_attention_heads * c.head_dim // split,
        kv=max(1, c.num_key_value_heads // split) * c.head_dim,
        heads=c.num_attention_heads // split,
        vocab=c.vocab_size // split,
        # XLA:CPU computes in float32, and keeps what a scan stacks in it too.
        item=4 if platform == "cpu" else jnp.dtype(job.dtype).itemsize,
    )


def kept_by_layer(job: programs.Job, dims: _Sizes) -> int:
    """Bytes that a layer leaves to its backward pass under the remat policy."""
    carry = dims.bytes(dims.width)
    if job.remat == "full":
        return carry
    gate_up = dims.bytes(2 * dims.ffn)
    if job.remat == "dots":  # every product that a derivative needs
        normaliser = 4 * dims.tokens * dims.heads
        return carry + dims.bytes(2 * dims.q, 2 * dims.kv, dims.width) + normaliser + gate_up
    # Each norm keeps what it normalised, before and after, in float32.
    norms = 4 * 4 * dims.tokens * dims.width
    adapters = _adapter_inputs(job, dims) + _dora_outputs(job, dims)
    return norms + _attention(dims) + gate_up + adapters


def _attention(dims: _Sizes) -> int:
    """What attention's derivative needs: q, k, v, the output, and log Σ exp of logits."""
    return dims.bytes(2 * dims.q, 2 * dims.kv) + 4 * dims.tokens * dims.heads


def _pairs(length: int) -> int:
    """Logits that are computed for a head and a line: of whole blocks, up to the diagonal."""
    size = xla.block_size(length)
    return size**2 * math.comb(-(-length // size) + 1, 2)


def _adapted(job: programs.Job) -> set[str]:
    """Names of the linear layers with an adapter."""
    names = [f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"]
    names += [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]
    chosen = (n for n in names if targets.matches(n, job.lora.targets)
              and not targets.matches(n, job.lora.exclude))  # fmt: skip
    return {name.split(".")[-1] for name in chosen}


def _adapter_inputs(job: programs.Job, dims: _Sizes) -> int:
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


def _dora_outputs(job: programs.Job, dims: _Sizes) -> int:
    """What the gradients of magnitudes need: the output of each adapted layer."""
    if not job.lora.use_dora:
        return 0
    outputs = {"q_proj": dims.q, "k_proj": dims.kv, "v_proj": dims.kv, "o_proj": dims.width,
               "gate_proj": dims.ffn, "up_proj": dims.ffn, "down_proj": dims.width}  # fmt: skip
    return dims.bytes(*(outputs[name] for name in _adapted(job)))


def _layer_weights(base: Any, job: programs.Job) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        names = [str(getattr(part, "key", part)) for part in path]
        name = next((name for name in names if name.endswith("_proj")), None)
        if name is None or "layers" not in names:
            continue
        fsdp = leaf.sharding.mesh.shape["fsdp"] if "fsdp" in leaf.sharding.spec else 1
        size = local_bytes(leaf) * fsdp // job.architecture.num_hidden_layers
        entries = 0
        if names[-1] in ("q", "kernel"):
            each = 8 if leaf.dtype == jnp.uint32 else 1
            entries = size // leaf.dtype.itemsize * each
        before = found.get(name, (0, 0))
        found[name] = before[0] + size, before[1] + entries
    return found


def _check_cuts(tree: Any, sizes: Mapping[str, int]) -> None:
    problems = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        try:
            local_bytes(leaf)
        except ValueError:
            name = ".".join(str(getattr(part, "key", part)) for part in path[1:])
            problems.append(f"{name} {list(leaf.shape)}")
    if problems:
        raise errors.UserError(
            expected="a mesh whose axes divide the model's dimensions",
            found=problems,
            where=f"mesh {dict(sizes)}",
            do="choose smaller tensor or fsdp sizes in --mesh",
        )


def _dequantizes(job: programs.Job, platform: str) -> bool:
    """Whether products are taken with a dense copy of the weight; a TPU's kernel reads words."""
    if job.quant == "none":
        return False
    return platform != "tpu" or formats.codes(job.quant) != "int4"


def _work(
    job: programs.Job,
    dims: _Sizes,
    weights: dict[str, tuple[int, int]],
    sizes: Mapping[str, int],
    platform: str,
) -> dict[str, int]:
    """Bytes that each phase of a step has besides what is resident and kept."""
    mlp = [weights[name] for name in ("gate_proj", "up_proj", "down_proj")]
    gathered = sizes["fsdp"] > 1
    words = sum(size for size, _ in mlp) if gathered or platform != "tpu" else 0
    dense = sum(entries for _, entries in mlp) * dims.item
    if not _dequantizes(job, platform):
        dense = 0
    hidden, gate_up = dims.bytes(dims.width), dims.bytes(2 * dims.ffn)
    kept = kept_by_layer(job, dims)
    # XLA:GPU unpacks the three weights of the MLP at a time.
    forward = kept + hidden + max(words + dense, 2 * dense // 3 + gate_up)
    # d_gate, d_up, d_swiglu beside gate and up; then the residual and its two norms.
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


def _loss(job: programs.Job, dims: _Sizes, sizes: Mapping[str, int]) -> int:
    """Hidden states with their gradient, and a chunk of logits, its normalised, in float32."""
    if targets.matches("lm_head", job.lora.targets):
        chunk = dims.rows * min(train_step.HEAD_CHUNK, job.length)
        return 3 * dims.bytes(dims.width) + 3 * 4 * chunk * dims.vocab
    chunk = cross_entropy.chunk_size(dims.tokens)
    head = dims.width * dims.vocab * dims.item if sizes["fsdp"] > 1 else 0
    return 3 * dims.bytes(dims.width) + 2 * 4 * chunk * dims.vocab + head


def _generation(
    job: programs.Job, there: Resident, sizes: Mapping[str, int], chip: str
) -> dict[str, int]:
    if job.generation is None:
        return {}
    rows, prompt, new = job.generation
    c = job.architecture
    item = jnp.dtype(job.dtype).itemsize
    shape = (c.num_hidden_layers, rows, prompt + new, c.num_key_value_heads, c.head_dim)
    own = sharding.cache(rows, c.num_key_value_heads, sharding.mesh_of(sizes)).shard_shape(shape)
    found = {"KV cache": 2 * math.prod(own) * item}
    entries = sum(entries for _, entries in there.weights.values()) * c.num_hidden_layers
    if sizes["fsdp"] * sizes["tensor"] == 1:  # see decode.choose
        if chip == "cpu":
            found["dense copy of the weights"] = entries * item
        elif chip in ("gpu:h100", "gpu:h200") and job.quant.startswith("int4"):
            found["int4 copy of the weights"] = entries // 2
    return found


def operations(job: programs.Job) -> Operations:
    """What the matrix products of an optimizer step take, recomputation included."""
    c = job.architecture
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    linear = c.hidden_size * (2 * heads + 2 * kv + 2 * c.intermediate_size)
    down = c.hidden_size * c.intermediate_size  # its product is never computed again
    again = job.remat == "full"
    rows = job.batch_size * job.grad_accum
    tokens, layers = rows * job.length, c.num_hidden_layers
    of_pairs = job.beta is not None  # a forward pass more, for the reference
    base = 2 * tokens * layers * ((2 + again + of_pairs) * linear + (2 + of_pairs) * down)
    # q kᵀ and p v; for their derivatives q kᵀ again, and four more.
    products = (9 if again else 7) + 2 * of_pairs
    attended = 2 * rows * layers * heads * _pairs(job.length) * products
    _, trained, _, _ = programs.model_parts(job, sharding.mesh_of(dict.fromkeys(sharding.AXES, 1)))
    adapters = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        names = [str(getattr(part, "key", part)) for part in path]
        in_layers = "layers" in names
        # x A is needed for the gradient of B; (x A) B where what follows is computed again.
        if names[-1] == "lora_A":
            passes = 3 + of_pairs + (in_layers and job.remat != "none")
        elif names[-1] in ("lora_B", "lora_embedding_B"):
            passes = 3 + of_pairs + (in_layers and again and "down_proj" not in names)
        else:  # of a weight trained whole the gradient; the rest is in no product
            passes = int(names[-1] == "kernel")
        adapters += 2 * tokens * leaf.size * passes
    # If all tokens are trained; for DPO the reference's as well.
    head = 2 * (2 + of_pairs) * tokens * c.hidden_size * c.vocab_size
    return Operations(base, adapters, attended, head)


def useful(job: programs.Job) -> int:
    """Operations of an optimizer step that its model asks for, however they are computed.

    What model FLOP/s utilisation counts: nothing that is computed again, the logits of all tokens,
    and of attention's those of each query and the keys up to it. The base's weights have no
    gradient: a token takes 4 and not 6 operations for each.
    Source: Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B.
    """
    once, c = operations(dataclasses.replace(job, remat="none")), job.architecture
    width = c.num_hidden_layers * c.num_attention_heads * c.head_dim
    pairs = job.batch_size * job.grad_accum * math.comb(job.length + 1, 2)
    products = 6 if job.beta is None else 8
    return once.total - once.attention + 2 * products * width * pairs


def bytes_moved(job: programs.Job, sizes: Mapping[str, int], there: Resident, platform: str) -> int:
    """An estimate of what one device reads and writes of its memory in an optimizer step.

    Counted: the linear layers' weights in each pass, and their dense form where it is written; the
    inputs and outputs of their products; the head for each chunk of logits, and the logits; A, B,
    their moments and gradients. Nothing else, and no array that stays in a cache.
    """
    dims = _dims(job, sizes, platform)
    layers = job.architecture.num_hidden_layers
    of_pairs = job.beta is not None
    passes = (3 if job.remat == "full" else 2) + of_pairs
    size = sum(size for size, _ in there.weights.values())
    entries = sum(entries for _, entries in there.weights.values())
    if _dequantizes(job, platform):
        size += 2 * entries * dims.item
    ins_and_outs = 2 * dims.q + 2 * dims.kv + 4 * dims.width + 2 * dims.width + 3 * dims.ffn
    products = dims.bytes(ins_and_outs)
    in_layers = layers * passes * (size + products)
    chunks = -(-dims.tokens // cross_entropy.chunk_size(dims.tokens))
    head = (2 + of_pairs) * chunks * dims.width * dims.vocab * dims.item
    head += (3 + 2 * of_pairs) * 4 * dims.tokens * dims.vocab
    return job.grad_accum * (in_layers + head) + 8 * there.adapters


def communicated(collectives: Mapping[str, Mapping[str, int]]) -> int:
    """Bytes that a device sends, at least: an all-reduce is a reduce-scatter and an all-gather."""
    return sum(
        total["bytes"] * (2 if kind == "all-reduce" else 1) for kind, total in collectives.items()
    )


def floor(
    flops: int,
    moved: int,
    collectives: Mapping[str, Mapping[str, int]] | None,
    target: chips.Target,
) -> Floor:
    """The least time of a step of so many operations (all devices) and bytes (each device).

    At the target's published peaks, one direction of its interconnect, all at the same time.
    """
    peaks = target.peaks
    each_way = chips.INTERCONNECT[target.chip] / 2
    talked = None if collectives is None else communicated(collectives) / each_way
    return Floor(flops / target.count / peaks.flops, moved / peaks.bandwidth, talked)


class Proposals(NamedTuple):
    """The largest jobs that fit, each changed in one way; None: no such job does."""

    batch_size: programs.Job | None
    seq_len: programs.Job | None
    remat: programs.Job | None


HEADROOM = 0.95  # of the memory: what the model may be wrong by


def propose(
    job: programs.Job, sizes: Mapping[str, int], chip: str, limit: float, there: Resident
) -> Proposals:
    """The largest batch, the longest rows, and the policy that recomputes least, of what fits."""

    def fits(changed: programs.Job) -> bool:
        return memory(changed, sizes, chip, there).need() <= HEADROOM * limit

    def largest(
        with_size: Callable[[int], programs.Job], unit: int, most: int
    ) -> programs.Job | None:
        low, high = 0, most // unit  # in units; low fits
        while low < high:
            middle = (low + high + 1) // 2
            if fits(with_size(middle * unit)):
                low = middle
            else:
                high = middle - 1
        return with_size(low * unit) if low else None

    unit = _shards(sizes)
    policies = (dataclasses.replace(job, remat=remat) for remat in reversed(model_config.REMAT))
    context = job.architecture.max_position_embeddings
    return Proposals(
        largest(lambda rows: dataclasses.replace(job, batch_size=rows), unit, 4096 * unit),
        largest(lambda length: _of_length(job, length), min(128, context), context),
        next(filter(fits, policies), None),
    )


def choose_remat(
    job: programs.Job,
    sizes: Mapping[str, int],
    chip: str,
    limit: float | None,
    there: Resident | None = None,
) -> tuple[str, dict[str, int]]:
    """What --remat auto means: the policy that computes least again of those that fit into `limit`.

    With the bytes of each that was tried. The one that takes least where none fits; and where
    nothing is tried, for memory is not known (None), or is a CPU's, which others use too.
    """
    needs: dict[str, int] = {}
    if limit is None or chip == "cpu":
        return model_config.REMAT[0], needs
    there = there or resident(job, sizes, chip)
    for remat in reversed(model_config.REMAT):
        planned = memory(dataclasses.replace(job, remat=remat), sizes, chip, there)
        needs[remat] = planned.need()
        if needs[remat] <= HEADROOM * limit:
            break
    return remat, needs


def _of_length(job: programs.Job, length: int) -> programs.Job:
    """The job with rows of `length` tokens; held-out prompts and answers stay as long as a row."""
    generation = job.generation
    if generation is not None and generation[1:] == (job.seq_len, 0):
        generation = (generation[0], length, 0)
    return dataclasses.replace(job, seq_len=length, generation=generation)


def changes(
    job: programs.Job, sizes: Mapping[str, int], chip: str, limit: float, there: Resident
) -> Iterator[tuple[str, Memory]]:
    """(flags, memory) of ways to make a job fit that does not, from what costs least on."""
    ways: list[tuple[str, programs.Job, Mapping[str, int]]] = []
    if job.remat != "full":
        ways.append(("--remat full", dataclasses.replace(job, remat="full"), sizes))
    smallest = dataclasses.replace(job, batch_size=_shards(sizes), remat="full")
    if smallest != job:
        accumulated = f"--batch-size {_shards(sizes)} --remat full"
        ways.append((accumulated + " (and more --grad-accum)", smallest, sizes))
    stored = job.architecture.quantization  # a quantized checkpoint has but its own format
    for fmt in () if stored else ("int8", "int4", "int4-g128"):
        ways.append((f"--quant {fmt}", dataclasses.replace(job, quant=fmt), sizes))
    length = job.seq_len // 2
    while length >= 128:
        shorter = _of_length(smallest, length)
        flags = f"--seq-len {length} --batch-size {_shards(sizes)} --remat full"
        ways.append((flags, shorter, sizes))
        length //= 2
    for count in (2, 4, 8, 16, 32, 64, 128, 256):
        if count > sizes["fsdp"]:
            spread = {"data": 1, "fsdp": count, "tensor": sizes["tensor"]}
            many = dataclasses.replace(job, batch_size=-(-job.batch_size // count) * count)
            flags = "--mesh " + ",".join(f"{axis}={size}" for axis, size in spread.items())
            if many != job:
                flags += f" --batch-size {many.batch_size}"
            flags += f" on {math.prod(spread.values())} such devices"
            ways.append((flags, many, spread))
    told = set()
    for flags, changed, mesh in ways:
        kind = flags.split()[0]
        if kind in told:
            continue
        then = there
        try:
            if (changed.quant, mesh) != (job.quant, sizes):
                then = resident(changed, mesh, chip)
            found = memory(changed, mesh, chip, then)
        except errors.UserError:  # a mesh that does not divide the model
            continue
        if changed.quant != job.quant and base_bytes(then) >= base_bytes(there):
            continue
        if found.need() <= HEADROOM * limit:
            told.add(kind)
            yield flags, found
