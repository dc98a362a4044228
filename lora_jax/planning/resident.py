"""Bytes of the arrays that stay on a device from step to step: weights, adapters and moments.

`resident` gets them from shapes and shardings alone.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.kernels import packed as packing
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import job as jobs

_DENSE = "embedding, head, norms, biases"


class Resident(NamedTuple):
    """Bytes on one device that do not depend on the batch, and the sizes of a layer's weights.

    arrays: bytes by part. weights: {name: (bytes, entries)} of the linear layers of one
    transformer layer, on one device, after gathering over fsdp. adapters: bytes of A and B. copied:
    bytes of the packed arrays that XLA keeps a second time, in another layout.
    """

    arrays: dict[str, int]
    weights: dict[str, tuple[int, int]]
    adapters: int
    copied: int

    @property
    def base(self) -> dict[str, int]:
        """The arrays of the frozen base alone."""
        adapted = ("A and B", "A and B, reference", "their moments")
        return {name: size for name, size in self.arrays.items() if name not in adapted}


def resident(job: jobs.Job, sizes: Mapping[str, int], chip: str) -> Resident:
    """What stays on one device of a mesh of these axis sizes; the batch size does not matter.

    chip: "cpu", or a key of chips.PEAKS. Raises: UserError for a mesh that does not divide the
    model's dimensions.
    """
    mesh = sharding.mesh_of(sizes)
    _, trained, frozen, _ = jobs.model_parts(job, mesh)
    base = jobs.shapes(frozen.base, mesh)
    state = jobs.shapes(jobs.state(job, trained), mesh)
    _check_divisible((base, state), sizes)
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


def local_bytes(shape: jax.ShapeDtypeStruct) -> int:
    """Bytes of one device's part of an array."""
    return math.prod(shape.sharding.shard_shape(shape.shape)) * shape.dtype.itemsize


def _part(path) -> str:
    """The key of Resident.arrays under which an array of the base is counted."""
    names = sharding.names(path)
    if "layers" in names and names[-1] == "kernel":
        return "linear layers"
    if names[-1] == "q":
        return "packed words"
    if names[-1] in packing.Packed._fields:
        return "scales"
    return _DENSE


def _copied(packed: jax.ShapeDtypeStruct, sizes: Mapping[str, int], platform: str) -> int:
    """Bytes of the second copy that XLA makes of a stack [L, K, N] before the loop over its layers.

    XLA:GPU transposes what is gathered along the last axis. On a TPU the kernels need whole tiles
    of 8 × 128, and an array whose size is not a multiple of them arrives in another layout.
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


def _layer_weights(base: Any, job: jobs.Job) -> dict[str, tuple[int, int]]:
    """See Resident.weights."""
    found: dict[str, tuple[int, int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        names = sharding.names(path)
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


def _check_divisible(tree: Any, sizes: Mapping[str, int]) -> None:
    problems = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        try:
            local_bytes(leaf)
        except ValueError:
            name = ".".join(str(getattr(part, "key", part)) for part in path[1:])
            problems.append(f"{name} {list(leaf.shape)}")
    sharding.refuse_indivisible(problems, sizes)
