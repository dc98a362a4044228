"""A changed copy of a model's folder, written tensor by tensor; it is there once it is whole."""

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
from lora_jax.checkpoints import safetensors_files
from lora_jax.checkpoints.safetensors_files import Kind

SHARD = 5 * 10**9  # bytes of a file, at most, unless one part has more


class Part(NamedTuple):
    """Tensors that are made together.

    name: for who watches; kinds: what they will be; late: those of a length that is not yet known;
    make: computes them.
    """

    name: str
    kinds: Mapping[str, Kind]
    make: Callable[[], Mapping[str, np.ndarray]]
    late: Collection[str] = ()

    @property
    def num_bytes(self) -> int:
        return sum(kind.num_bytes for kind in self.kinds.values())


def unchanged(stored: safetensors_files.Stored, name: str | None = None) -> Part:
    """A tensor as it is in the source, under its own name or another."""
    name = name or stored.name
    return Part(name, {name: Kind(stored.dtype, stored.shape)}, lambda: {name: stored.value()})


@contextlib.contextmanager
def new_folder(into: pathlib.Path, num_bytes: int) -> Iterator[pathlib.Path]:
    """A folder under another name, which becomes `into` at the end, or is removed.

    Raises: UserError for a full disk, and a folder that holds anything.
    """
    refuse_occupied(into)
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(into.parent).free
        if free < num_bytes:
            raise errors.UserError(
                expected=f"at least {-(-num_bytes >> 20)} MiB free",
                found=f"{free >> 20} MiB free",
                where=str(into.parent),
                do="free some space, or choose an --output-dir on another disk",
            )
        written = pathlib.Path(tempfile.mkdtemp(prefix=f"{into.name}.part-", dir=into.parent))
        try:
            yield written
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


def write(
    source: pathlib.Path,
    folder: pathlib.Path,
    parts: Sequence[Part],
    config: Mapping[str, Any],
    *,
    shard: int = SHARD,
) -> Iterator[str]:
    """Writes the parts and a config.json to `folder`, and what lies beside weights in `source`.

    Yields the name of each part when it is done.
    """
    yield from _write_weights(folder, parts, shard)
    for file in hub.beside_weights(source):
        shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def refuse_occupied(into: pathlib.Path) -> None:
    """Raises: UserError unless `into` is a new or an empty folder."""
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise errors.UserError(
            expected="a new or an empty folder to write to",
            found="one that holds files" if into.is_dir() else "a file",
            where=str(into),
            do="choose another --output-dir, or remove this one",
        )


def _write_weights(folder: pathlib.Path, parts: Sequence[Part], shard: int) -> Iterator[str]:
    files: list[list[Part]] = [[]]
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
        with safetensors_files.Writer(folder / name, kinds, late) as writer:
            for part in held:
                for tensor, array in part.make().items():
                    writer.write(tensor, array)
                    places[tensor] = name
                    total += array.nbytes
                yield part.name
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
