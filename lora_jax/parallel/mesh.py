"""The mesh, the sharding rules, and the sharding of every array, which follows from its path."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax import errors
from lora_jax.kernels import partitioning
from lora_jax.models import decoder, llama, modules
from lora_jax.parallel import axes, devices, processes
from lora_jax.quant import linear as quant_linear

AXES = axes.NAMES
ONE = dict.fromkeys(AXES, 1)  # the sizes of a mesh of one device
RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
BATCH = ("data", "fsdp")  # a batch is split over both


def parse(text: str, num_devices: int) -> dict[str, int]:
    """{"data": 1, "fsdp": 8, "tensor": 1} from "fsdp=8" or "fsdp=-1"; axes left out are 1.

    One size may be −1: then the product of all sizes becomes the number of devices. Raises:
    UserError unless the text has axis=size pairs whose product is that number.
    """
    sizes = dict.fromkeys(AXES, 1) | axes.sizes(text)
    product = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis in AXES if sizes[axis] == -1]
    if len(free) == 1 and num_devices % product == 0:
        sizes[free[0]] = num_devices // product
    elif free or product != num_devices:
        raise errors.UserError(
            expected=f"a mesh of the {num_devices} devices that JAX sees",
            found=f"{text} = {'a multiple of ' if free else ''}{product} devices",
            where="--mesh",
            do="choose sizes whose product is the number of devices, or -1 for one of them",
        )
    return sizes


def default(num_devices: int, base_bytes: int, device_bytes: int | None) -> dict[str, int]:
    """All devices on the data axis if the base fits on each, else as few as possible on fsdp.

    base_bytes: of the frozen base. device_bytes: memory of one device; None: unknown. The base may
    take half of it; the rest is for the computation.
    """
    powers = [2**n for n in range(num_devices.bit_length()) if num_devices % 2**n == 0]
    fits = (fsdp for fsdp in powers if not device_bytes or 2 * base_bytes <= fsdp * device_bytes)
    fsdp = next(fits, powers[-1])  # powers of two divide a model's dimensions
    return {"data": num_devices // fsdp, "fsdp": fsdp, "tensor": 1}


def choose(text: str | None, base_bytes: int) -> Mesh:
    """The mesh of the flag --mesh, else the default for a base of base_bytes."""
    count = jax.device_count()
    memory = devices.memory_bytes(jax.local_devices()[0])
    # Hosts may report different amounts of memory.
    sizes = parse(text, count) if text else processes.broadcast(default(count, base_bytes, memory))
    return make_mesh(sizes)


def make_mesh(sizes: dict[str, int], among: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor over the first devices of `among` (default: all).

    Neighbors on the last axes are neighbors in the machine, as far as its network allows.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    used = (jax.devices() if among is None else among)[: math.prod(shape)]
    arranged = mesh_utils.create_device_mesh(shape, used, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh without devices."""
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)


def batch(mesh: Mesh) -> NamedSharding:
    """For arrays [micro-batches, B, T]."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH))


def cache(num_rows: int, num_heads: int, mesh: Mesh | AbstractMesh) -> NamedSharding:
    """For keys and values [L, B, K, S, H]: B as `rows`, K over tensor; unsplit if uneven."""
    heads = None if num_heads % mesh.shape["tensor"] else "tensor"
    (split,) = rows(num_rows, mesh).spec or (None,)
    return NamedSharding(mesh, PartitionSpec(None, split, heads))


def batch_shards(sizes: Mapping[str, int]) -> int:
    """The number of parts into which a mesh of these axis sizes splits a batch."""
    return math.prod(sizes[axis] for axis in BATCH)


def rows(num_rows: int, mesh: Mesh | AbstractMesh) -> NamedSharding:
    """For arrays [num_rows, T]: split over data and fsdp, or replicated if that is uneven."""
    is_uneven = num_rows % batch_shards(mesh.shape)
    return NamedSharding(mesh, PartitionSpec() if is_uneven else PartitionSpec(BATCH))


def round_up(batch_size: int, mesh: Mesh | AbstractMesh) -> int:
    """The smallest batch size ≥ batch_size that can be split evenly."""
    shards = batch_shards(mesh.shape)
    return -(-batch_size // shards) * shards


def check_batch(
    batch_size: int, mesh: Mesh | AbstractMesh, sequences_per_step: int | None = None
) -> None:
    """Raises UserError if the sequences of a batch cannot be split evenly.

    sequences_per_step: batch size × accumulation, if the advice must not change it.
    """
    shards = batch_shards(mesh.shape)
    if batch_size % shards:
        flags = f"--batch-size {round_up(batch_size, mesh)}, or "
        if total := sequences_per_step:
            fits = [n for n in range(shards, total + 1, shards) if total % n == 0]
            size = min(fits, key=lambda n: abs(n - batch_size), default=0)
            flags = size and f"--batch-size {size} --grad-accum {total // size}, or "
        raise errors.UserError(
            expected=f"a batch size that data × fsdp = {shards} divides",
            found=f"batch size {batch_size}",
            where=f"mesh {dict(mesh.shape)}",
            do=f"{flags or ''}another --mesh",
        )


def sum_over_data(function: Callable, *, num_whole: int) -> Callable:
    """Σ function(*whole, *batches) over the parts into which the data axis splits the batches.

    The first num_whole arguments are not split over data; the others are arrays [micro-batches, B,
    …]. The sum is one all-reduce at the end. The compiler would sum a gradient for every layer of
    every micro-batch. The other axes of the mesh are left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get("data", 1) == 1:
        return function

    def each(*arguments):
        return jax.lax.psum(function(*arguments), "data")

    def summed(*arguments):
        num_split = len(arguments) - num_whole
        return jax.shard_map(
            each,
            in_specs=(PartitionSpec(),) * num_whole + (PartitionSpec(None, "data"),) * num_split,
            out_specs=PartitionSpec(),
            # Axes of size 1 too, so that with data alone nothing is left to the compiler.
            axis_names={"data"} | {axis for axis, size in mesh.shape.items() if size == 1},
            check_vma=False,
        )(*arguments)

    return summed


def of(path: Iterable, ndim: int, mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of the array at `path`, e.g. (model, layers, self_attn, q_proj, kernel).

    Packed words and group scales have their kernel's axes; column scales and biases its output
    axis. LoRA's A has the input axis and B the output axis, but never fsdp: they are small, and
    every device needs them whole. The A and B of a bank, which are not, have fsdp too. Arrays
    without a rule are replicated. Mesh axes of size 1 are left out: on one device, arrays of one
    shape have one sharding, and share the programs that load them.
    """
    names = [str(part) for part in path]
    module = next((name for name in reversed(names) if name in llama.LOGICAL_AXES), None)
    spec = _spec(names[-1], *_mesh_axes(module)) if module else ()
    spec = [axis if axis and mesh.shape[axis] > 1 else None for axis in spec]
    return NamedSharding(mesh, PartitionSpec(*(None,) * (ndim - len(spec)), *spec))


def refuse_indivisible(problems: Sequence[str], sizes: Mapping[str, int]) -> None:
    """Raises UserError if there are axes that the mesh does not divide. sizes: of the mesh."""
    if problems:
        raise errors.UserError(
            expected="a mesh whose axes divide the model's dimensions",
            found=problems,
            where=f"mesh {dict(sizes)}",
            do="choose smaller tensor or fsdp sizes in --mesh",
        )


def input_shards(path: Iterable, mesh: Mesh | AbstractMesh) -> int:
    """The number of parts into which the input axis of the linear layer at `path` is split."""
    return mesh.shape[_mesh_axes(list(path)[-1])[0]]


def set_partitions(model: nnx.Module) -> None:
    """Sets `partition` on the layers that split their own product, or a bank's, over the mesh."""
    for path, layer in nnx.iter_graph(model):
        if isinstance(layer, quant_linear.QuantLinear | nnx.Linear | modules.Embedding):
            layer.partition = partition(path)
        elif isinstance(layer, decoder.LlamaAttention):
            layer.partition = partition(("q_proj",))


def partition(path: Sequence) -> partitioning.Partition:
    """The mesh axes that split the product of the linear layer or embedding at `path`."""
    return partitioning.Partition(BATCH, *_mesh_axes(path[-1]), gathered="fsdp")


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
        "lora_magnitude_vector": (tensor_only[axis_out],),
        "lora_bias": (tensor_only[axis_out],),
        "bank_A": (axis_in, None),
        "bank_B": (None, axis_out),
        "bank_stretch": (None, axis_out),
    }.get(leaf, ())


def place(tree: Any, mesh: Mesh) -> Any:
    """The arrays of `tree`, nested dicts by path, each placed with the sharding of `of`."""

    return jax.tree_util.tree_map_with_path(
        lambda path, array: _put(array, of(names(path), jnp.ndim(array), mesh)), tree
    )


def keep_placed(tree: Any) -> Any:
    """`tree` in a jitted function, with the shardings of `place` on the ambient mesh, if any.

    The compiler would choose other shardings for some results, and a function that takes its own
    results, such as a training step, would be compiled again for them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, array: jax.lax.with_sharding_constraint(
            array, of(names(path), array.ndim, mesh)
        ),
        tree,
    )


def names(path: Iterable) -> list[str]:
    """The names in a path of jax.tree_util."""
    return [str(getattr(part, "key", getattr(part, "name", part))) for part in path]


def put(tree: Any, where: NamedSharding) -> Any:
    """The host arrays of `tree`, equal in all processes, placed with the sharding `where`."""
    return jax.tree.map(lambda array: _put(array, where), tree)


def _put(array: Any, where: NamedSharding) -> jax.Array:
    # With devices of other processes, jax.device_put would send the array to them to compare it.
    if where.is_fully_addressable or not getattr(array, "is_fully_addressable", True):
        return jax.device_put(array, where)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def gather(tree: Any) -> Any:
    """The whole arrays of `tree`, on the host of every process; all processes must call it."""
    return multihost_utils.process_allgather(tree, tiled=True)
