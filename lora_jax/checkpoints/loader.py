"""A Hugging Face folder of safetensors → a LLaMA on its devices, tensor by tensor.

A tensor is read, sent to its device, and there transposed, cast, quantized or unpacked into its
place in the stacked array, before the next one is read: the float model never exists as a whole.
"""

import collections
import ctypes
import functools
import hashlib
import json
import math
import pathlib
import platform
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from lora_jax import errors, hub
from lora_jax.checkpoints import safetensors_files, storage
from lora_jax.checkpoints.safetensors_files import Stored
from lora_jax.kernels import packed as packing
from lora_jax.models import config as model_config
from lora_jax.models import llama
from lora_jax.models import quantization_config as model_quantization
from lora_jax.parallel import mesh as sharding
from lora_jax.quant import formats
from lora_jax.quant import linear as quant_linear


class _Slot(NamedTuple):
    """Where a tensor goes: an array of the model, and the layer in it (None: the whole array)."""

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]  # on disk


class _Source(NamedTuple):
    """One layer's tensor, for a place in a stacked array."""

    layer: int | None
    tensor: Stored | storage.Weight

    def read(self, where: NamedSharding, transpose: bool) -> Any:
        """As it lies on disk, on the devices that will hold its place in `where`."""
        if isinstance(self.tensor, storage.Weight):
            return self.tensor.read(where.mesh, where.spec[-2:])
        return _read(self.tensor, where, transpose)

    def cast(self, transpose: bool) -> Callable:
        """(what was read, dtype) → its place in a dense array."""
        if isinstance(self.tensor, storage.Weight):
            return storage.Dequantize(self.tensor.recipe)
        return _Cast(transpose)


class _Packing(NamedTuple):
    """How a stack of linear layers becomes packed: parts are (source, what was read → Packed)."""

    form: storage.Form
    parts: list[tuple[_Source, Callable]]


class _Cast(NamedTuple):
    """A tensor, turned over where a kernel is made of it, in a dtype. Hashable, as jit wants it."""

    transpose: bool

    def __call__(self, raw: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        return (raw.T if self.transpose else raw).astype(dtype)


class _Quantize(NamedTuple):
    """A kernel as it lies on disk → Packed. Hashable, as jit wants it."""

    fmt: str
    search: bool
    multiple: int

    def __call__(self, raw: jax.Array) -> packing.Packed:
        how = {"search": self.search, "transposed": True}
        return formats.quantize(raw, self.fmt, self.multiple, **how)


def load(
    folder: pathlib.Path | str,
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    search: bool = True,
    mesh: Mesh | None = None,
    residual: Callable[[str, jax.Array], jax.Array] | None = None,
) -> llama.LlamaForCausalLM:
    """The model in `folder`, its linear layers quantized (lm_head excepted), on `mesh`.

    quantization: None takes the linear layers as they are stored, dense or quantized; "none" makes
    them dense. Of a quantized checkpoint those that cannot be packed as they are, or not all
    layers alike, are dense, and so is lm_head: `dense_linears` tells which.
    search: see formats.quantize. mesh: None means one device.
    dtype: of everything not quantized; None takes config.json's, float16 read as bfloat16.
    residual: (dotted path of a linear layer, W [N, K]) → what is rounded in W's place; see
    lora.Principal.
    Raises: UserError for a folder, file or tensor that is missing, damaged or of another shape,
    all of them at once; for another format than that of a quantized checkpoint.
    """
    folder = pathlib.Path(folder)
    config = model_config.load(folder)
    quantization = model_quantization.choose(quantization, config.quantization, str(folder))
    if residual is not None and config.quantization is not None:
        raise errors.UserError(
            expected="weights as they were before they were rounded, to take PiSSA's A and B from",
            found=f"a checkpoint in {config.quantization.fmt}",
            where=str(folder),
            do="name the model before it was quantized, with --quant",
        )
    dtype = jnp.dtype(dtype or config.dtype)
    mesh = mesh or sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
    stored = safetensors_files.tensors(folder)
    model = _abstract(config, dtype)
    slots = _slots(model)
    weights = _check(stored, slots, config, folder)
    sources = collections.defaultdict(list)
    for name, slot in slots.items():
        sources[slot.path].append(_Source(slot.layer, weights.get(name) or stored[name]))
    packed = {}
    for path in filter(_is_linear, sources if quantization != "none" else ()):
        if pack := _packing(path, sources[path], config, quantization, search, mesh):
            packed[path] = pack
    _check_shards(model, packed.keys(), mesh)
    shapes = {slot.path: slot.shape for slot in slots.values()}

    def order(path):
        # The largest tensor first, while there is little beside it in memory. A bias last: a
        # quantized layer takes its linear layer's place, and then gets its bias.
        return path[-1] == "bias", -math.prod(shapes[path])

    for path in sorted(sources, key=order):
        parent = functools.reduce(getattr, path[:-1], model)
        if path in packed:
            layer = _load_packed(parent, path, packed[path], mesh, residual)
            setattr(functools.reduce(getattr, path[:-2], model), path[-2], layer)
        else:
            variable = getattr(parent, path[-1])
            where = sharding.of(path, len(variable.shape), mesh)
            array = _load_dense(variable, sources[path], where, transpose=path[-1] == "kernel")
            variable.set_value(array)
    sharding.deal_out(model)
    return model


def contents(
    folder: pathlib.Path, config: model_config.LlamaConfig
) -> tuple[dict[str, Stored | storage.Weight], dict[str, Stored | storage.Weight]]:
    """{name: tensor} of a model's (linear layers that --quant rounds, all others), by layer.

    The names are those of a dense model. Raises: UserError as `load`.
    """
    stored = safetensors_files.tensors(folder)
    slots = _slots(_abstract(config))
    weights = _check(stored, slots, config, folder)
    linears, others = {}, {}
    for name in sorted(slots, key=lambda name: slots[name].layer or 0):
        is_linear = _is_linear(slots[name].path)
        (linears if is_linear else others)[name] = weights.get(name) or stored[name]
    return linears, others


def skeleton(
    config: model_config.LlamaConfig,
    *,
    dtype: jax.typing.DTypeLike,
    quantization: str,
    mesh: Mesh | AbstractMesh,
) -> llama.LlamaForCausalLM:
    """The model as `load` gives it, as far as config.json tells; to be called under eval_shape.

    quantization: as model_quantization.choose gives it.
    """
    model = _abstract(config, dtype, lambda s: jnp.zeros(s.shape, s.dtype))
    linears = [
        (path, node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Linear) and path[-1] != "lm_head"
    ]
    for path, linear in linears if quantization != "none" else ():
        layers, rows, columns = linear.kernel.shape
        form: storage.Form | None = storage.Form(quantization)
        if config.quantization is not None:
            names = (".".join(_on_disk(path, layer)) for layer in range(layers))
            form = storage.declared(config.quantization, names, rows)
        if form is not None:
            multiple = sharding.input_shards(path, mesh)
            if config.quantization is not None:
                form = form.fitted(rows, multiple)
            packed = jax.tree.map(
                lambda s: jnp.zeros((layers, *s.shape), s.dtype),  # noqa: B023
                form.shapes(rows, columns, multiple),
            )
            quant_linear.replace(
                model, path, quant_linear.QuantLinear(packed, linear, fmt=form.fmt)
            )
    sharding.deal_out(model)
    return model


def _abstract(
    config: model_config.LlamaConfig,
    dtype: jax.typing.DTypeLike = jnp.float32,
    array: Callable[[jax.ShapeDtypeStruct], Any] = lambda shape: shape,
) -> llama.LlamaForCausalLM:
    """The dense model, with array(shape) for each array."""
    graphdef, state = _shapes(config, jnp.dtype(dtype))
    return nnx.merge(graphdef, jax.tree.map(array, state))  # which makes variables of its own


@functools.cache
def _shapes(config: model_config.LlamaConfig, dtype: Any) -> tuple[Any, Any]:
    """(graphdef, shapes), for which a model draws its values; a run asks four times."""
    return nnx.split(
        nnx.eval_shape(lambda: llama.LlamaForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0)))
    )


def loaded_bytes(folder: pathlib.Path | str, *, dtype: str | None, quantization: str | None) -> int:
    """Bytes of what `load` gives on one device, from config.json alone."""
    config = model_config.load(pathlib.Path(folder))
    fmt = model_quantization.choose(quantization, config.quantization, str(folder))
    one = sharding.mesh_of(dict.fromkeys(sharding.AXES, 1))

    def build():
        model = skeleton(config, dtype=jnp.dtype(dtype or config.dtype), quantization=fmt, mesh=one)
        return nnx.to_pure_dict(nnx.state(model))

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(build)))


def num_params(config: model_config.LlamaConfig) -> int:
    """Numbers in the model, however they are stored."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(_abstract(config))))


def dense_linears(model: llama.LlamaForCausalLM) -> tuple[list[str], int]:
    """(paths of the linear layers that are dense, the number of all), lm_head excepted."""
    layers = model.config.num_hidden_layers
    dense, total = [], 0
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Linear | quant_linear.QuantLinear) and path[-1] != "lm_head":
            total += layers
            if isinstance(node, nnx.Linear):
                dense += [".".join(_on_disk(path, layer)) for layer in range(layers)]
    return dense, total


def dense_note(quant: str, model: llama.LlamaForCausalLM) -> str:
    """Which linear layers of a model loaded as `quant` are dense all the same; "" for none."""
    dense, total = ([], 0) if quant == "none" else dense_linears(model)
    if not dense:
        return ""
    kinds = ", ".join(dict.fromkeys(path.split(".")[-1] for path in dense))
    return (f"{len(dense)} of {total} linear layers are dense, left so by the checkpoint or in "
            f"blocks that reach across rows: {kinds}")  # fmt: skip


def fingerprint(folder: pathlib.Path | str) -> dict:
    """What identifies a base model: its config, tensor names, shapes, file sizes, values, commit.

    Of the values it sees four pieces of 1 KiB in each tensor, evenly spread, first and last bytes
    among them: all of a small tensor, and some of all that a training changes. It does not see a
    change that lies between the pieces. A folder of 140 GB is some 3000 reads.
    """
    folder = pathlib.Path(folder)
    stored = safetensors_files.tensors(folder)
    return {
        "config": json.loads((folder / "config.json").read_text()),
        "tensors": _digest({name: [*s.shape, s.dtype] for name, s in stored.items()}),
        "bytes": sum(path.stat().st_size for path in {s.path for s in stored.values()}),
        "checksum": _sample(sorted({s.path for s in stored.values()})),
        "commit": hub.commit(folder),
    }


def _sample(files: Iterable[pathlib.Path], pieces: int = 4, size: int = 1024) -> str:
    """A digest of `pieces` of each tensor's bytes; the layout is that of safetensors' README."""
    values = {}
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                begin, end = (8 + length + offset for offset in tensor["data_offsets"])
                digest = hashlib.sha256()
                for piece in range(pieces):
                    file.seek(begin + max(0, end - begin - size) * piece // (pieces - 1))
                    digest.update(file.read(min(size, end - begin)))
                values[name] = digest.hexdigest()
    return _digest(values)


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _slots(model: llama.LlamaForCausalLM) -> dict[str, _Slot]:
    """{tensor name on disk: its place} for every array of the model."""
    slots = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        leaf = {"kernel": "weight", "embedding": "weight"}.get(path[-1], path[-1])
        stacked = path[:2] == ("model", "layers")
        shape = tuple(variable.shape[1:] if stacked else variable.shape)
        if path[-1] == "kernel":
            shape = shape[::-1]
        for layer in range(variable.shape[0]) if stacked else [None]:
            slots[".".join((*_on_disk(path[:-1], layer), leaf))] = _Slot(path, layer, shape)
    return slots


def _is_linear(path: tuple[str, ...]) -> bool:
    """Whether an array is a weight that may be quantized."""
    return path[-1] == "kernel" and path[-2] != "lm_head"


def _on_disk(path: tuple[str, ...], layer: int | None) -> tuple[str, ...]:
    """The path of one layer's module."""
    return path if layer is None else (*path[:2], str(layer), *path[2:])


def _check(stored, slots, config, folder) -> dict[str, storage.Weight]:
    """{name of a kernel's tensor: what it is stored as instead} of a quantized checkpoint.

    Raises: UserError for everything that is not as it should be.
    """
    found = storage.Found({}, set(), set(), [])
    if config.quantization is not None:
        linears = {
            name.removesuffix(".weight"): slot.shape[::-1]
            for name, slot in slots.items()
            if slot.path[-1] == "kernel"
        }
        biased = [name.removesuffix(".bias") for name in slots if name.endswith(".bias")]
        found = storage.survey(config.quantization, linears, biased, stored)
    quantized = {f"{module}.weight" for module in found.modules}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    dense = {name: slot for name, slot in slots.items() if name not in quantized}
    problems = found.problems + [f"{name} is missing" for name in dense if name not in stored]
    problems += [
        f"{name} is unexpected"
        for name in stored
        if name not in found.claimed
        and name not in slots
        and name not in tied
        and not name.endswith("rotary_emb.inv_freq")
    ]
    problems += [
        f"{name} has shape {list(stored[name].shape)}, expected {list(slot.shape)}"
        for name, slot in dense.items()
        if name in stored and stored[name].shape != slot.shape
    ]
    problems += [
        f"{name} has dtype {stored[name].dtype}, "
        f"expected one of {', '.join(safetensors_files.FLOATS)}"
        for name in dense
        if name in stored and stored[name].dtype not in safetensors_files.FLOATS
    ]
    if problems:
        signs = any(name.endswith((".qweight", ".absmax", ".SCB")) for name in stored)
        raise errors.UserError(
            expected="the tensors that config.json describes",
            found=problems,
            where=str(folder),
            do="check that config.json and the safetensors files belong together"
            + ("; it has no quantization_config, but they are quantized"
               if signs and config.quantization is None else ""),
        )  # fmt: skip
    return {f"{module}.weight": weight for module, weight in found.weights.items()}


def _check_shards(model: llama.LlamaForCausalLM, packed: Collection, mesh: Mesh) -> None:
    """Raises UserError for every axis that the mesh cannot cut evenly.

    packed: paths of the kernels that are padded first.
    """
    problems = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        spec = sharding.of(path, len(variable.shape), mesh).spec
        for axis, (size, name) in enumerate(zip(variable.shape, spec, strict=False)):
            is_padded = path in packed and axis == len(variable.shape) - 2
            if name and size % mesh.shape[name] and not is_padded:
                problems.append(f"{'.'.join(path)}: {size} over {name}={mesh.shape[name]}")
    if problems:
        raise errors.UserError(
            expected="a mesh whose axes divide the model's dimensions",
            found=problems,
            where=f"mesh {dict(mesh.shape)}",
            do="choose smaller tensor or fsdp sizes in --mesh",
        )


def _packing(path, sources, config, quantization, search, mesh) -> _Packing | None:
    """How a stack of linear layers becomes packed; None: it is to be dense."""
    multiple = sharding.input_shards(path[:-1], mesh)
    if config.quantization is None:
        pack = _Quantize(quantization, search, multiple)
        return _Packing(storage.Form(quantization), [(source, pack) for source in sources])
    weights = [source.tensor for source in sources]
    if not all(isinstance(weight, storage.Weight) for weight in weights):
        return None
    form = storage.join(weight.recipe.form for weight in weights)
    if form is None:
        return None
    form = form.fitted(weights[0].recipe.rows, multiple)
    parts = []
    for source, weight in zip(sources, weights, strict=True):
        recipe = weight.recipe._replace(form=form)
        source = source._replace(tensor=weight._replace(recipe=recipe))
        parts.append((source, storage.Unpack(recipe, multiple)))
    return _Packing(form, parts)


def _load_dense(variable, sources: list[_Source], where: NamedSharding, transpose: bool):
    if sources[0].layer is None:
        raw = sources[0].read(where, transpose)
        return _dense(raw, sources[0].cast(transpose), variable.dtype, where)
    whole = jnp.zeros(variable.shape, variable.dtype, device=where)
    for source in sources:
        raw = source.read(where, transpose)
        cast = source.cast(transpose)
        whole = jax.block_until_ready(_store_dense(whole, raw, source.layer, cast, where))
        del raw
        _return_freed_memory(whole)
    return whole


def _load_packed(linear, path, pack: _Packing, mesh: Mesh, residual) -> quant_linear.QuantLinear:
    """linear with its kernel packed layer by layer; its bias is loaded later, as any array."""
    layers, rows, columns = linear.kernel.shape
    form, parts = pack
    shapes = form.shapes(rows, columns, sharding.input_shards(path[:-1], mesh))
    where = packing.Packed(
        *(
            None if shape is None else sharding.of((*path[:-1], leaf), shape.ndim + 1, mesh)
            for leaf, shape in zip(packing.Packed._fields, shapes, strict=True)
        )
    )
    whole = jax.tree.map(
        lambda s, w: jnp.zeros((layers, *s.shape), s.dtype, device=w), shapes, where
    )
    raw_where = sharding.of(path, 3, mesh)
    for source, packed in parts:
        raw = source.read(raw_where, True)
        if residual is not None:
            raw = residual(".".join(_on_disk(path[:-1], source.layer)), raw)
        # Wait for each tensor: dispatch ahead of the quantizer would pile up float weights.
        whole = jax.block_until_ready(_store_packed(whole, raw, source.layer, packed, where))
        del raw
        _return_freed_memory(whole)
    return quant_linear.QuantLinear(whole, linear, fmt=form.fmt)


def _return_freed_memory(stack: Any) -> None:
    """Gives the host memory of a stack's tensors that were freed back to the system.

    glibc keeps freed blocks of up to 32 MB for reuse, in an arena per thread: over a checkpoint
    that adds up to more than the packed model. A stack of norms is not worth the walk through all
    that the process has allocated.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(stack))
    if size >= 2**20 and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _read(stored: Stored, where: NamedSharding, transpose: bool) -> jax.Array:
    """The tensor as it lies on disk, on the devices that will hold its place in `where`."""
    # An axis that is padded in its packed form may not divide here: it is cut after the padding.
    spec = where.spec[-len(stored.shape) :]
    return safetensors_files.read(stored, where.mesh, spec[::-1] if transpose else spec)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _dense(raw, cast, dtype, where):
    return jax.lax.with_sharding_constraint(cast(raw, dtype), where)


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
