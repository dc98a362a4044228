"""Tensors in safetensors files: found by their headers, read part by part, written in a stream."""

import contextlib
import functools
import json
import math
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax import errors, hub

DTYPES = {  # bytes each, by safetensors' names
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}
FLOATS = ("BF16", "F16", "F32")
_NUMPY = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32",
          "int32": "I32", "int8": "I8", "uint8": "U8"}  # fmt: skip


class Stored(NamedTuple):
    """Where a tensor lies on disk, and its shape and dtype there."""

    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype]

    def value(self) -> np.ndarray:
        """The whole tensor."""
        with safetensors.safe_open(self.path, "numpy") as reader:
            return reader.get_tensor(self.name)


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


@contextlib.contextmanager
def opened(stored: Stored) -> Iterator[Any]:
    """What is indexed to read a part of the tensor."""
    # Opened anew for each tensor: a mapped file's pages count as memory until it is closed.
    with safetensors.safe_open(stored.path, "numpy") as reader:
        yield reader.get_slice(stored.name)


def read(stored: Stored, mesh: Mesh, spec: Sequence[str | None]) -> jax.Array:
    """The tensor as it lies on disk, cut over the mesh as `place` does.

    Of it only the parts are read that devices of this process hold, each once.
    """
    with opened(stored) as part:
        return place(
            stored.shape, mesh, spec, lambda *axes: part[tuple(slice(*axis) for axis in axes)]
        )


def place(
    shape: Sequence[int],
    mesh: Mesh,
    spec: Sequence[str | None],
    part: Callable[..., np.ndarray],
) -> jax.Array:
    """The array whose `part((start, stop), …)` each device of the mesh gets, by axes of `spec`.

    An axis that the mesh does not divide stays whole: one may be padded later, and cut then.
    """
    spec = PartitionSpec(
        *(None if name and size % mesh.shape[name] else name
          for size, name in zip(shape, spec, strict=False))
    )  # fmt: skip
    part = functools.cache(part)
    return jax.make_array_from_callback(
        tuple(shape),
        NamedSharding(mesh, spec),
        lambda index: part(*(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))),
    )


class Kind(NamedTuple):
    """A tensor's dtype, by safetensors' name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype]


def kind(array: np.ndarray | jax.ShapeDtypeStruct) -> Kind:
    """What an array is in a file."""
    return Kind(_NUMPY[np.dtype(array.dtype).name], tuple(array.shape))


class Writer:
    """A safetensors file whose tensors are written as they come, in any order.

    kinds: of all of them but those `late`, short texts whose length is not known before.
    """

    def __init__(self, path: pathlib.Path, kinds: Mapping[str, Kind], late: Collection[str]):
        self._entries: dict[str, Any] = {}
        self._late, self._end = set(late), 0
        # The widest first: each then lies at a multiple of its dtype's size.
        for name, each in sorted(kinds.items(), key=lambda item: (-DTYPES[item[1].dtype], item[0])):
            self._add(name, each)
        late_entries = {name: _entry(Kind("U8", (0,)), self._end) for name in late}
        # Room for the header, which is written last, and filled up with blanks.
        room = len(_header(self._entries | late_entries)) + 32 * len(late_entries)
        self._room = room + -room % 8
        self._left = kinds.keys() | late
        self._file = path.open("wb")

    def write(self, name: str, array: np.ndarray) -> None:
        """Raises: ValueError for another dtype or shape than the one that was told."""
        if name in self._late:
            self._add(name, kind(array))
        entry = self._entries[name]
        if entry != _entry(kind(array), entry["data_offsets"][0]):
            raise ValueError(f"expected {name} as {entry}, found {kind(array)}")
        self._file.seek(8 + self._room + entry["data_offsets"][0])
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._left = self._left - {name}

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        with self._file:
            if error is None:
                if self._left:
                    raise ValueError(f"expected these tensors too: {sorted(self._left)}")
                self._file.seek(0)
                header = _header(self._entries).ljust(self._room)
                self._file.write(len(header).to_bytes(8, "little") + header)

    def _add(self, name: str, each: Kind) -> None:
        self._entries[name] = _entry(each, self._end)
        self._end += each.num_bytes


def _entry(each: Kind, start: int) -> dict[str, Any]:
    offsets = [start, start + each.num_bytes]
    return {"dtype": each.dtype, "shape": list(each.shape), "data_offsets": offsets}


def _header(entries: Mapping[str, Any]) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
