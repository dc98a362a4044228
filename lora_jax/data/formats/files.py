"""Data files, read example by example from any position. Imports no jax."""

import contextlib
import pathlib
import typing
from collections.abc import Callable, Iterator

from lora_jax import errors, hub
from lora_jax.data.formats import arrow_files, compression, csv_files, json_files, records
from lora_jax.data.formats.records import START, Position, Record

# The field that holds a line of a .txt file.
STREAM = "_stream"


def read(path: pathlib.Path, start: Position = START) -> Iterator[Record]:
    """The examples from `start`, which is START or the `after` of a record of this file.

    Raises:
      errors.UserError: the suffix is unknown, a text file is not UTF-8, …
    """
    return _guarded(path, form_of(path), start)


def _guarded(path: pathlib.Path, form: "_Format", start: Position) -> Iterator[Record]:
    with _readable(path):
        if path.is_file():
            hub.refuse_lfs_pointer(path)
        yield from form.read(path, start)


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """Raises: UserError if the file turns out to be damaged."""
    try:
        yield
    except compression.ERRORS as error:
        raise errors.UserError(
            expected="a complete file",
            found=str(error) or type(error).__name__,
            where=str(path),
            do="check that it was copied completely, e.g. with gzip -t",
        ) from error


def form_of(path: pathlib.Path) -> "_Format":
    """How a file is read. Raises: UserError if its suffix is unknown."""
    name = compression.content_name(path)
    suffix, inner = name.suffix, name.with_suffix("").suffix
    if suffix == ".txt" and inner in FORMATS:
        raise errors.UserError(
            expected="a data file with one suffix, which says what is in it",
            found=f"{inner}.txt, as Windows names a file that is saved as text",
            where=str(path),
            do=f"rename it: {inner} for examples, .txt for a stream of text",
        )
    if suffix not in FORMATS:
        raise errors.UserError(
            expected=f"a data file ending in {', '.join(FORMATS)}, each also with "
            f"{', '.join(compression.SUFFIXES)}",
            found=path.suffix or "no suffix",
            where=str(path),
            do=_CONVERSIONS.get(suffix, "convert the file, or rename it if only its name is wrong"),
        )
    return FORMATS[suffix]


def is_data(path: pathlib.PurePath) -> bool:
    """Whether the name is that of a data file."""
    return compression.name(pathlib.Path(path)).suffix in FORMATS


def is_table(path: pathlib.Path) -> bool:
    """Whether a file is an Arrow table."""
    return form_of(path).read is arrow_files.read


def is_document(path: pathlib.Path) -> bool:
    """Whether a file is one JSON document, which is read whole."""
    with _readable(path):
        return form_of(path).read is json_files.read and json_files.is_document(path)


def _txt(path: pathlib.Path, start: Position) -> Iterator[Record]:
    for number, line, after, *_ in records.lines(path, start, returns=True):
        yield Record(number, {STREAM: str(line).removeprefix("\ufeff")}, after)


class _Format(typing.NamedTuple):
    """How files with a suffix are read, and what errors say about records with a problem."""

    read: Callable[[pathlib.Path, Position], Iterator[Record]]
    family: str
    expected: str = ""
    do: str = ""


_JSON = _Format(
    json_files.read,
    "JSON",
    'one JSON object in each line, such as {"prompt": "…", "completion": "…"}',
    "correct these lines",
)
_CSV = _Format(
    csv_files.read,
    "CSV",
    "a header, and rows with as many fields",
    "correct these lines (a field with separators, quotes or newlines needs quotes)",
)
_ARCHIVE = "unpack the archive, and pass its folder or one of its files"
_CONVERSIONS = {  # of other files that people have
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), compression.SAVE_SHEET),
    **dict.fromkeys((".tar", ".tgz", ".7z", ".rar"), _ARCHIVE),
}
FORMATS = {
    ".jsonl": _JSON,
    ".ndjson": _JSON,
    ".json": _JSON,
    ".csv": _CSV,
    ".tsv": _CSV,
    ".parquet": _Format(arrow_files.read, "Parquet"),
    ".arrow": _Format(arrow_files.read, "Arrow"),
    ".txt": _Format(_txt, "text"),
}
