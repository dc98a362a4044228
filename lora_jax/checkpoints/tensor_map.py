"""Which tensor of a checkpoint holds which array of the model, and whether all of them fit."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax import errors
from lora_jax.checkpoints import model_folder, safetensors_files, storage
from lora_jax.checkpoints.safetensors_files import StoredTensor
from lora_jax.checkpoints.storage.stored_linear import StoredLinear
from lora_jax.models import config as model_config
from lora_jax.models import llama

Path = tuple[str, ...]


class Slot(NamedTuple):
    """Where a tensor goes: an array of the model, and the layer in it (None: the whole array)."""

    path: Path
    layer: int | None
    shape: tuple[int, ...]  # on disk


def abstract_model(
    config: model_config.LlamaConfig,
    dtype: jax.typing.DTypeLike = jnp.float32,
    array: Callable[[jax.ShapeDtypeStruct], Any] = lambda shape: shape,
) -> llama.LlamaForCausalLM:
    """The dense model with array(shape) in place of each array."""
    graphdef, state = _shapes(config, jnp.dtype(dtype))
    return nnx.merge(graphdef, jax.tree.map(array, state))  # which makes new variables


@functools.cache
def _shapes(config: model_config.LlamaConfig, dtype: Any) -> tuple[Any, Any]:
    """(graphdef, shapes). Cached, because tracing the model is slow and a run needs it 4 times."""
    return nnx.split(
        nnx.eval_shape(lambda: llama.LlamaForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0)))
    )


def slots(model: llama.LlamaForCausalLM) -> dict[str, Slot]:
    """{tensor name on disk: its slot} for every array of the model."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        leaf = {"kernel": "weight", "embedding": "weight"}.get(path[-1], path[-1])
        stacked = path[:2] == ("model", "layers")
        shape = tuple(variable.shape[1:] if stacked else variable.shape)
        if path[-1] == "kernel":
            shape = shape[::-1]
        for layer in range(variable.shape[0]) if stacked else [None]:
            found[".".join((*path_on_disk(path[:-1], layer), leaf))] = Slot(path, layer, shape)
    return found


def path_on_disk(path: Path, layer: int | None) -> Path:
    """The path of one layer's module, with the layer's number in it."""
    return path if layer is None else (*path[:2], str(layer), *path[2:])


def is_quantizable(path: Path) -> bool:
    """Whether an array is a weight that may be quantized."""
    return path[-1] == "kernel" and path[-2] != "lm_head"


def check(
    stored: Mapping[str, StoredTensor],
    slots: Mapping[str, Slot],
    config: model_config.LlamaConfig,
    folder: pathlib.Path,
) -> dict[str, StoredLinear]:
    """{tensor name of a kernel: the quantized weight stored in its place}.

    Raises: UserError with every tensor that is missing, unexpected or of another shape or dtype.
    """
    found = storage.Found({}, set(), set(), [])
    if config.quantization is not None:
        linears = {
            name.removesuffix(".weight"): slot.shape[::-1]
            for name, slot in slots.items()
            if slot.path[-1] in ("kernel", "embedding")
        }
        biased = [name.removesuffix(".bias") for name in slots if name.endswith(".bias")]
        found = storage.find(config.quantization, linears, biased, stored)
    quantized = {f"{module}.weight" for module in found.modules}
    tied = {model_folder.HEAD} if config.tie_word_embeddings else set()
    dense = {name: slot for name, slot in slots.items() if name not in quantized}
    problems = found.problems + [f"{name} is missing" for name in dense if name not in stored]
    unexpected = [
        name
        for name in stored
        if name not in found.claimed | tied
        and name not in slots
        and not model_folder.is_buffer(name)
        and not (name.endswith(".bias") and not stored[name].value().any())  # adds zeros
    ]
    extra = {name for name in unexpected if model_folder.is_extra(name, config)}
    problems += [f"{name} is unexpected" for name in unexpected if name not in extra]
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
        problems += [f"{name} is unexpected" for name in unexpected if name in extra]
        looks_quantized = any(name.endswith((".qweight", ".absmax", ".SCB")) for name in stored)
        raise errors.UserError(
            expected="the tensors that config.json describes",
            found=problems,
            where=str(folder),
            do="check that config.json and the safetensors files belong together"
            + ("; the tensors are quantized, but config.json has no quantization_config"
               if looks_quantized and config.quantization is None else "")
            + ("; the file holds an adapter that is not merged: merge it with PEFT's "
               "merge_and_unload, and save that"
               if any(".base_layer." in name or ".lora_A." in name for name in stored) else ""),
        )  # fmt: skip
    return {f"{module}.weight": weight for module, weight in found.weights.items()}
