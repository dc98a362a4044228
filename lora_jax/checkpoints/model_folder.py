"""A model folder's architecture and tensors, set right as transformers does when it loads them."""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lora_jax import errors
from lora_jax.checkpoints import safetensors_files, scaled
from lora_jax.checkpoints.safetensors_files import StoredTensor
from lora_jax.models import composite, config_file, names
from lora_jax.models import config as model_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 4096  # compared at a time
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}  # others: float32


def read(folder: pathlib.Path) -> dict[str, Any]:
    """config.json, corrected by the other files.

    tie_word_embeddings is false if a head of its own is stored. dtype is that of the tensors where
    config.json has none, and quantization_config is that of AutoGPTQ and AutoAWQ, who wrote it to a
    file beside config.json.
    Raises: UserError if config.json or a file of tensors cannot be read.
    """
    raw = config_file.read(folder)
    declared = model_config.from_dict(raw, where=str(folder / "config.json"))
    stored = tensors(folder, declared)
    if declared.quantization is None and any(name.endswith(".qweight") for name in stored):
        raw["quantization_config"] = config_file.read_quantization(folder)
    if declared.tie_word_embeddings and has_own_head(stored):
        raw = composite.changed(raw, tie_word_embeddings=False)
    if not model_config.states_dtype(raw) and EMBEDDING in stored:
        raw["dtype"] = _DTYPES.get(stored[EMBEDDING].dtype, "float32")
    return raw


def config(folder: pathlib.Path) -> model_config.LlamaConfig:
    """The architecture that `read` returns. Raises: UserError as `read` does."""
    return model_config.from_dict(read(folder), where=str(folder / "config.json"))


def tensors(folder: pathlib.Path, config: model_config.LlamaConfig) -> dict[str, StoredTensor]:
    """{name in the model: tensor} of the folder.

    Names of wrappers are left out of the tensors' names, and `model.` is added or left out as in
    transformers. Of a composite model, they are those of its language model. With tied embeddings,
    a head is the embedding where that is missing. float64 and float8 are read as float32; weights
    of 8 bits with scales, as their products (scaled.py).
    Raises: UserError as safetensors_files.tensors, and if two tensors have the same name.
    """
    found: dict[str, StoredTensor] = {}
    twice = []
    for key, stored in safetensors_files.tensors(folder).items():
        name = _name(key, config.composite)
        if names.is_beside(name, config.composite):
            continue
        if name in found:
            twice.append(f"{found[name].key} and {key}")
        found[name] = stored._replace(name=name, key=key)
    if twice:
        raise errors.UserError(
            expected="one tensor for each array of the model",
            found=twice,
            where=str(folder),
            do="keep one of the two",
        )
    if config.tie_word_embeddings and EMBEDDING not in found and HEAD in found:
        found[EMBEDDING] = found[HEAD]._replace(name=EMBEDDING)
    if config.quantization is None:
        joined = scaled.join(found, config.dtype, str(folder))
        found = {name: stored.widened() for name, stored in joined.items()}
    return found


def notes(folder: pathlib.Path) -> list[str]:
    """What a user of the folder should know, one line each; nothing for most folders."""
    raw = config_file.read(folder)
    declared = model_config.from_dict(raw, where=str(folder / "config.json"))
    found = model_config.notes(raw)
    stored = tensors(folder, declared)
    if declared.tie_word_embeddings and has_own_head(stored):
        found.append("lm_head.weight differs from the embedding, so it is kept, although "
                     "config.json says tie_word_embeddings")  # fmt: skip
    if declared.composite:
        others = names.beside([*beside(folder, declared)], declared.composite)
        found.append(f"of this {declared.composite}, only the language model is loaded"
                     + (f", not {', '.join(others)}" if others else ""))  # fmt: skip
    found += filter(None, [scaled.note(stored.values())])
    if extra := [name for name in stored if is_extra(name, declared)]:
        shown = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
        found.append(f"tensors that are not part of the model are not loaded: {shown}")
    return found


def beside(folder: pathlib.Path, config: model_config.LlamaConfig) -> dict[str, StoredTensor]:
    """{name in the folder, without wrappers: tensor} of a composite model beside what it loads."""
    found = {}
    for key, stored in safetensors_files.tensors(folder).items() if config.composite else ():
        name = _name(key, config.composite)
        if names.is_beside(name, config.composite) or is_extra(name, config):
            own = names.unwrapped(key)
            found[own] = stored._replace(name=own, key=key)
    return found


def names_in_folder(stored: Mapping[str, StoredTensor], model_type: str) -> Callable[[str], str]:
    """The name of a tensor of the language model → as the folder of a composite model has it.

    stored: its tensors, as `tensors` returns them. model_type: the composite's.
    """
    keys = {name: names.unwrapped(tensor.key or name) for name, tensor in stored.items()}
    old = names.are_old(keys.values(), model_type)

    def name_of(name: str) -> str:
        if name in keys and _name(keys[name], model_type) == name:
            return keys[name]
        return names.outer(name, model_type, old=old)

    return name_of


def has_own_head(stored: Mapping[str, StoredTensor]) -> bool:
    """Whether a head is stored that differs from the embedding."""
    head, embedding = stored.get(HEAD), stored.get(EMBEDDING)
    if head is None or embedding is None:
        return False
    if (head.path, head.key) == (embedding.path, embedding.key):
        return False  # one tensor for both
    readable = {head.dtype, embedding.dtype} <= {*safetensors_files.FLOATS}
    if head.shape != embedding.shape or len(head.shape) != 2 or not readable:
        return True
    with safetensors_files.opened(head) as one, safetensors_files.opened(embedding) as other:
        starts = range(0, head.shape[0], _ROWS)
        parts = [slice(i, min(i + _ROWS, head.shape[0])) for i in starts]
        return not all(np.array_equal(one[part], other[part]) for part in parts)


def is_extra(name: str, config: model_config.LlamaConfig) -> bool:
    """Whether a tensor belongs to no module of the model, such as the head of another task."""
    if name in (HEAD, EMBEDDING, "model.norm.weight") or is_buffer(name):
        return False
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer:
        return int(layer[1]) >= config.num_hidden_layers
    return not name.startswith(("model.norm.", "model.embed_tokens.", "lm_head."))


def is_buffer(name: str) -> bool:
    """Whether a tensor is a constant that older versions of transformers saved."""
    return name.endswith(("rotary_emb.inv_freq", ".masked_bias", ".attn.bias"))


def _name(key: str, model_type: str) -> str:
    name = names.inner(names.unwrapped(key), model_type)
    if name.startswith(("layers.", "embed_tokens.", "norm.")):
        return f"model.{name}"
    if name.startswith(("model.model.", "model.lm_head.")):
        return name.removeprefix("model.")
    return name
