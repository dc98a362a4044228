"""Files that may be compressed, as bytes. Imports no jax."""

import bz2
import gzip
import io
import lzma
import pathlib
import zlib

SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
# What reading a file that is damaged or cut off raises.
ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)

_CHUNK = 2**20


def name(path: pathlib.Path) -> pathlib.PurePath:
    """The name of a file without a suffix of compression, in small letters."""
    plain = pathlib.PurePath(path.name.lower())
    return plain.with_suffix("") if plain.suffix in SUFFIXES else plain


def opened(path: pathlib.Path) -> io.BufferedIOBase:
    """The content of a file, decompressed if its first bytes say that it is compressed.

    The bytes decide, not the name: browsers store x.jsonl.gz decompressed under that name.
    """
    with path.open("rb") as file:
        first = file.read(6)
    for magic, open_it in _OPENERS.items():
        if first.startswith(magic):
            return open_it(path)
    return path.open("rb")


def is_compressed(path: pathlib.Path) -> bool:
    """Whether the first bytes of a file say that it is compressed."""
    with path.open("rb") as file:
        return file.read(6).startswith(tuple(_OPENERS))


def skip(file: io.BufferedIOBase, count: int) -> None:
    """Moves on by `count` bytes."""
    if file.seekable():
        file.seek(count)
        return
    while count and (chunk := file.read(min(count, _CHUNK))):
        count -= len(chunk)


def _zstandard(path: pathlib.Path) -> io.BufferedIOBase:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_OPENERS = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstandard,
}
