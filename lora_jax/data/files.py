"""Data files, row by row, from any position on. Imports no jax."""

import codecs
import csv
import io
import json
import pathlib
import typing
from collections.abc import Callable, Iterator

from lora_jax import errors, hub

# The field of a line of a .txt file.
STREAM = "_stream"

# Where a row begins: (byte, lines before it) of a text file, (0, rows before it) of another.
Position = tuple[typing.Any, int]
START = (0, 0)


class Found(typing.NamedTuple):
    """A row, or what is wrong with it; its number from 1; and the position after it."""

    number: int
    row: dict[str, typing.Any] | str
    after: Position


def rows(path: pathlib.Path, start: Position = START) -> Iterator[Found]:
    """The rows from `start` on, which is START or what came with a row of this file.

    Raises:
      errors.UserError: a suffix that is not known, not UTF-8, not a parquet file, …
    """
    if path.suffix not in FORMATS:
        raise errors.UserError(
            expected=f"a data file ending in {', '.join(FORMATS)}",
            found=path.suffix or "no suffix",
            where=str(path),
            do="convert the file, or rename it if only its name is wrong",
        )
    hub.refuse_lfs_pointer(path)
    return FORMATS[path.suffix].read(path, start)


def refuse(path: pathlib.Path, bad: list[Found]) -> typing.NoReturn:
    """Raises: UserError with all rows of `bad`, in which something is wrong."""
    form = FORMATS[path.suffix]
    raise errors.UserError(
        expected=form.expected,
        found=[f"line {number}: {problem}" for number, problem, _ in bad],
        where=[f"{path}:{number}" for number, _, _ in bad],
        do=form.do,
    )


def is_array(path: pathlib.Path) -> bool:
    """Whether a .json file is one array, which is read whole, and not a row a line."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return file.read(4096).lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"[")


def _lines(path: pathlib.Path, start: Position, *, returns: bool) -> Iterator[Found]:
    """Lines with their ends, which are \\n and, with `returns`, \\r, too."""
    byte, number = start
    with path.open("rb") as file:
        file.seek(byte)
        for raw in file:
            if byte == 0 and raw.startswith(codecs.BOM_UTF8):
                byte, raw = len(codecs.BOM_UTF8), raw.removeprefix(codecs.BOM_UTF8)
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                raise errors.UserError(
                    expected="UTF-8",
                    found=f"byte 0x{error.object[error.start]:02x}",
                    where=f"{path}:{number + 1}",
                    do="convert it, e.g. iconv -f latin1 -t utf-8",
                ) from error
            end = byte + len(raw)
            pieces = [*io.StringIO(text, newline="")] if returns else [text]
            for piece in pieces[:-1]:
                byte, number = byte + len(piece.encode()), number + 1
                yield Found(number, piece, (byte, number))
            byte, number = end, number + 1
            yield Found(number, pieces[-1], (byte, number))


def _jsonl(path: pathlib.Path, start: Position) -> Iterator[Found]:
    for number, line, after in _lines(path, start, returns=False):
        if line.strip():
            try:
                row = json.loads(line)
                wrong = "" if isinstance(row, dict) else f"a {type(row).__name__}, not an object"
            except ValueError as error:
                wrong = str(error)
            yield Found(number, wrong or row, after)


def _json(path: pathlib.Path, start: Position) -> Iterator[Found]:
    if not is_array(path):
        yield from _jsonl(path, start)
        return
    try:
        array = json.loads("".join(text for _, text, _ in _lines(path, START, returns=False)))
    except json.JSONDecodeError as error:
        raise errors.UserError(
            expected="a JSON array of objects",
            found=error.msg,
            where=f"{path}:{error.lineno}",
            do="correct the file",
        ) from error
    bad = [n for n, row in enumerate(array, start=1) if not isinstance(row, dict)]
    if bad:
        raise errors.UserError(
            expected="a JSON array of objects",
            found=[f"a {type(array[n - 1]).__name__}" for n in bad],
            where=[f"{path}, element {n}" for n in bad],
            do="correct these elements",
        )
    for number, row in enumerate(array[start[1] :], start=start[1] + 1):
        yield Found(number, row, (0, number))


def _csv(path: pathlib.Path, start: Position) -> Iterator[Found]:
    # All values stay text: a column of numbers is as good a completion as any other.
    at = START

    def reader(start):
        def lines():
            nonlocal at
            for _, line, at in _lines(path, start, returns=True):  # noqa: B007
                yield line

        return csv.reader(lines(), strict=True)

    rows = reader(START)
    header = next(rows, [])
    if start != START:
        rows = reader(start)
    try:
        for fields in rows:
            if len(fields) == len(header):
                yield Found(at[1], dict(zip(header, fields, strict=True)), at)
            elif fields:
                wrong = f"{len(fields)} fields, {len(header)} in the header"
                yield Found(at[1], wrong, at)
    except csv.Error as error:
        yield Found(at[1], str(error), at)


def _parquet(path: pathlib.Path, start: Position) -> Iterator[Found]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if number + size <= start[1]:
                    number += size
                    continue
                for batch in file.iter_batches(1024, row_groups=[group]):
                    before = min(max(0, start[1] - number), len(batch))
                    number += before
                    for row in batch.slice(before).to_pylist():
                        number += 1
                        yield Found(number, row, (0, number))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise errors.UserError(
            expected="a parquet file",
            found=str(error).splitlines()[0],
            where=str(path),
            do="check that the file is complete",
        ) from error


def _txt(path: pathlib.Path, start: Position) -> Iterator[Found]:
    for number, line, after in _lines(path, start, returns=True):
        yield Found(number, {STREAM: line}, after)


class _Format(typing.NamedTuple):
    """How files of a kind are read, and what to say of rows with something wrong."""

    read: Callable[[pathlib.Path, Position], Iterator[Found]]
    expected: str = ""
    do: str = ""


_JSON = (
    'one JSON object in each line, such as {"prompt": "…", "completion": "…"}',
    "correct these lines",
)
FORMATS = {
    ".jsonl": _Format(_jsonl, *_JSON),
    ".json": _Format(_json, *_JSON),
    ".csv": _Format(
        _csv,
        "a header and comma-separated rows with as many fields",
        "correct these lines (a field with commas, quotes or newlines needs quotes)",
    ),
    ".parquet": _Format(_parquet),
    ".txt": _Format(_txt),
}
