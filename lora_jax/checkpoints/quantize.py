"""A quantized copy of a dense checkpoint, which loads in seconds.

Of a composite model the language model is quantized; all else stays as it is.

int8 and int4 are stored in lora_jax's own layout, NF4 and FP4 in bitsandbytes', which transformers
reads too.
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lora_jax import errors
from lora_jax.checkpoints import finite, inventory, model_folder, storage, whole, writer
from lora_jax.checkpoints.safetensors_files import StoredTensor
from lora_jax.checkpoints.storage import bitsandbytes
from lora_jax.models import composite, quantization_config
from lora_jax.models import config as model_config


class Copy(NamedTuple):
    """What `write` will write.

    num_crossing: how many linear layers will load dense nevertheless, because their blocks of NF4
    or FP4 reach from one row into the next. num_bytes: of the tensors in the source.
    """

    fmt: str
    parts: list[writer.Part]
    num_crossing: int
    num_bytes: int


def plan(folder: pathlib.Path, fmt: str, *, search: bool = True) -> Copy:
    """What to write for the model in `folder`. search: see formats.quantize.

    Raises: UserError if the model is quantized already, or loader.load would raise one.
    """
    config = model_folder.config(folder)
    if config.quantization is not None:
        raise errors.UserError(
            expected="a model that is not quantized yet",
            found=str(config.quantization),
            where=str(folder),
            do="pass the model before quantization",
        )
    linears, others = (part.values() for part in inventory.contents(folder, config))
    parts, crossing = [writer.unchanged(stored) for stored in others], 0
    for stored in linears:
        columns, rows = stored.shape
        specs = {f"{_module(stored)}.{name}": spec
                 for name, spec in storage.tensor_specs(fmt, rows, columns).items()}  # fmt: skip
        known = {name: spec for name, spec in specs.items() if spec is not None}
        make = functools.partial(_quantized, stored, fmt, search)
        parts.append(writer.Part(stored.name, known, make, specs.keys() - known.keys()))
        crossing += fmt not in quantization_config.NATIVE and rows % bitsandbytes.BLOCK != 0
    source = (*linears, *others, *model_folder.beside(folder, config).values())
    num_bytes = sum(stored.num_bytes for stored in source)
    return Copy(fmt, whole.parts(folder, config, parts), crossing, num_bytes)


def write(
    folder: pathlib.Path, into: pathlib.Path, copy: Copy, *, shard: int = writer.SHARD
) -> Iterator[str]:
    """Writes `plan(folder, …)` to the new folder `into`, which appears only when it is complete.

    Yields the name of each tensor of the source when it is written.
    Raises: UserError if a value is not finite, the disk is full or `into` holds files.
    """
    raw = composite.without(model_folder.read(folder), quantization_config.KEYS)
    raw["quantization_config"] = _declaration(copy.fmt, raw)
    with writer.new_folder(into, sum(part.num_bytes for part in copy.parts)) as written:
        yield from writer.write(folder, written, copy.parts, raw, shard=shard)


def _quantized(stored: StoredTensor, fmt: str, search: bool) -> dict[str, np.ndarray]:
    """The tensors of one linear layer. Raises: UserError if a value is NaN or infinite."""
    found = storage.quantize(fmt, finite.check(stored.value(), stored), search=search)
    return {f"{_module(stored)}.{name}": array for name, array in found.items()}


def _declaration(fmt: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The quantization_config for config.json."""
    around = composite.of(raw)
    beside = around.beside if around else ()
    if fmt in quantization_config.NATIVE:
        version = quantization_config.VERSION
        return {"quant_method": "lora_jax", "format": fmt, "version": version}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": model_config.stored_dtype(raw),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": fmt.removesuffix("-dq"),
        "bnb_4bit_use_double_quant": fmt.endswith("-dq"),
        "llm_int8_skip_modules": ["lm_head", *(f"model.{name}" for name in beside)],
    }


def _module(stored: StoredTensor) -> str:
    return stored.name.removesuffix(".weight")
