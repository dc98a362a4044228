"""A model folder with an adapter merged into its weights, for programs without adapters."""

import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax.checkpoints import (
    finite,
    inventory,
    model_folder,
    safetensors_writer,
    storage,
    whole,
    writer,
)
from lora_jax.checkpoints.safetensors_files import StoredTensor
from lora_jax.checkpoints.safetensors_writer import TensorSpec
from lora_jax.checkpoints.storage.stored_linear import StoredLinear
from lora_jax.lora import adapter as host
from lora_jax.lora import algebra, outer_names, pissa, targets, tied_head, token_indices
from lora_jax.models import composite, quantization_config
from lora_jax.models import config as model_config
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
            one = sharding.make_mesh(sharding.ONE)
            raw = storage.read(self.tensor, one, (None, None))
            value = _dequantized(raw, storage.Dequantize(self.tensor.recipe), dtype).T
        else:
            value = jax.device_put(finite.check(self.tensor.value(), self.tensor))
        if self.rounded is None:
            return value
        return _nearest(value, self.rounded, self.search)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _dequantized(raw, unpack: storage.Dequantize, dtype):
    return unpack(raw, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _nearest(weight, fmt: str, search: bool):
    """The weight [N, K] as that format represents it."""
    packed = formats.quantize(weight, fmt, search=search, transposed=True)
    return formats.dequantize(packed, fmt, weight.shape[1]).T


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
    Tensors keep their dtype; dequantized ones get config.json's. All else in a composite model
    stays as it is.
    """
    config = model_folder.config(folder)
    outer_names.refuse_beside(adapter, config)
    adapter = outer_names.inner(adapter, config)
    raw = composite.without(model_folder.read(folder), quantization_config.KEYS)
    fmt = quantization_config.choose(quantization, config.quantization, str(folder))
    stays_packed = config.quantization is not None and config.quantization.stays_packed
    rounded = fmt if fmt != "none" and not stays_packed else None
    linears, others = inventory.contents(folder, config)
    size, tied = (config.vocab_size, config.hidden_size), config.tie_word_embeddings
    fitted = tied_head.fitted(adapter, size, tied=tied, where="the adapter")
    default = model_config.stored_dtype(raw)

    def part(name: str, tensor: StoredTensor | StoredLinear) -> writer.Part:
        dense = isinstance(tensor, StoredTensor)
        dtype = tensor.dtype if dense else safetensors_writer.NAMES[default]
        source = _Source(tensor, dtype, rounded if name in linears else None, search)
        return _part(name, source, fitted)

    with_bias = [path for path, own in fitted.adapter.factors.items() if own.bias is not None]
    host.check_mergeable([path for path in with_bias if f"{path}.bias" not in others])
    _check_original(fitted.adapter, linears, rounded)
    parts = [part(name, tensor) for name, tensor in (linears | others).items()]
    if tied and (fitted.plan.own_head or _changes_embedding_alone(fitted)):
        parts.append(part(model_folder.HEAD, others[model_folder.EMBEDDING]))
        raw = composite.changed(raw, tie_word_embeddings=False)
    if fitted.num_tokens != config.vocab_size:
        raw = composite.changed(raw, vocab_size=fitted.num_tokens)
    return Merge(whole.parts(folder, config, parts), raw)


def write(
    folder: pathlib.Path, written: pathlib.Path, merge: Merge, *, shard: int = writer.SHARD
) -> Iterator[str]:
    """Writes `plan(folder, …)` into the folder `written`; see writer.new_folder.

    Yields the name of each tensor when it is written.
    Raises: UserError if a weight is not finite, in the base or merged, in the dtype it is written
    in.
    """
    yield from writer.write(folder, written, merge.parts, merge.config, shard=shard)


def _part(name: str, source: _Source, fitted: tied_head.Fitted) -> writer.Part:
    path, adapter = name.removesuffix(".weight"), fitted.adapter
    if name in adapter.saved:
        return _given(name, adapter.saved[name])
    of_bias = adapter.factors.get(name.removesuffix(".bias"))
    if of_bias is not None and of_bias.bias is not None and name.endswith(".bias"):
        change = adapter.scaling(name.removesuffix(".bias")) * of_bias.bias
        return writer.Part(name, {name: _spec(source, None)},
                           functools.partial(_shifted, name, source, change))  # fmt: skip
    own, rows = adapter.factors.get(path), adapter.saved.get(token_indices.tensor(path))
    base = fitted.base.get(path)
    if base is None:
        base = adapter.saved.get(f"{path}.base_layer.weight")
    if rows is not None:
        tokens = token_indices.of(path, adapter.config)
        spec = TensorSpec(source.dtype, (fitted.num_tokens, rows.shape[1]))
        make = functools.partial(_with_rows, name, source, base, tokens, rows, spec.shape)
        return writer.Part(name, {name: spec}, make)
    if own is None and base is not None:
        return _given(name, _rounded(name, jnp.asarray(base), source.dtype))
    if own is None and isinstance(source.tensor, StoredTensor) and source.rounded is None:
        return writer.unchanged(source.tensor, name)
    spec = _spec(source, base)
    make = functools.partial(_dense, name, source)
    if own is not None:
        init = adapter.config.init_lora_weights
        make = functools.partial(_merged, name, source, own, adapter.scaling(path), base, init)
    return writer.Part(name, {name: spec}, make)


def _spec(source: _Source, base: np.ndarray | None) -> TensorSpec:
    return TensorSpec(source.dtype, _shape(source.tensor) if base is None else base.shape)


def _given(name: str, array: np.ndarray) -> writer.Part:
    return writer.Part(name, {name: safetensors_writer.spec_of(array)}, lambda: {name: array})


def _dense(name: str, source: _Source) -> dict[str, np.ndarray]:
    return {name: np.asarray(source.value().astype(_NAMES[source.dtype]))}


def _with_rows(
    name: str,
    source: _Source,
    base: np.ndarray | None,
    tokens: Sequence[int],
    rows: np.ndarray,
    shape: tuple[int, int],
) -> dict[str, np.ndarray]:
    """The weight [V, D] of an embedding or a head, with these rows for its trained tokens.

    shape: with the rows that only the adapter has, which are all trained.
    """
    weight = source.value() if base is None else jnp.asarray(base, _NAMES[source.dtype])
    own = _rounded(name, jnp.asarray(rows), source.dtype)
    whole = np.pad(weight, ((0, shape[0] - len(weight)), (0, 0)))
    whole[list(tokens)] = own
    return {name: whole}


def _merged(
    name: str,
    source: _Source,
    own: host.Factors,
    scaling: float,
    base: np.ndarray | None,
    init: str,
) -> dict[str, np.ndarray]:
    weight = source.value() if base is None else jnp.asarray(base)
    transposed = own.kind != "embedding"  # in the file a linear layer's weight is [N, K]
    if init != "default" and own.kind == "linear":
        config = targets.LayerConfig(own.A.shape[1], scaling)
        A, B = pissa.initial_of_layer(weight.T, config, init)
        less = _changed(weight, transposed, A, B, np.full((1, 1), -scaling, np.float32), None)
        weight = less.astype(weight.dtype)
    arrays = own.A, own.B, np.full((1, 1), scaling, np.float32), own.magnitude
    whole = _changed(weight, transposed, *arrays)
    return {name: _rounded(name, whole, source.dtype)}


def _shifted(name: str, source: _Source, change: np.ndarray) -> dict[str, np.ndarray]:
    """The bias of a layer, with that of B."""
    return {name: _rounded(name, source.value().astype(jnp.float32) + change, source.dtype)}


@functools.partial(jax.jit, static_argnums=1)
def _changed(weight, transposed: bool, *arrays):
    """algebra.merged(weight, *arrays) in float32, of a weight that may be the transposed one."""
    weight = weight.astype(jnp.float32)
    if transposed:
        return algebra.merged(weight.T, *arrays).T
    return algebra.merged(weight, *arrays)


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


def _check_original(adapter: host.Adapter, linears, rounded: str | None) -> None:
    """Raises: UserError if the adapter changes a base that is not there as it was."""
    init = adapter.config.init_lora_weights
    packed = [name for name, tensor in linears.items() if isinstance(tensor, StoredLinear)]
    if init != "default" and (packed or rounded):
        raise errors.UserError(
            expected=f"the original weights, which init_lora_weights {init} changes",
            found=packed[:1] or f"--quant {rounded}",
            do="merge into the model before quantization, without --quant",
        )


def _shape(tensor: StoredTensor | StoredLinear) -> tuple[int, ...]:
    if isinstance(tensor, StoredTensor):
        return tensor.shape
    return tensor.recipe.columns, tensor.recipe.rows


def _changes_embedding_alone(fitted: tied_head.Fitted) -> bool:
    """Whether the embedding is trained and the head, which was tied to it, keeps its values."""
    adapter = fitted.adapter
    trained = tied_head.EMBEDDING in adapter.factors or model_folder.EMBEDDING in adapter.saved
    return trained and not fitted.plan.joined
