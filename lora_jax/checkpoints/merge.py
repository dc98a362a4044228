"""A model folder with an adapter merged into its weights, for programs without adapters."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax.checkpoints import inventory, model_folder, safetensors_files, storage, writer
from lora_jax.checkpoints.safetensors_files import StoredTensor, TensorSpec
from lora_jax.checkpoints.storage.stored_linear import StoredLinear
from lora_jax.lora import adapter as host
from lora_jax.lora import algebra, embeddings
from lora_jax.models import config as model_config
from lora_jax.models import quantization_config
from lora_jax.parallel import mesh as sharding
from lora_jax.quant import formats


class Merge(NamedTuple):
    """What `write` will write: tensors and config.json."""

    parts: list[writer.Part]
    config: dict[str, Any]


class _Source(NamedTuple):
    """A tensor of the base. rounded: the format to round it to before merging, if any."""

    tensor: StoredTensor | StoredLinear
    dtype: str  # in the result, as safetensors names it
    rounded: str | None
    search: bool

    def value(self) -> jax.Array:
        """The dense tensor, [N, K] for a linear layer, on one device."""
        dtype = jnp.float32 if self.rounded else _NAMES[self.dtype]
        if isinstance(self.tensor, StoredLinear):
            one = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
            raw = storage.read(self.tensor, one, (None, None))
            return _dequantized(raw, storage.Dequantize(self.tensor.recipe), dtype).T
        value = jnp.asarray(self.tensor.value())
        if self.rounded is None:
            return value
        packed = formats.quantize(value, self.rounded, search=self.search, transposed=True)
        return formats.dequantize(packed, self.rounded, value.shape[1]).T


@functools.partial(jax.jit, static_argnums=(1, 2))
def _dequantized(raw, unpack: storage.Dequantize, dtype):
    return unpack(raw, dtype)


_NAMES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


def plan(
    folder: pathlib.Path,
    adapter: host.Adapter,
    *,
    quantization: str | None = None,
    search: bool = True,
) -> Merge:
    """What to write to merge `adapter`, which fits the model in `folder`, into it.

    quantization: None takes the weights as they are stored, dequantized if necessary; a format
    rounds them to it first, for an adapter that was trained on a base in that format.
    Tensors keep their dtype; dequantized ones get config.json's.
    """
    config = model_folder.config(folder)
    raw = model_folder.read(folder)
    raw.pop("quantization_config", None)
    fmt = quantization_config.choose(quantization, config.quantization, str(folder))
    rounded = fmt if config.quantization is None and fmt != "none" else None
    linears, others = inventory.contents(folder, config)
    tied = config.tie_word_embeddings
    adapter = embeddings.resolved(adapter, tied=tied, same=functools.partial(_same, others, tied))
    default = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    parts = []
    for name, tensor in (linears | others).items():
        dense = isinstance(tensor, StoredTensor)
        dtype = tensor.dtype if dense else default[model_config.stored_dtype(raw)]
        source = _Source(tensor, dtype, rounded if name in linears else None, search)
        parts.append(_part(name, source, adapter))
    if tied and _unties(adapter):
        parts.append(_head(others[f"{embeddings.EMBEDDING}.weight"], adapter))
        raw["tie_word_embeddings"] = False
    return Merge(parts, raw)


def write(
    folder: pathlib.Path, written: pathlib.Path, merge: Merge, *, shard: int = writer.SHARD
) -> Iterator[str]:
    """Writes `plan(folder, …)` into the folder `written`; see writer.new_folder.

    Yields the name of each tensor when it is written.
    Raises: UserError if a merged weight is not finite in the dtype it is written in.
    """
    yield from writer.write(folder, written, merge.parts, merge.config, shard=shard)


def _part(name: str, source: _Source, adapter: host.Adapter) -> writer.Part:
    path = name.removesuffix(".weight")
    if name in adapter.saved:
        return _given(name, adapter.saved[name])
    own = adapter.factors.get(path)
    base = adapter.saved.get(f"{path}.base_layer.weight")
    if own is None:
        if isinstance(source.tensor, StoredTensor) and source.rounded is None:
            return writer.unchanged(source.tensor)
        make = functools.partial(_dense, name, source)
        return writer.Part(name, {name: TensorSpec(source.dtype, _shape(source.tensor))}, make)
    make = functools.partial(_merged, name, source, own, adapter.scaling(path), base)
    return writer.Part(name, {name: TensorSpec(source.dtype, _shape(source.tensor))}, make)


def _head(embedding: StoredTensor, adapter: host.Adapter) -> writer.Part:
    """A head of its own, which was the original embedding before it was adapted."""
    head = f"{embeddings.HEAD}.weight"
    own = f"{embeddings.HEAD}.base_layer.weight"
    base = adapter.saved.get(f"{embeddings.EMBEDDING}.base_layer.weight")
    if base is not None:  # that of the head, too, because they are tied
        adapter = dataclasses.replace(adapter, saved={own: base, **adapter.saved})
    if head in adapter.saved or embeddings.HEAD in adapter.factors:
        return _part(head, _Source(embedding, embedding.dtype, None, search=False), adapter)
    return writer.unchanged(embedding, head) if base is None else _given(head, base)


def _same(
    others: Mapping[str, StoredTensor | StoredLinear], tied: bool, path: str, array: np.ndarray
) -> bool | None:
    """Whether the base's module at `path` has these values, see embeddings.resolved."""
    path = embeddings.EMBEDDING if tied and path == embeddings.HEAD else path
    stored = others.get(f"{path}.weight")
    if stored is None:
        return None
    if isinstance(stored, StoredLinear) or stored.shape != array.shape:
        return False
    value = stored.value()
    return np.array_equal(value, array.astype(value.dtype))


def _given(name: str, array: np.ndarray) -> writer.Part:
    return writer.Part(name, {name: safetensors_files.spec_of(array)}, lambda: {name: array})


def _dense(name: str, source: _Source) -> dict[str, np.ndarray]:
    return {name: _rounded(name, source.value(), source.dtype)}


def _merged(
    name: str, source: _Source, own: host.Factors, scaling: float, base: np.ndarray | None
) -> dict[str, np.ndarray]:
    weight = source.value() if base is None else jnp.asarray(base)
    transposed = own.kind != "embedding"  # in the file a linear layer's weight is [N, K]
    weight = weight.T if transposed else weight
    factors = jnp.asarray(own.A), jnp.asarray(own.B), jnp.full((1, 1), scaling, jnp.float32)
    magnitude = () if own.magnitude is None else (jnp.asarray(own.magnitude),)
    whole = jax.jit(algebra.merged)(weight.astype(jnp.float32), *factors, *magnitude)
    whole = whole.T if transposed else whole
    return {name: _rounded(name, whole, source.dtype)}


def _rounded(name: str, value: jax.Array, dtype: str) -> np.ndarray:
    """The tensor in its dtype in the file. Raises: UserError if that cannot hold it."""
    array = np.asarray(value.astype(_NAMES[dtype]))
    if not np.isfinite(array).all():
        raise errors.UserError(
            expected=f"merged weights that {_NAMES[dtype].dtype.name} can hold",
            found=f"NaN or infinity in {name}, with values of up to {jnp.nanmax(abs(value)):.3g}",
            do="check the adapter's values, or merge it into a copy of the base in float32",
        )
    return array


def _shape(tensor: StoredTensor | StoredLinear) -> tuple[int, ...]:
    if isinstance(tensor, StoredTensor):
        return tensor.shape
    return tensor.recipe.columns, tensor.recipe.rows


def _unties(adapter: host.Adapter) -> bool:
    """Whether a tied embedding and head no longer have the same values with this adapter."""
    changed = any(
        path in adapter.factors or f"{path}.weight" in adapter.saved
        for path in (embeddings.EMBEDDING, embeddings.HEAD)
    )
    return changed and not embeddings.stays_tied(adapter)
