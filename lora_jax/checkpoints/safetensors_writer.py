"""Writes a safetensors file tensor by tensor, in any order, without holding it in memory."""

import json
import math
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.checkpoints.safetensors_files import DTYPES

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32",
         "int32": "I32", "int8": "I8", "uint8": "U8", "float64": "F64", "int64": "I64",
         "bool": "BOOL"}  # of dtypes, by numpy's names  # fmt: skip


class TensorSpec(NamedTuple):
    """A tensor's dtype, as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype]


def spec_of(array: np.ndarray | jax.ShapeDtypeStruct) -> TensorSpec:
    """The dtype and shape that an array has in a file."""
    return TensorSpec(NAMES[np.dtype(array.dtype).name], tuple(array.shape))


class Writer:
    """Writes a safetensors file, with its tensors in any order.

    specs: of all tensors except the late ones. late: names of short texts whose lengths are not
    known in advance.
    """

    def __init__(self, path: pathlib.Path, specs: Mapping[str, TensorSpec], late: Collection[str]):
        self._entries: dict[str, Any] = {}
        self._late, self._end = set(late), 0
        # The widest dtype first, so that each tensor starts at a multiple of its dtype's size.
        for name, each in sorted(specs.items(), key=lambda item: (-DTYPES[item[1].dtype], item[0])):
            self._add(name, each)
        late_entries = {name: _entry(TensorSpec("U8", (0,)), self._end) for name in late}
        # Room for the header, which is written last and padded with blanks.
        room = len(_header(self._entries | late_entries)) + 32 * len(late_entries)
        self._room = room + -room % 8
        self._left = specs.keys() | late
        self._file = path.open("wb")

    def write(self, name: str, array: np.ndarray) -> None:
        """Raises: ValueError if the dtype or shape differs from the tensor's spec."""
        if name in self._late:
            self._add(name, spec_of(array))
        entry = self._entries[name]
        if entry != _entry(spec_of(array), entry["data_offsets"][0]):
            raise ValueError(f"expected {name} as {entry}, found {spec_of(array)}")
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

    def _add(self, name: str, each: TensorSpec) -> None:
        self._entries[name] = _entry(each, self._end)
        self._end += each.num_bytes


def _entry(each: TensorSpec, start: int) -> dict[str, Any]:
    offsets = [start, start + each.num_bytes]
    return {"dtype": each.dtype, "shape": list(each.shape), "data_offsets": offsets}


def _header(entries: Mapping[str, Any]) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
