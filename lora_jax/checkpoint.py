"""A Hugging Face folder of safetensors → a LLaMA on its devices, tensor by tensor.

A tensor is read, sent to its device, and there transposed, cast or quantised into its place in
the stacked array, before the next one is read: the float model never exists as a whole.
"""

import collections
import ctypes
import functools
import hashlib
import json
import math
import pathlib
import platform
from typing import NamedTuple

import jax
import jax.numpy as jnp
import safetensors
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax import errors, formats, hub, quant, sharding
from lora_jax.kernels import packed as packing
from lora_jax.models import config as model_config
from lora_jax.models import llama

_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}  # bytes each


class Stored(NamedTuple):
    """Where a tensor lies on disk, and its shape and dtype there."""

    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype]


class _Slot(NamedTuple):
    """Where a tensor goes: an array of the model, and the layer in it (None: the whole array)."""

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]  # on disk


class _Source(NamedTuple):
    """One layer's tensor, for a place in a stacked array."""

    layer: int | None
    stored: Stored


def load(
    folder: pathlib.Path | str,
    *,
    dtype: str | None = None,
    quantisation: str = "none",
    search: bool = True,
    mesh: Mesh | None = None,
) -> llama.LlamaForCausalLM:
    """The model in `folder`, its linear layers quantised (lm_head excepted), on `mesh`.

    search: see formats.quantise. mesh: None means one device.
    dtype: of everything not quantised; None takes config.json's, float16 read as bfloat16.
    Raises: UserError for a folder, file or tensor that is missing, damaged or of another shape,
    all of them at once.
    """
    folder = pathlib.Path(folder)
    config = model_config.load(folder)
    dtype = jnp.dtype(dtype or config.dtype)
    mesh = mesh or sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
    stored = tensors(folder)
    model = nnx.eval_shape(lambda: llama.LlamaForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0)))
    slots = _slots(model)
    _check(stored, slots, config, folder)
    _check_shards(model, quantisation, mesh)
    sources = collections.defaultdict(list)
    for name, slot in slots.items():
        sources[slot.path].append(_Source(slot.layer, stored[name]))

    def order(path):
        # The largest tensor first, while there is little beside it in memory. A bias last: a
        # quantised layer takes its linear layer's place, and then gets its bias.
        return path[-1] == "bias", -math.prod(sources[path][0].stored.shape)

    for path in sorted(sources, key=order):
        parent = functools.reduce(getattr, path[:-1], model)
        is_kernel = path[-1] == "kernel"
        if quantisation != "none" and is_kernel and path[-2] != "lm_head":
            layer = _load_quantised(parent, path, sources[path], quantisation, search, mesh)
            setattr(functools.reduce(getattr, path[:-2], model), path[-2], layer)
        else:
            variable = getattr(parent, path[-1])
            where = sharding.of(path, len(variable.shape), mesh)
            array = _load_dense(variable, sources[path], where, transpose=is_kernel)
            variable.set_value(array)
    sharding.deal_out(model)
    return model


def loaded_bytes(folder: pathlib.Path | str, *, dtype: str | None, quantisation: str) -> int:
    """Bytes of what `load` gives, from config.json alone."""
    config = model_config.load(pathlib.Path(folder))
    dtype = jnp.dtype(dtype or config.dtype)

    def build():
        model = llama.LlamaForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0))
        if quantisation != "none":
            quant.quantise_model(model, quantisation)
        return nnx.to_pure_dict(nnx.state(model))

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(build)))


def tensors(folder: pathlib.Path) -> dict[str, Stored]:
    """{name: Stored} of every tensor in the folder's safetensors files, from their headers alone.

    Raises: UserError for pickles without safetensors, missing shards, truncated files, pointers.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        hub.refuse_lfs_pointer(index)
        files = sorted({folder / name for name in _weight_map(index).values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
        if (folder / "model.safetensors") in files:
            files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise errors.UserError(
            expected="every shard that model.safetensors.index.json names",
            found=[f"no {name}" for name in missing],
            where=str(folder),
            do="download the missing files",
        )
    if not files:
        pickles = [p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in folder.glob(pattern)]
        raise errors.UserError(
            expected="weights in *.safetensors",
            found=f"only {', '.join(pickles)}, a pickle, which can run code and is not read"
            if pickles
            else "no weights",
            where=str(folder),
            do="take a revision with safetensors, or convert with transformers' save_pretrained",
        )
    stored, damaged = {}, []
    for file in files:
        hub.refuse_lfs_pointer(file)
        try:
            with safetensors.safe_open(file, "numpy") as reader:
                for name in reader.keys():  # noqa: SIM118 (no dict: it has no __iter__)
                    part = reader.get_slice(name)
                    stored[name] = Stored(file, name, tuple(part.get_shape()), part.get_dtype())
        except (safetensors.SafetensorError, OSError) as error:
            damaged.append(f"{file.name}: {error}")
    if damaged:
        raise errors.UserError(
            expected="whole safetensors files",
            found=damaged,
            where=str(folder),
            do="download these files again; they are truncated or not safetensors",
        )
    return stored


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise errors.UserError(
            expected='JSON with a "weight_map"',
            found=f"{type(error).__name__}: {error}",
            where=str(index),
            do="download the file again",
        ) from None


def fingerprint(folder: pathlib.Path | str) -> dict:
    """What identifies a base model: its config, tensor names, shapes, file sizes, hub commit."""
    folder = pathlib.Path(folder)
    stored = tensors(folder)
    return {
        "config": json.loads((folder / "config.json").read_text()),
        "tensors": _digest({name: [*s.shape, s.dtype] for name, s in stored.items()}),
        "bytes": sum(path.stat().st_size for path in {s.path for s in stored.values()}),
        "commit": hub.commit(folder),
    }


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
            parts = (*path[:2], str(layer), *path[2:-1]) if stacked else path[:-1]
            slots[".".join((*parts, leaf))] = _Slot(path, layer, shape)
    return slots


def _check(stored, slots, config, folder) -> None:
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    problems = [f"{name} is missing" for name in slots if name not in stored]
    problems += [
        f"{name} is unexpected"
        for name in stored
        if name not in slots and name not in tied and not name.endswith("rotary_emb.inv_freq")
    ]
    problems += [
        f"{name} has shape {list(stored[name].shape)}, expected {list(slot.shape)}"
        for name, slot in slots.items()
        if name in stored and stored[name].shape != slot.shape
    ]
    problems += [
        f"{name} has dtype {stored[name].dtype}, expected one of {', '.join(sorted(_DTYPES))}"
        for name in slots
        if name in stored and stored[name].dtype not in _DTYPES
    ]
    if problems:
        raise errors.UserError(
            expected="the tensors that config.json describes",
            found=problems,
            where=str(folder),
            do="check that config.json and the safetensors files belong together",
        )


def _check_shards(model: llama.LlamaForCausalLM, quantisation: str, mesh: Mesh) -> None:
    """Raises UserError for every axis that the mesh cannot cut evenly."""
    problems = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        spec = sharding.of(path, len(variable.shape), mesh).spec
        padded = quantisation != "none" and path[-1] == "kernel" and path[-2] != "lm_head"
        for axis, (size, name) in enumerate(zip(variable.shape, spec, strict=False)):
            is_input = padded and axis == len(variable.shape) - 2
            if name and size % mesh.shape[name] and not is_input:
                problems.append(f"{'.'.join(path)}: {size} over {name}={mesh.shape[name]}")
    if problems:
        raise errors.UserError(
            expected="a mesh whose axes divide the model's dimensions",
            found=problems,
            where=f"mesh {dict(mesh.shape)}",
            do="choose smaller tensor or fsdp sizes in --mesh",
        )


def _load_dense(variable, sources: list[_Source], where: NamedSharding, transpose: bool):
    if sources[0].layer is None:
        return _dense(_read(sources[0].stored, where, transpose), variable.dtype, where, transpose)
    whole = jnp.zeros(variable.shape, variable.dtype, device=where)
    for source in sources:
        raw = _read(source.stored, where, transpose)
        whole = jax.block_until_ready(_store_dense(whole, raw, source.layer, where, transpose))
        del raw
        _return_freed_memory()
    return whole


def _load_quantised(linear: nnx.Linear, path, sources, fmt, search, mesh) -> quant.QuantLinear:
    """linear with its kernel packed layer by layer; its bias is loaded later, as any array."""
    layers, rows, columns = linear.kernel.shape
    multiple = sharding.input_shards(path[:-1], mesh)
    shapes = jax.eval_shape(
        functools.partial(formats.quantise, fmt=fmt, multiple=multiple),
        jax.ShapeDtypeStruct((rows, columns), linear.kernel.dtype),
    )
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
    for source in sources:
        raw = _read(source.stored, raw_where, True)
        # Wait for each tensor: dispatch ahead of the quantiser would pile up float weights.
        whole = jax.block_until_ready(
            _store_quantised(whole, raw, source.layer, fmt, search, multiple, where)
        )
        del raw
        _return_freed_memory()
    return quant.QuantLinear(whole, linear, fmt=fmt)


def _return_freed_memory() -> None:
    """Gives the host memory of tensors that were freed back to the system.

    glibc keeps freed blocks of up to 32 MB for reuse, in an arena per thread: over a checkpoint
    that adds up to more than the packed model.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _read(stored: Stored, where: NamedSharding, transpose: bool) -> jax.Array:
    """The tensor as it lies on disk, on the devices that will hold its place in `where`."""
    # Opened anew for each tensor: a mapped file's pages count as memory until it is closed.
    with safetensors.safe_open(stored.path, "numpy") as reader:
        array = reader.get_tensor(stored.name)
    spec = where.spec[-array.ndim :]
    spec = spec[::-1] if transpose else spec
    # An axis that is padded in its packed form may not divide here: it is cut after the padding.
    spec = PartitionSpec(
        *(None if name and size % where.mesh.shape[name] else name
          for size, name in zip(array.shape, spec, strict=False))
    )  # fmt: skip
    return jax.device_put(array, NamedSharding(where.mesh, spec))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _dense(raw, dtype, where, transpose):
    array = (raw.T if transpose else raw).astype(dtype)
    return jax.lax.with_sharding_constraint(array, where)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _store_dense(whole, raw, layer, where, transpose):
    array = (raw.T if transpose else raw).astype(whole.dtype)
    whole = jax.lax.dynamic_update_index_in_dim(whole, array, layer, 0)
    return jax.lax.with_sharding_constraint(whole, where)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6), donate_argnums=0)
def _store_quantised(whole, raw, layer, fmt, search, multiple, where):
    packed = formats.quantise(raw, fmt, multiple, search=search, transposed=True)
    whole = jax.tree.map(
        lambda w, part: jax.lax.dynamic_update_index_in_dim(w, part, layer, 0), whole, packed
    )
    return jax.tree.map(jax.lax.with_sharding_constraint, whole, where)
