"""A quantised copy of a dense checkpoint, written tensor by tensor, which later loads in seconds.

int8 and int4 in a layout of our own; NF4 and FP4 in bitsandbytes', which transformers reads too.
"""

import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lora_jax import checkpoint, errors, hub, storage, tensorfiles
from lora_jax.models import config as model_config
from lora_jax.models import quantisation as model_quantisation
from lora_jax.tensorfiles import Kind, Stored

SHARD = 5 * 10**9  # bytes of a file, at most, unless one module has more


class Copy(NamedTuple):
    """What `write` does: its parts, and how many of them load dense all the same.

    Those are linear layers in which blocks of NF4 or FP4 reach from one row into the next.
    """

    parts: list["_Part"]
    num_crossing: int
    num_bytes: int


class _Part(NamedTuple):
    """A tensor of the source, and what becomes of it. late: tensors of a length not yet known."""

    stored: Stored
    fmt: str | None  # None: it stays as it is
    kinds: dict[str, Kind]
    late: list[str]

    @property
    def num_bytes(self) -> int:
        return sum(kind.num_bytes for kind in self.kinds.values())

    def tensors(self, search: bool) -> dict[str, np.ndarray]:
        """Of the part, once it is read and quantised. Raises: UserError for a NaN or infinity."""
        if self.fmt is None:
            return {self.stored.name: self.stored.value()}
        found = storage.store(self.fmt, self.stored.value(), search=search)
        if not all(np.isfinite(a).all() for a in found.values() if a.dtype == np.float32):
            raise errors.UserError(
                expected="finite weights",
                found=f"NaN or infinity in {self.stored.name}",
                where=str(self.stored.path),
                do="take another revision of the model",
            )
        return {f"{_module(self.stored)}.{name}": array for name, array in found.items()}


def plan(folder: pathlib.Path, fmt: str) -> Copy:
    """What there is to write of the model in `folder`.

    Raises: UserError for what checkpoint.load refuses, and a model that is quantised already.
    """
    config = model_config.load(folder)
    if config.quantisation is not None:
        raise errors.UserError(
            expected="a model that is not quantised yet",
            found=f"{config.quantisation.fmt} ({config.quantisation.method})",
            where=str(folder),
            do="name the model before it was quantised",
        )
    linears, others = checkpoint.contents(folder, config)
    parts = [_Part(stored, None, {stored.name: Kind(stored.dtype, stored.shape)}, [])
             for stored in others]  # fmt: skip
    crossing = 0
    for stored in linears:
        columns, rows = stored.shape
        kinds = {f"{_module(stored)}.{name}": kind
                 for name, kind in storage.kinds(fmt, rows, columns).items()}  # fmt: skip
        known = {name: kind for name, kind in kinds.items() if kind is not None}
        parts.append(_Part(stored, fmt, known, [*(kinds.keys() - known.keys())]))
        crossing += fmt not in model_quantisation.OWN and rows % storage.BNB_BLOCK != 0
    return Copy(parts, crossing, sum(part.num_bytes for part in parts))


def write(
    folder: pathlib.Path, into: pathlib.Path, copy: Copy, *, search: bool = True, shard: int = SHARD
) -> Iterator[str]:
    """Writes `plan(folder, …)` to the new folder `into`, which is there only once it is whole.

    Yields the name of each tensor of the source when it is done. search: see formats.quantise.
    Raises: UserError for values that are not finite, a full disk, a folder that holds anything.
    """
    refuse_occupied(into)
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(into.parent).free
        if free < copy.num_bytes:
            raise errors.UserError(
                expected=f"{copy.num_bytes >> 20} MiB free",
                found=f"{free >> 20} MiB",
                where=str(into.parent),
                do="free some space, or choose an --output-dir on another disk",
            )
        # Under another name until then.
        written = pathlib.Path(tempfile.mkdtemp(prefix=f"{into.name}.part-", dir=into.parent))
        try:
            yield from _write_weights(written, copy.parts, search, shard)
            for file in hub.beside_weights(folder):
                shutil.copyfile(file, written / file.name)
            raw = json.loads((folder / "config.json").read_text())
            fmt = next(part.fmt for part in copy.parts if part.fmt)
            raw["quantization_config"] = _declaration(fmt, raw)
            (written / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
            written.chmod(0o755)  # tempfile's are for one user
            os.replace(written, into)
        finally:
            shutil.rmtree(written, ignore_errors=True)
    except OSError as error:
        raise errors.UserError(
            expected="a folder that can be written",
            found=error.strerror or str(error),
            where=str(into),
            do="free some space, or choose another --output-dir",
        ) from error


def refuse_occupied(into: pathlib.Path) -> None:
    """Raises: UserError unless `into` is a new or an empty folder."""
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise errors.UserError(
            expected="a new or an empty folder to write to",
            found="one that holds files" if into.is_dir() else "a file",
            where=str(into),
            do="choose another --output-dir, or remove this one",
        )


def _write_weights(
    folder: pathlib.Path, parts: list[_Part], search: bool, shard: int
) -> Iterator[str]:
    files: list[list[_Part]] = [[]]
    for part in parts:
        if files[-1] and sum(p.num_bytes for p in files[-1]) + part.num_bytes > shard:
            files.append([])
        files[-1].append(part)
    places: dict[str, str] = {}
    total = 0
    for number, held in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        name = name if len(files) > 1 else "model.safetensors"
        kinds = dict(itertools.chain.from_iterable(part.kinds.items() for part in held))
        late = [text for part in held for text in part.late]
        with tensorfiles.Writer(folder / name, kinds, late) as writer:
            for part in held:
                for tensor, array in part.tensors(search).items():
                    writer.write(tensor, array)
                    places[tensor] = name
                    total += array.nbytes
                yield part.stored.name
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _declaration(fmt: str, raw: dict[str, Any]) -> dict[str, Any]:
    """config.json's quantization_config."""
    if fmt in model_quantisation.OWN:
        version = model_quantisation.VERSION
        return {"quant_method": "lora_jax", "format": fmt, "version": version}
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": fmt.removesuffix("-dq"),
        "bnb_4bit_use_double_quant": fmt.endswith("-dq"),
        "llm_int8_skip_modules": ["lm_head"],
    }


def _module(stored: Stored) -> str:
    return stored.name.removesuffix(".weight")
