"""Writing a model folder tensor by tensor; the folder appears only when it is complete."""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax import errors, hub
from lora_jax.checkpoints import finite, free_space, safetensors_files, safetensors_writer
from lora_jax.checkpoints.safetensors_writer import TensorSpec

SHARD = 5 * 10**9  # the most bytes of a file, unless a single part is larger


class Part(NamedTuple):
    """Tensors that are computed together.

    name: what progress reports show. specs: their dtypes and shapes. make: computes them.
    late: the names of those whose length is not known in advance.
    """

    name: str
    specs: Mapping[str, TensorSpec]
    make: Callable[[], Mapping[str, np.ndarray]]
    late: Collection[str] = ()

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs.values())


def unchanged(stored: safetensors_files.StoredTensor, name: str | None = None) -> Part:
    """A tensor of the source, not changed, under its own name or another; see finite.check."""
    name = name or stored.name
    spec = TensorSpec(stored.dtype, stored.shape)
    return Part(name, {name: spec}, lambda: {name: finite.check(stored.value(), stored)})


@contextlib.contextmanager
def new_folder(into: pathlib.Path, num_bytes: int) -> Iterator[pathlib.Path]:
    """A temporary folder that is renamed to `into` at the end, or removed after an error.

    Raises: UserError if the disk is full or `into` holds files.
    """
    refuse_occupied(into)
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        free_space.check(into.parent, num_bytes, "the model")
        around = pathlib.Path(tempfile.mkdtemp(prefix=f"{into.name}.part-", dir=into.parent))
        try:
            written = around / into.name  # with the mode of the umask, unlike mkdtemp's
            written.mkdir()
            yield written
            os.replace(written, into)
        finally:
            shutil.rmtree(around, ignore_errors=True)
    except OSError as error:
        raise errors.UserError(
            expected="a folder that can be written",
            found=error.strerror or str(error),
            where=str(into),
            do="free some space, or choose another --output-dir",
        ) from error


def write(
    source: pathlib.Path,
    folder: pathlib.Path,
    parts: Sequence[Part],
    config: Mapping[str, Any],
    *,
    shard: int = SHARD,
) -> Iterator[str]:
    """Writes the parts, a config.json and a copy of the tokenizer files in `source` to `folder`.

    Yields the name of each part when it is written.
    """
    yield from _write_weights(folder, parts, shard)
    for file in hub.beside_weights(source):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def refuse_occupied(into: pathlib.Path) -> None:
    """Raises: UserError unless `into` is new or an empty folder."""
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise errors.UserError(
            expected="a new or an empty folder to write to",
            found="a folder that holds files" if into.is_dir() else "a file",
            where=str(into),
            do="choose another --output-dir, or remove this one",
        )


def _write_weights(folder: pathlib.Path, parts: Sequence[Part], shard: int) -> Iterator[str]:
    files: list[list[Part]] = [[]]
    for part in parts:
        if files[-1] and sum(p.num_bytes for p in files[-1]) + part.num_bytes > shard:
            files.append([])
        files[-1].append(part)
    file_of: dict[str, str] = {}
    total = 0
    for number, held in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        name = name if len(files) > 1 else "model.safetensors"
        specs = dict(itertools.chain.from_iterable(part.specs.items() for part in held))
        late = [text for part in held for text in part.late]
        with safetensors_writer.Writer(folder / name, specs, late) as writer:
            for part in held:
                for tensor, array in part.make().items():
                    writer.write(tensor, array)
                    file_of[tensor] = name
                    total += array.nbytes
                yield part.name
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
