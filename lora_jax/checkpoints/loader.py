"""A Hugging Face folder of safetensors → a LLaMA on its devices, tensor by tensor.

Each tensor is read, sent to its devices, and there transposed, cast, quantized or unpacked into its
slot of the stacked array before the next one is read. The whole float model never exists in memory.
"""

import collections
import ctypes
import functools
import math
import pathlib
import platform
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lora_jax import errors
from lora_jax.checkpoints import model_folder, safetensors_files, storage, tensor_map
from lora_jax.checkpoints.safetensors_files import StoredTensor
from lora_jax.checkpoints.storage.stored_linear import PackedSpec, StoredLinear
from lora_jax.kernels import packed as packing
from lora_jax.models import llama, quantization_config
from lora_jax.parallel import mesh as sharding
from lora_jax.quant import formats
from lora_jax.quant import linear as quant_linear


class _Source(NamedTuple):
    """One layer's tensor, for its slot in a stacked array."""

    layer: int | None
    tensor: StoredTensor | StoredLinear

    def read(self, where: NamedSharding, transpose: bool) -> Any:
        """The tensor as it is on disk, on the devices that will hold its slot in `where`."""
        if isinstance(self.tensor, StoredLinear):
            axes = where.spec[-2:]
            return storage.read(self.tensor, where.mesh, axes if transpose else axes[::-1])
        # The mesh may not divide an axis that is padded in packed form: it is cut after padding.
        spec = where.spec[-len(self.tensor.shape) :]
        return safetensors_files.read(self.tensor, where.mesh, spec[::-1] if transpose else spec)

    def cast(self, transpose: bool) -> Callable:
        """(what `read` returned, dtype) → its slot in a dense array."""
        if isinstance(self.tensor, StoredLinear):
            return storage.Dequantize(self.tensor.recipe, transpose=not transpose)
        return _Cast(transpose)


class _Packing(NamedTuple):
    """How a stack of linear layers is packed: parts are (source, what was read → Packed)."""

    spec: PackedSpec
    parts: list[tuple[_Source, Callable]]


class _Cast(NamedTuple):
    """(tensor, dtype) → array in that dtype, transposed for a kernel. Hashable, for jit."""

    transpose: bool

    def __call__(self, raw: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        return (raw.T if self.transpose else raw).astype(dtype)


class _Quantize(NamedTuple):
    """A kernel as it is on disk → Packed. Hashable, for jit. dense: how to make a kernel of it."""

    fmt: str
    search: bool
    multiple: int
    dense: storage.Dequantize | None = None

    def __call__(self, raw: Any) -> packing.Packed:
        how = {"search": self.search, "transposed": self.dense is None}
        weight = raw if self.dense is None else self.dense(raw, jnp.float32)
        return formats.quantize(weight, self.fmt, self.multiple, **how)


def load(
    folder: pathlib.Path | str,
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    search: bool = True,
    mesh: Mesh | None = None,
    residual: Callable[[str, jax.Array], jax.Array] | None = None,
) -> llama.LlamaForCausalLM:
    """The model in `folder` on `mesh`, with quantized linear layers (except lm_head).

    quantization: a format of --quant; None keeps the linear layers as they are stored, dense or
    quantized; "none" makes them dense. In a quantized checkpoint, linear layers become dense if
    they cannot be packed without loss or if the layers of a stack differ; `dense_linears` lists
    them.
    search: see formats.quantize. mesh: None means one device.
    dtype: of all that is not quantized; None takes config.json's, with float16 read as bfloat16.
    residual: (dotted path of a linear layer, W [N, K]) → what is rounded instead of W; see
    lora.Principal.
    Raises: UserError if a file or tensor is missing, damaged or of another shape, or holds NaN or
    infinity, with a list of all of them; or if a quantized checkpoint is in another format than
    the one asked for.
    """
    folder = pathlib.Path(folder)
    config = model_folder.config(folder)
    quantization = quantization_config.choose(quantization, config.quantization, str(folder))
    if residual is not None and config.quantization is not None:
        raise errors.UserError(
            expected="weights that are not quantized, to compute the initial A and B from",
            found=f"a quantized checkpoint: {config.quantization}",
            where=str(folder),
            do="pass the model before quantization, with --quant",
        )
    dtype = jnp.dtype(dtype or config.dtype)
    mesh = mesh or sharding.make_mesh(sharding.ONE)
    stored = model_folder.tensors(folder, config)
    model = tensor_map.abstract_model(config, dtype)
    slots = tensor_map.slots(model)
    weights = tensor_map.check(stored, slots, config, folder)
    sources = collections.defaultdict(list)
    for name, slot in slots.items():
        sources[slot.path].append(_Source(slot.layer, weights.get(name) or stored[name]))
    packed = {}
    for path in filter(tensor_map.is_quantizable, sources if quantization != "none" else ()):
        if pack := _packing(path, sources[path], config, quantization, search, mesh):
            packed[path] = pack
    _check_shards(model, packed.keys(), mesh)
    shapes = {slot.path: slot.shape for slot in slots.values()}

    def order(path):
        # The largest tensor first, while memory is nearly empty. Biases last: a quantized layer
        # replaces its linear layer and then gets its bias.
        return path[-1] == "bias", -math.prod(shapes[path])

    problems: list[errors.UserError] = []
    for path in sorted(sources, key=order):
        parent = functools.reduce(getattr, path[:-1], model)
        if path in packed:
            layer = _load_packed(parent, path, packed[path], mesh, residual, problems)
            setattr(functools.reduce(getattr, path[:-2], model), path[-2], layer)
            continue
        variable, transpose = getattr(parent, path[-1]), path[-1] == "kernel"
        where = sharding.of(path, len(variable.shape), mesh)
        with errors.noted(problems):
            variable.set_value(_load_dense(variable, sources[path], where, transpose, problems))
    if problems:
        raise errors.UserError.together(problems)
    sharding.set_partitions(model)
    return model


def _check_shards(model: llama.LlamaForCausalLM, packed: Collection, mesh: Mesh) -> None:
    """Raises UserError with every axis that the mesh does not divide.

    packed: paths of the kernels that are padded before they are cut.
    """
    problems = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        spec = sharding.of(path, len(variable.shape), mesh).spec
        for axis, (size, name) in enumerate(zip(variable.shape, spec, strict=False)):
            is_padded = path in packed and axis == len(variable.shape) - 2
            if name and size % mesh.shape[name] and not is_padded:
                problems.append(f"{'.'.join(path)}: {size} over {name}={mesh.shape[name]}")
    sharding.refuse_indivisible(problems, mesh.shape)


def _packing(path, sources, config, quantization, search, mesh) -> _Packing | None:
    """How a stack of linear layers is packed; None: it becomes dense."""
    multiple = sharding.input_shards(path[:-1], mesh)
    if config.quantization is None or not config.quantization.stays_packed:
        parts = []
        for source in sources:
            is_dense = not isinstance(source.tensor, StoredLinear)
            dense = None if is_dense else storage.Dequantize(source.tensor.recipe)
            parts.append((source, _Quantize(quantization, search, multiple, dense)))
        return _Packing(PackedSpec(quantization), parts)
    weights = [source.tensor for source in sources]
    if not all(isinstance(weight, StoredLinear) for weight in weights):
        return None
    spec = storage.common_spec(weight.recipe.packed for weight in weights)
    if spec is None:
        return None
    spec = spec.fitted(weights[0].recipe.rows, multiple)
    parts = []
    for source, weight in zip(sources, weights, strict=True):
        recipe = weight.recipe._replace(packed=spec)
        source = source._replace(tensor=weight._replace(recipe=recipe))
        parts.append((source, storage.Unpack(recipe, multiple)))
    return _Packing(spec, parts)


def _load_dense(
    variable: nnx.Variable,
    sources: list[_Source],
    where: NamedSharding,
    transpose: bool,
    problems: list[errors.UserError],
) -> jax.Array:
    """The array of a variable. What is wrong with the tensors of a stack is added to problems."""
    if sources[0].layer is None:
        raw = sources[0].read(where, transpose)
        return _dense(raw, sources[0].cast(transpose), variable.dtype, where)
    whole = jnp.zeros(variable.shape, variable.dtype, device=where)
    for source in sources:
        with errors.noted(problems):
            raw = source.read(where, transpose)
            cast = source.cast(transpose)
            whole = jax.block_until_ready(_store_dense(whole, raw, source.layer, cast, where))
            del raw
            _return_freed_memory(whole)
    return whole


def _load_packed(
    linear: nnx.Linear,
    path: tensor_map.Path,
    pack: _Packing,
    mesh: Mesh,
    residual: Callable[[str, jax.Array], jax.Array] | None,
    problems: list[errors.UserError],
) -> quant_linear.QuantLinear:
    """linear with its kernel packed layer by layer. Its bias is loaded later, like any array.

    What is wrong with the tensors is added to problems.
    """
    layers, rows, columns = linear.kernel.shape
    spec, parts = pack
    shapes = spec.shapes(rows, columns, sharding.input_shards(path[:-1], mesh))
    where = packing.Packed(
        *(
            None if shape is None else sharding.of((*path[:-1], leaf), shape.ndim + 1, mesh)
            for leaf, shape in zip(packing.Packed._fields, shapes, strict=True)
        )
    )
    whole = _empty(layers, shapes, where)
    raw_where = sharding.of(path, 3, mesh)
    for source, packed in parts:
        with errors.noted(problems):
            raw = source.read(raw_where, True)
            if residual is not None:
                raw = residual(".".join(tensor_map.path_on_disk(path[:-1], source.layer)), raw)
            # Wait for each tensor: otherwise float weights pile up ahead of the quantizer.
            whole = jax.block_until_ready(_store_packed(whole, raw, source.layer, packed, where))
            del raw
            _return_freed_memory(whole)
    return quant_linear.QuantLinear(whole, linear, fmt=spec.fmt)


def _return_freed_memory(stack: Any) -> None:
    """Returns the host memory that a stack's tensors occupied to the system.

    glibc keeps freed blocks of up to 32 MB for reuse, in one arena per thread; over a checkpoint
    they add up to more than the packed model. malloc_trim walks through all allocations, which is
    too slow for small stacks such as norms.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(stack))
    if size >= 2**20 and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _dense(raw, cast, dtype, where):
    return jax.lax.with_sharding_constraint(cast(raw, dtype), where)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(layers, shapes, where):
    whole = jax.tree.map(lambda shape: jnp.zeros((layers, *shape.shape), shape.dtype), shapes)
    return jax.tree.map(jax.lax.with_sharding_constraint, whole, where)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _store_dense(whole, raw, layer, cast, where):
    array = cast(raw, whole.dtype)
    whole = jax.lax.dynamic_update_index_in_dim(whole, array, layer, 0)
    return jax.lax.with_sharding_constraint(whole, where)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _store_packed(whole, raw, layer, pack, where):
    packed = pack(raw)
    whole = jax.tree.map(
        lambda w, part: jax.lax.dynamic_update_index_in_dim(w, part, layer, 0), whole, packed
    )
    return jax.tree.map(jax.lax.with_sharding_constraint, whole, where)
