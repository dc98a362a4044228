"""Files that may be compressed, as bytes. Imports no jax."""

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import pathlib
import zipfile
import zlib

from lora_jax import errors

SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip")
# What reading a file that is damaged or cut off raises.
ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)

SAVE_SHEET = "save the sheet as CSV UTF-8, in Excel with File > Save As"

_CHUNK = 2**20


def name(path: pathlib.Path) -> pathlib.PurePath:
    """The name of a file without a suffix of compression, in small letters."""
    plain = pathlib.PurePath(path.name.lower())
    return plain.with_suffix("") if plain.suffix in SUFFIXES else plain


def content_name(path: pathlib.Path) -> pathlib.PurePath:
    """The same; that of a .zip without another suffix is the name of the file in it.

    Raises: UserError if an archive has several.
    """
    plain = name(path)
    if path.suffix.lower() == ".zip" and not plain.suffix and zipfile.is_zipfile(path):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            return pathlib.PurePath(_only_member(archive, path).filename.lower())
    return plain


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


def _by_arrow(path: pathlib.Path, compression: str) -> io.BufferedIOBase:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression))


def _zip(path: pathlib.Path) -> io.BufferedIOBase:
    archive = zipfile.ZipFile(path)
    return io.BufferedReader(archive.open(_only_member(archive, path)))


def _only_member(archive: zipfile.ZipFile, path: pathlib.Path) -> zipfile.ZipInfo:
    """The one file in an archive. Raises: UserError if there are others, or it has a password."""
    members = [
        each for each in archive.infolist()
        if not each.is_dir() and not each.filename.startswith("__MACOSX/")
    ]  # fmt: skip
    if len(members) == 1 and not members[0].flag_bits & 1:
        return members[0]
    if any(each.filename.startswith("xl/") for each in members):
        raise errors.UserError("a data file", "an Excel workbook", str(path), SAVE_SHEET)
    names = [f"{len(members)} files", *(each.filename for each in members)]
    raise errors.UserError(
        expected="a .zip with one data file in it",
        found="a file with a password" if len(members) == 1 else names,
        where=str(path),
        do="unpack it, and pass the folder or one of its files",
    )


_OPENERS = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": functools.partial(_by_arrow, compression="zstd"),
    b"\x04\x22\x4d\x18": functools.partial(_by_arrow, compression="lz4"),
    b"PK\x03\x04": _zip,
}
