"""CSV files → examples of strings. Imports no jax."""

import collections
import csv
import itertools
import pathlib
import re
import sys
import typing
from collections.abc import Iterator, Sequence

from lora_jax import errors
from lora_jax.data.examples import kinds
from lora_jax.data.formats import records
from lora_jax.data.formats.records import START, Position, Record

_SEPARATORS = (",", ";", "\t", "|")
_SAMPLE = 20  # rows that are looked at to find the separator
_EXCEL = re.compile(r"sep=(.)\s*", re.IGNORECASE)  # its first line, which names the separator


def read(path: pathlib.Path, start: Position) -> Iterator[Record]:
    """The rows of a file whose first row has the names of the columns.

    All values stay strings: a column of numbers is as good a completion as any other. An empty
    field is a missing value (None), as pandas and `datasets` read it.
    Raises: UserError if a field's name occurs twice, the separator cannot be told, or a quote is
    never closed.
    """
    separator, begin = _separator(path)
    rows = _rows(path, begin, separator)
    _, header, after = next(rows, (0, [], START))
    names = _names(header, path)
    if start != START:
        rows = _rows(path, start, separator)
    for number, fields, after in rows:
        if isinstance(fields, str):
            yield Record(number, fields, after)
        elif fields == header and len(header) > 1:  # of a file that was put behind another
            yield Record(number, "the header again", after)
        elif len(fields) == len(names):
            values = (field or None for field in fields)
            yield Record(number, dict(zip(names, values, strict=True)), after)
        else:
            wrong = f"{len(fields)} fields, {len(names)} in the header"
            yield Record(number, wrong, after)


def _rows(
    path: pathlib.Path, start: Position, separator: str
) -> Iterator[tuple[int, typing.Any, Position]]:
    """(first line, fields or what is wrong with them, position after it) of rows with a value."""
    csv.field_size_limit(sys.maxsize)
    at, begins = start, True

    def lines() -> Iterator[str]:
        nonlocal at, begins
        for _, line, at, *_ in records.lines(path, start, returns=True):  # noqa: B007
            text, first, begins = typing.cast(str, line), begins, False
            yield text.removeprefix("\ufeff") if first else text

    reader = csv.reader(lines(), strict=True, delimiter=separator)
    while True:
        number, begins = at[1] + 1, True
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if "end of data" in str(error):
                raise errors.UserError(
                    expected="a closing quote for each opening one",
                    found="a quote that is not closed until the end of the file",
                    where=f"{path}:{number}",
                    do='close it; within a field in quotes, a quote is written ""',
                ) from error
            fields = str(error)
        if fields is None:
            return
        if any(fields) or len(fields) == 1:  # spreadsheets end with rows of separators
            yield number, fields, at


def _separator(path: pathlib.Path) -> tuple[str, Position]:
    """(the separator, where the header begins).

    It is a comma if the header and the first rows have as many fields with it, more than one; else
    the one separator for which they have.
    """
    first = next(records.lines(path, START, returns=True), None)
    if first is None:
        return ",", START
    if named := _EXCEL.fullmatch(typing.cast(str, first.example)):
        return named[1], first.after
    if ".tsv" in path.name.lower():
        return "\t", START
    headers, fitting = {}, []
    for separator in _SEPARATORS:
        try:
            rows = [row for _, row, _ in itertools.islice(_rows(path, START, separator), _SAMPLE)]
        except errors.UserError:
            rows = []
        if rows and isinstance(rows[0], list) and len(rows[0]) > 1:
            headers[separator] = len(rows[0])
            if all(len(row) == len(rows[0]) for row in rows if isinstance(row, list)):
                fitting.append(separator)
    if "," in fitting or not headers:
        return ",", START
    if len(fitting) > 1:
        raise errors.UserError(
            expected="fields separated by commas",
            found=f"a header that may be separated by {' or '.join(map(repr, fitting))}",
            where=f"{path}:1",
            do="separate the fields by commas, with quotes around fields that have commas",
        )
    return (fitting or [max(headers, key=headers.__getitem__)])[0], START


def _names(header: Sequence[str] | str, path: pathlib.Path) -> list[str]:
    """The names of the columns. Of a name that occurs again the later ones are numbered, as pandas
    does; that of a field may not occur again."""
    if isinstance(header, str):
        raise errors.UserError(
            expected="a header with the names of the columns",
            found=header,
            where=f"{path}:1",
            do="correct it",
        )
    refuse_twice(header, f"{path}:1")
    seen, names = collections.Counter[str](), []
    for name in header:
        names.append(f"{name}.{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def refuse_twice(names: Sequence[str], where: str) -> None:
    """Raises: UserError if a field is the name of two columns."""
    counts = collections.Counter(names)
    if twice := [name for name, count in counts.items() if count > 1 and name in kinds.FIELDS]:
        raise errors.UserError(
            expected="one column of each name",
            found=[f"the column {name} {counts[name]} times" for name in twice],
            where=where,
            do="remove or rename the columns that are not meant",
        )
