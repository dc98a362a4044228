"""A quantized copy of a dense checkpoint, which later loads in seconds.

int8 and int4 in a layout of our own; NF4 and FP4 in bitsandbytes', which transformers reads too.
"""

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lora_jax import errors
from lora_jax.checkpoints import copy as copying
from lora_jax.checkpoints import loader, storage
from lora_jax.checkpoints.safetensors_files import Stored
from lora_jax.models import config as model_config
from lora_jax.models import quantization_config as model_quantization


class Copy(NamedTuple):
    """What `write` does: its parts, and how many of them load dense all the same.

    Those are linear layers in which blocks of NF4 or FP4 reach from one row into the next.
    num_bytes: of the tensors as they are in the source.
    """

    fmt: str
    parts: list[copying.Part]
    num_crossing: int
    num_bytes: int


def plan(folder: pathlib.Path, fmt: str, *, search: bool = True) -> Copy:
    """What there is to write of the model in `folder`. search: see formats.quantize.

    Raises: UserError for what checkpoint.load refuses, and a model that is quantized already.
    """
    config = model_config.load(folder)
    if config.quantization is not None:
        raise errors.UserError(
            expected="a model that is not quantized yet",
            found=f"{config.quantization.fmt} ({config.quantization.method})",
            where=str(folder),
            do="name the model before it was quantized",
        )
    linears, others = (part.values() for part in loader.contents(folder, config))
    parts, crossing = [copying.unchanged(stored) for stored in others], 0
    for stored in linears:
        columns, rows = stored.shape
        kinds = {f"{_module(stored)}.{name}": kind
                 for name, kind in storage.kinds(fmt, rows, columns).items()}  # fmt: skip
        known = {name: kind for name, kind in kinds.items() if kind is not None}
        make = functools.partial(_quantized, stored, fmt, search)
        parts.append(copying.Part(stored.name, known, make, kinds.keys() - known.keys()))
        crossing += fmt not in model_quantization.OWN and rows % storage.BNB_BLOCK != 0
    return Copy(fmt, parts, crossing, sum(stored.num_bytes for stored in (*linears, *others)))


def write(
    folder: pathlib.Path, into: pathlib.Path, copy: Copy, *, shard: int = copying.SHARD
) -> Iterator[str]:
    """Writes `plan(folder, …)` to the new folder `into`, which is there only once it is whole.

    Yields the name of each tensor of the source when it is done.
    Raises: UserError for values that are not finite, a full disk, a folder that holds anything.
    """
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = _declaration(copy.fmt, raw)
    with copying.new_folder(into, sum(part.num_bytes for part in copy.parts)) as written:
        yield from copying.write(folder, written, copy.parts, raw, shard=shard)


def _quantized(stored: Stored, fmt: str, search: bool) -> dict[str, np.ndarray]:
    """The tensors of one linear layer. Raises: UserError for a NaN or infinity."""
    found = storage.store(fmt, stored.value(), search=search)
    if not all(np.isfinite(a).all() for a in found.values() if a.dtype == np.float32):
        raise errors.UserError(
            expected="finite weights",
            found=f"NaN or infinity in {stored.name}",
            where=str(stored.path),
            do="take another revision of the model",
        )
    return {f"{_module(stored)}.{name}": array for name, array in found.items()}


def _declaration(fmt: str, raw: dict[str, Any]) -> dict[str, Any]:
    """config.json's quantization_config."""
    if fmt in model_quantization.OWN:
        version = model_quantization.VERSION
        return {"quant_method": "lora_jax", "format": fmt, "version": version}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": model_config.stored_dtype(raw),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": fmt.removesuffix("-dq"),
        "bnb_4bit_use_double_quant": fmt.endswith("-dq"),
        "llm_int8_skip_modules": ["lm_head"],
    }


def _module(stored: Stored) -> str:
    return stored.name.removesuffix(".weight")
