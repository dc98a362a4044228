"""Tensors in safetensors files: listed from the headers, and read in parts, onto devices."""

import contextlib
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax import errors, hub
from lora_jax.checkpoints import finite

DTYPES = {  # bytes each, by safetensors' names
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2"), 1),
}
FLOATS = ("BF16", "F16", "F32")
_WIDENED = {  # read as float32; JAX has no float64, and safetensors' reader no float8
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_READ_AS_ANOTHER = {**_WIDENED, "F8_E8M0": ml_dtypes.float8_e8m0fnu, "I8": np.int8}


class StoredTensor(NamedTuple):
    """A tensor on disk: its file, and the name, shape and dtype that it is read as.

    key, stored_as: its name and dtype in the file, where they are others. scale: what its values
    are multiplied by, one number for each block, and `factor`; see scaled.py.
    """

    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    key: str | None = None
    stored_as: str | None = None
    scale: "StoredTensor | None" = None
    factor: float = 1

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype]

    def value(self) -> np.ndarray:
        """The whole tensor."""
        if self.stored_as is not None:
            return _Converted(self)[...]
        with safetensors.safe_open(self.path, "numpy") as reader:
            return reader.get_tensor(self.key or self.name)

    def widened(self) -> "StoredTensor":
        """The same tensor, read as float32 if its dtype is float64 or float8."""
        if self.dtype not in _WIDENED:
            return self
        return self._replace(dtype="F32", stored_as=self.dtype)


_ADAPTER = "adapter_model.safetensors"  # PEFT's


def tensors(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """{name: tensor} of the folder's safetensors files, from their headers alone.

    Raises: UserError if there are only pickles, or a shard is missing, truncated or a git-lfs
    pointer.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():  # precedes an index, as in transformers
        files = [folder / "model.safetensors"]
    elif index.exists():
        hub.refuse_lfs_pointer(index)
        files = sorted({folder / name for name in _weight_map(index).values()})
    else:
        files = sorted({*folder.glob("*.safetensors")} - {folder / _ADAPTER})
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise errors.UserError(
            expected="every shard that model.safetensors.index.json names",
            found=[f"no {name}" for name in missing],
            where=str(folder),
            do="download the missing files",
        )
    if not files and (folder / _ADAPTER).exists():  # beside a config.json, as axolotl writes it
        raise errors.UserError(
            expected="weights in *.safetensors",
            found=f"an adapter, {_ADAPTER}, without its base",
            where=str(folder),
            do="pass the base, and this folder with --adapter, or with --init-adapter to train",
        )
    if not files:
        raise _no_safetensors(folder)
    stored, damaged = {}, []
    for file in files:
        hub.refuse_lfs_pointer(file)
        try:
            with safetensors.safe_open(file, "numpy") as reader:
                for name in reader.keys():  # noqa: SIM118 (not a dict: it has no __iter__)
                    part = reader.get_slice(name)
                    stored[name] = StoredTensor(
                        file, name, tuple(part.get_shape()), part.get_dtype()
                    )
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            damaged.append(f"{file.name}: {error}")
    if damaged:
        raise errors.UserError(
            expected="whole safetensors files",
            found=damaged,
            where=str(folder),
            do="download these files again; they are truncated or not safetensors",
        )
    return stored


def _no_safetensors(folder: pathlib.Path) -> errors.UserError:
    pickles = [p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in folder.glob(pattern)]
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    found, how = "no weights", "dtype='auto'"
    if pickles:
        found = f"only {', '.join(pickles)}: a pickle can run code, so it is not read"
    elif ggufs:
        found, how = f"only {', '.join(ggufs)}: GGUF is not read", f"gguf_file='{ggufs[0]}'"
    return errors.UserError(
        expected="weights in *.safetensors",
        found=found,
        where=str(folder),
        do="use a revision with safetensors, or convert it where torch is installed: "
        'python -c "import transformers as t; t.AutoModelForCausalLM.from_pretrained('
        f"'{folder}', {how}).save_pretrained('NEW_FOLDER')\"; and copy the tokenizer",
    )


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("a file name that is no text")
        return weight_map
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise errors.UserError(
            expected='JSON with a "weight_map" of tensor names to file names',
            found=f"{type(error).__name__}: {error}",
            where=str(index),
            do="download the file again",
        ) from None


@contextlib.contextmanager
def opened(stored: StoredTensor) -> Iterator[Any]:
    """A slice of the file: index it to read a part of the tensor."""
    if stored.stored_as is not None:
        yield _Converted(stored)
        return
    # The file is opened for each tensor, as mapped pages count as memory until it is closed.
    with safetensors.safe_open(stored.path, "numpy") as reader:
        yield reader.get_slice(stored.key or stored.name)


class _Converted:
    """A tensor that is read in another dtype than its own; index it to read a part."""

    def __init__(self, stored: StoredTensor):
        with stored.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))[stored.key or stored.name]
        begin = 8 + length + entry["data_offsets"][0]
        dtype = _READ_AS_ANOTHER[stored.stored_as or stored.dtype]
        self._array = np.memmap(stored.path, dtype, "r", begin, stored.shape)
        self._stored = stored

    def __getitem__(self, index: Any) -> np.ndarray:
        values = np.asarray(self._array[index]).astype(np.float32)
        if self._stored.scale is None:
            return values
        values *= _expanded(self._stored.scale, self._stored.shape, index)
        values *= np.float32(self._stored.factor)
        return values.astype(ml_dtypes.bfloat16) if self._stored.dtype == "BF16" else values


def _expanded(scale: StoredTensor, shape: tuple[int, ...], index: Any) -> np.ndarray:
    """A part of the array [N, K] that has each scale in all places of its block.

    [N, 1] where all columns have the same.
    """
    index = (index if isinstance(index, tuple) else (index,)) + (slice(None),)
    rows, columns = (
        np.arange(size)[part] // block_size(size, blocks)
        for size, part, blocks in zip(shape, index[:2], scale.shape, strict=True)
    )
    scales = scale.value().reshape(scale.shape).astype(np.float32)
    # Columns first: to copy whole rows then takes a fifth of the time.
    return (scales if scales.shape[1] == 1 else scales[:, columns])[rows]


def block_size(size: int, blocks: int) -> int:
    """The size of the blocks, a power of two, that `blocks` of them divide `size` into."""
    return 1 << (-(-size // blocks) - 1).bit_length()


def read(stored: StoredTensor, mesh: Mesh, spec: Sequence[str | None]) -> jax.Array:
    """The tensor as it is on disk, cut over the mesh as in `place`.

    Reads only the parts that devices of this process hold, each once.
    Raises: UserError if a value in them is NaN or infinite.
    """
    with opened(stored) as whole:

        def part(*axes: tuple[int, int]) -> np.ndarray:
            return finite.check(whole[tuple(slice(*axis) for axis in axes)], stored)

        return place(stored.shape, mesh, spec, part)


def place(
    shape: Sequence[int],
    mesh: Mesh,
    spec: Sequence[str | None],
    part: Callable[..., np.ndarray],
) -> jax.Array:
    """An array of this shape, cut over the mesh axes in `spec`; a device's part is
    `part((start, stop), …)`, with one pair an axis.

    An axis that the mesh does not divide stays whole; it may be padded and cut later.
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
