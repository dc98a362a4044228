"""Data files, read example by example from any position. Imports no jax."""

import codecs
import csv
import io
import json
import pathlib
import typing
from collections.abc import Callable, Iterator

from lora_jax import errors, hub

# The field that holds a line of a .txt file.
STREAM = "_stream"

# Where an example starts: (byte, lines before it) in a text file, else (0, examples before it).
Position = tuple[typing.Any, int]
START = (0, 0)


class Record(typing.NamedTuple):
    """An example, or what is wrong with it; its number from 1; and the position after it."""

    number: int
    example: dict[str, typing.Any] | str
    after: Position


def read(path: pathlib.Path, start: Position = START) -> Iterator[Record]:
    """The examples from `start`, which is START or the `after` of a record of this file.

    Raises:
      errors.UserError: the suffix is unknown, a text file is not UTF-8, …
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


def refuse(path: pathlib.Path, bad: list[Record]) -> typing.NoReturn:
    """Raises: UserError with all of `bad`, which are records with a problem."""
    form = FORMATS[path.suffix]
    raise errors.UserError(
        expected=form.expected,
        found=[f"line {number}: {problem}" for number, problem, _ in bad],
        where=[f"{path}:{number}" for number, _, _ in bad],
        do=form.do,
    )


def is_array(path: pathlib.Path) -> bool:
    """Whether a .json file is one array, which is read whole, instead of one object a line."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return file.read(4096).lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"[")


def _lines(path: pathlib.Path, start: Position, *, returns: bool) -> Iterator[Record]:
    """Lines with their line ends: \\n, and with `returns` also \\r."""
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
                yield Record(number, piece, (byte, number))
            byte, number = end, number + 1
            yield Record(number, pieces[-1], (byte, number))


def _jsonl(path: pathlib.Path, start: Position) -> Iterator[Record]:
    for number, line, after in _lines(path, start, returns=False):
        if line.strip():
            try:
                example = json.loads(line)
                is_object = isinstance(example, dict)
                wrong = "" if is_object else f"a {type(example).__name__}, not an object"
            except ValueError as error:
                wrong = str(error)
            yield Record(number, wrong or example, after)


def _json(path: pathlib.Path, start: Position) -> Iterator[Record]:
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
    bad = [n for n, each in enumerate(array, start=1) if not isinstance(each, dict)]
    if bad:
        raise errors.UserError(
            expected="a JSON array of objects",
            found=[f"a {type(array[n - 1]).__name__}" for n in bad],
            where=[f"{path}, element {n}" for n in bad],
            do="correct these elements",
        )
    for number, example in enumerate(array[start[1] :], start=start[1] + 1):
        yield Record(number, example, (0, number))


def _csv(path: pathlib.Path, start: Position) -> Iterator[Record]:
    # All values stay strings: a column of numbers is as good a completion as any other.
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
                yield Record(at[1], dict(zip(header, fields, strict=True)), at)
            elif fields:
                wrong = f"{len(fields)} fields, {len(header)} in the header"
                yield Record(at[1], wrong, at)
    except csv.Error as error:
        yield Record(at[1], str(error), at)


def _parquet(path: pathlib.Path, start: Position) -> Iterator[Record]:
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
                    for example in batch.slice(before).to_pylist():
                        number += 1
                        yield Record(number, example, (0, number))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise errors.UserError(
            expected="a parquet file",
            found=str(error).splitlines()[0],
            where=str(path),
            do="check that the file is complete",
        ) from error


def _txt(path: pathlib.Path, start: Position) -> Iterator[Record]:
    for number, line, after in _lines(path, start, returns=True):
        yield Record(number, {STREAM: line}, after)


class _Format(typing.NamedTuple):
    """How files with a suffix are read, and what errors say about records with a problem."""

    read: Callable[[pathlib.Path, Position], Iterator[Record]]
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
        "a header, and rows with as many comma-separated fields",
        "correct these lines (a field with commas, quotes or newlines needs quotes)",
    ),
    ".parquet": _Format(_parquet),
    ".txt": _Format(_txt),
}
