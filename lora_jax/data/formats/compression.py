"""Files that may be compressed, as bytes. Imports no jax.

A file in a .zip has the path of the archive with its own name below it: data.zip/train.jsonl.
"""

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import os
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

    Raises: UserError if an archive has several, or is damaged.
    """
    plain = name(path)
    if path.suffix.lower() == ".zip" and not plain.suffix and path.is_file():
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            return pathlib.PurePath(_only_member(archive, path).filename.lower())
        raise errors.UserError(
            expected="a .zip archive",
            found="a file that is none, or an archive that is cut off or damaged",
            where=str(path),
            do="download it again, or pass the files themselves",
        )
    return plain


def opened(path: pathlib.Path) -> io.BufferedIOBase:
    """The content of a file, decompressed if its first bytes say that it is compressed.

    The bytes decide, not the name: browsers store x.jsonl.gz decompressed under that name.
    """
    member = _in_archive(path)
    file = path.open("rb") if member is None else _open_member(*member)
    first = file.peek(6)[:6]
    for magic, open_it in _OPENERS.items():
        if first.startswith(magic):
            if member is not None:
                return open_it(file)
            file.close()
            return open_it(path)
    return file


def is_compressed(path: pathlib.Path) -> bool:
    """Whether a file is in an archive, or its first bytes say that it is compressed."""
    if _in_archive(path):
        return True
    with path.open("rb") as file:
        return file.read(6).startswith(tuple(_OPENERS))


def members(path: pathlib.Path) -> list[pathlib.Path]:
    """The files in a .zip that has several; none for any other file."""
    if path.suffix.lower() != ".zip" or not path.is_file() or not zipfile.is_zipfile(path):
        return []
    with contextlib.suppress(zipfile.BadZipFile):
        _, found = _archive(path)
        return sorted(found) if len(found) > 1 else []
    return []


def is_member(path: pathlib.Path) -> bool:
    """Whether the path is that of a file in a .zip."""
    return _in_archive(path) is not None


def skip(file: io.BufferedIOBase, count: int) -> None:
    """Moves on by `count` bytes."""
    if file.seekable():
        file.seek(count)
        return
    while count and (chunk := file.read(min(count, _CHUNK))):
        count -= len(chunk)


def _by_arrow(file: pathlib.Path | io.BufferedReader, compression: str) -> io.BufferedIOBase:
    import pyarrow

    source = str(file) if isinstance(file, pathlib.Path) else file
    return io.BufferedReader(pyarrow.input_stream(source, compression=compression))


def _zip(file: pathlib.Path | io.BufferedReader) -> io.BufferedIOBase:
    archive = zipfile.ZipFile(file)
    path = file if isinstance(file, pathlib.Path) else pathlib.Path(file.raw.name)
    return _open_member(archive, _only_member(archive, path), path)


def _only_member(archive: zipfile.ZipFile, path: pathlib.Path) -> zipfile.ZipInfo:
    """The one file in an archive. Raises: UserError if there are others."""
    found = [*_files_in(archive, path).values()]
    if len(found) == 1:
        return found[0]
    if any(each.filename.startswith("xl/") for each in found):
        raise errors.UserError("a data file", "an Excel workbook", str(path), SAVE_SHEET)
    if not found:
        raise errors.UserError(
            "a .zip with data files in it", "none", str(path), "add the files to the archive"
        )
    raise errors.UserError(
        expected="a .zip with one data file in it",
        found=[f"{len(found)} files", *(each.filename for each in found)],
        where=str(path),
        do="pass it by itself, or unpack it",
    )


_Files = dict[pathlib.Path, zipfile.ZipInfo]


def _archive(path: pathlib.Path) -> tuple[zipfile.ZipFile, _Files]:
    """An archive and the files in it."""
    # A process that was forked must not move in its parent's file.
    return _listed(path, path.stat().st_mtime_ns, os.getpid())


@functools.lru_cache(maxsize=4)
def _listed(path: pathlib.Path, changed: int, process: int) -> tuple[zipfile.ZipFile, _Files]:
    """Kept, because each of thousands of files would take as long as to list them all."""
    archive = zipfile.ZipFile(path)
    return archive, _files_in(archive, path)


def _files_in(archive: zipfile.ZipFile, path: pathlib.Path) -> _Files:
    """The files in an archive, by their paths, without those that macOS adds.

    Raises: UserError if a path leads out of the archive, or occurs twice.
    """
    found: _Files = {}
    wrong = []
    for each in archive.infolist():
        inside = each.filename.replace("\\", "/").lstrip("/")  # as old programs of Windows write
        if each.is_dir() or inside.startswith("__MACOSX/"):
            continue
        if path / inside in found or ".." in inside.split("/"):
            wrong.append(each.filename)
        found[path / inside] = each
    if wrong:
        raise errors.UserError(
            expected="a .zip in which each file has a path of its own below the archive",
            found=wrong,
            where=str(path),
            do="unpack it, and pass the folder or one of its files",
        )
    return found


def _in_archive(
    path: pathlib.Path,
) -> tuple[zipfile.ZipFile, zipfile.ZipInfo, pathlib.Path] | None:
    """The archive that holds the file at `path`, its entry there, and `path`; None for others."""
    if path.exists():
        return None
    for outer in path.parents:
        if outer.suffix.lower() == ".zip" and outer.is_file() and zipfile.is_zipfile(outer):
            archive, found = _archive(outer)
            return (archive, found[path], path) if path in found else None
    return None


def _open_member(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: pathlib.Path
) -> io.BufferedReader:
    """The file in an archive. Raises: UserError if it has a password or an unknown compression."""
    try:
        return io.BufferedReader(archive.open(entry))
    except NotImplementedError:  # a RuntimeError, too
        expected, found = "a file compressed by deflate, bzip2 or LZMA", "another compression"
    except RuntimeError:
        expected, found = "a .zip without a password", "one with a password"
    raise errors.UserError(
        expected, found, str(path), "unpack it, and pass the folder or one of its files"
    )


_OPENERS = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": functools.partial(_by_arrow, compression="zstd"),
    b"\x04\x22\x4d\x18": functools.partial(_by_arrow, compression="lz4"),
    b"PK\x03\x04": _zip,
}
