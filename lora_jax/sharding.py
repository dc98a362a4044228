"""One mesh, one table of rules, and the sharding of every array that follows from its path."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax import errors
from lora_jax.kernels import int4_matmul
from lora_jax.models import llama

AXES = ("data", "fsdp", "tensor")
RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
BATCH = ("data", "fsdp")  # a batch is split over both


def parse(text: str | None, num_devices: int) -> dict[str, int]:
    """{"data": 1, "fsdp": 8, "tensor": 1} from "fsdp=8"; axes left out are 1.

    None puts every device on the data axis. Raises: UserError for anything else than axis=size
    pairs whose product is the number of devices.
    """
    if text is None:
        return {"data": num_devices, "fsdp": 1, "tensor": 1}
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
        if not match or match[1] not in AXES or match[1] in sizes or int(match[2]) < 1:
            raise errors.UserError(
                expected="a mesh such as data=1,fsdp=8,tensor=1", found=repr(text), where="--mesh"
            )
        sizes[match[1]] = int(match[2])
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    product = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    if product != num_devices:
        raise errors.UserError(
            expected=f"a mesh of {num_devices} devices, as many as JAX sees",
            found=f"{text} = {product} devices",
            where="--mesh",
            do="choose sizes whose product is the number of devices",
        )
    return sizes


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """A mesh over all devices with the axes data, fsdp, tensor."""
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch(mesh: Mesh) -> NamedSharding:
    """For arrays [micro-batches, B, T]."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH))


def rows(num_rows: int, mesh: Mesh) -> NamedSharding:
    """For arrays [num_rows, T]: split over the devices, or on all of them if that is uneven."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return NamedSharding(mesh, PartitionSpec() if num_rows % shards else PartitionSpec(BATCH))


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The least batch size, from `batch_size` on, that can be dealt out evenly."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-batch_size // shards) * shards


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError when the rows of a batch cannot be dealt out evenly."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shards:
        raise errors.UserError(
            expected=f"a batch size that data × fsdp = {shards} divides",
            found=f"batch size {batch_size}",
            where=f"mesh {dict(mesh.shape)}",
            do=f"--batch-size {round_up(batch_size, mesh)}, or another --mesh",
        )


def of(path: Iterable, ndim: int, mesh: Mesh) -> NamedSharding:
    """Sharding of the array at `path`, e.g. (model, layers, self_attn, q_proj, kernel).

    Packed words and group scales take their kernel's axes; a column scale or a bias its output
    axis. LoRA's A takes the input axis and B the output axis, but never fsdp: they are small, and
    every device needs them whole. What no rule names is replicated.
    """
    names = [str(part) for part in path]
    module = next((name for name in reversed(names) if name in llama.LOGICAL_AXES), None)
    spec = _spec(names[-1], *_mesh_axes(module)) if module else ()
    return NamedSharding(mesh, PartitionSpec(*(None,) * (ndim - len(spec)), *spec))


def input_shards(path: Iterable, mesh: Mesh) -> int:
    """Into how many parts the input axis of the linear layer at `path` is cut."""
    return mesh.shape[_mesh_axes(list(path)[-1])[0]]


def partition(path: Iterable) -> int4_matmul.Partition:
    """How the product with the weight of the linear layer at `path` is dealt out."""
    return int4_matmul.Partition(BATCH, *_mesh_axes(list(path)[-1]), gathered="fsdp")


def _mesh_axes(module: str) -> tuple[str, str]:
    return tuple(RULES[axis] for axis in llama.LOGICAL_AXES[module])


def _spec(leaf: str, axis_in: str, axis_out: str) -> tuple[str | None, ...]:
    tensor_only = {"tensor": "tensor", "fsdp": None}
    return {
        "kernel": (axis_in, axis_out),
        "embedding": (axis_in, axis_out),
        "q": (axis_in, axis_out),
        "scale": (axis_in, axis_out),
        "group_bias": (axis_in, axis_out),
        "column_scale": (None, axis_out),
        "bias": (axis_out,),
        "lora_A": (tensor_only[axis_in], None),
        "lora_B": (None, tensor_only[axis_out]),
    }.get(leaf, ())


def place(tree: Any, mesh: Mesh) -> Any:
    """The arrays of `tree`, nested dicts by path, each where `of` says."""

    def put(path, array):
        names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
        return _put(array, of(names, jnp.ndim(array), mesh))

    return jax.tree_util.tree_map_with_path(put, tree)


def put(tree: Any, where: NamedSharding) -> Any:
    """The host's arrays of `tree`, the same in all processes, on the devices of `where`."""
    return jax.tree.map(lambda array: _put(array, where), tree)


def _put(array: Any, where: NamedSharding) -> jax.Array:
    # For devices of other processes jax.device_put would send the array around, to compare.
    if where.is_fully_addressable or not getattr(array, "is_fully_addressable", True):
        return jax.device_put(array, where)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def gather(tree: Any) -> Any:
    """The arrays of `tree` whole, on the host of every process; all must call it."""
    return multihost_utils.process_allgather(tree, tiled=True)
