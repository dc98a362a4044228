"""Arrow tables, of Parquet and Arrow files and of the library `datasets` → examples.

Arrow gives each struct the keys of all others, null where a row lacks one. These nulls are removed,
as TRL's `remove_none_values` does. Imports no jax.
"""

import json
import pathlib
import typing
from collections.abc import Callable, Iterator, Mapping

from lora_jax import errors
from lora_jax.data.examples import kinds
from lora_jax.data.formats import compression, csv_files
from lora_jax.data.formats.records import Position, Record

if typing.TYPE_CHECKING:
    import pyarrow

AT_ONCE = 1024  # rows that are converted at a time


def table(path: pathlib.Path) -> "pyarrow.Table":
    """The table in a Parquet or Arrow file; that of an Arrow file stays on the disk."""
    import pyarrow
    import pyarrow.parquet

    if compression.is_compressed(path):
        with compression.opened(path) as file:
            source: typing.Any = pyarrow.BufferReader(file.read())
    else:
        source = pyarrow.memory_map(str(path))
    if compression.content_name(path).suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(source) as file:
            return file.read()
    try:
        return pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        source.seek(0)
        return pyarrow.ipc.open_file(source).read_all()


def read(path: pathlib.Path, start: Position) -> Iterator[Record]:
    """The rows of a Parquet or Arrow file."""
    import pyarrow

    try:
        if compression.content_name(path).suffix != ".parquet" or compression.is_compressed(path):
            yield from records_of(table(path), str(path), start[1])
        else:
            yield from _parquet(path, start[1])
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, error) from error


def damaged(path: pathlib.Path, error: Exception) -> errors.UserError:
    """The error for a file that Arrow cannot read."""
    return errors.UserError(
        expected="a Parquet file" if ".parquet" in path.name.lower() else "an Arrow file",
        found=(str(error).splitlines() or [type(error).__name__])[0],
        where=str(path),
        do="check that the file is complete",
    )


def _parquet(path: pathlib.Path, before: int) -> Iterator[Record]:
    """The rows of a file after the first `before`, read group by group."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        number = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if number + size > before:
                for batch in file.iter_batches(AT_ONCE, row_groups=[group]):
                    part = pyarrow.Table.from_batches([batch])
                    left = max(0, before - number)
                    for each in records_of(part, str(path), left):
                        at = number + each.number
                        yield Record(at, each.example, (0, at))
                    number += len(part)
            else:
                number += size


def records_of(whole: "pyarrow.Table", where: str, before: int = 0) -> Iterator[Record]:
    """The rows of a table after the first `before`. where: its file, for messages."""
    for number, example in enumerate(rows(whole, where, before), start=before + 1):
        yield Record(number, example, (0, number))


def rows(whole: "pyarrow.Table", where: str, before: int = 0) -> Iterator[dict[str, typing.Any]]:
    """The rows of a table after the first `before`."""
    for first in range(before, len(whole), AT_ONCE):
        yield from _converted(whole.slice(first, AT_ONCE), where)


def names(whole: "pyarrow.Table", where: str) -> list[str]:
    """The names of the columns; of those with one name the first is read.

    Raises: UserError if a field is the name of two columns.
    """
    csv_files.refuse_twice(whole.column_names, where)
    return [*dict.fromkeys(whole.column_names)]


def _converted(part: "pyarrow.Table", where: str) -> Iterator[dict[str, typing.Any]]:
    columns = {}
    for name in names(part, where):
        at = part.column_names.index(name)
        if name in kinds.FIELDS or _is_plain(part.schema.field(at).type):
            columns[name] = _values(part.column(at), f"{where}, column {name}")
    for row in zip(*columns.values(), strict=True) if columns else ({},) * len(part):
        yield dict(zip(columns, row, strict=True))


def _is_plain(kind: "pyarrow.DataType") -> bool:
    """Whether values of a type are like those of JSON. Others, such as images and maps, cannot be
    trained on; they are not converted, which could fail or take long."""
    from pyarrow import types

    if _is_json(kind):
        return True
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        keys = [kind.field(n).name for n in range(kind.num_fields)]
        return len({*keys}) == len(keys) and all(
            _is_plain(kind.field(n).type) for n in range(kind.num_fields)
        )
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    return (
        types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind)
        or types.is_floating(kind) or types.is_string(kind) or types.is_large_string(kind)
        or str(kind) == "string_view"
    )  # fmt: skip


def _is_json(kind: "pyarrow.DataType") -> bool:
    """Whether values are JSON texts, as those of the feature `Json` of `datasets`."""
    return getattr(kind, "extension_name", "") == "arrow.json"


def _values(column: "pyarrow.ChunkedArray", where: str) -> list[typing.Any]:
    import pyarrow

    kind = column.type
    try:
        values = column.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise errors.UserError(
            expected="a column of texts, numbers, lists or objects",
            found=f"values of the type {kind} that cannot be read: {error}",
            where=where,
            do="remove or convert the column",
        ) from error
    convert = _converter(kind)
    return [convert(value) for value in values]


def _converter(kind: "pyarrow.DataType") -> Callable[[typing.Any], typing.Any]:
    """How values of a type are converted: nulls in structs are removed, JSON is parsed."""
    from pyarrow import types

    def struct(value: Mapping[str, typing.Any] | None) -> typing.Any:
        if value is None:
            return None
        return {key: of[key](each) for key, each in value.items() if each is not None}

    if _is_json(kind):
        return lambda text: None if text is None else json.loads(text)
    if types.is_struct(kind):
        of = {kind.field(n).name: _converter(kind.field(n).type) for n in range(kind.num_fields)}
        return struct
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _converter(kind.value_type)
        if inner is _same:
            return _same
        return lambda values: values if values is None else [inner(value) for value in values]
    return _same


def _same(value: typing.Any) -> typing.Any:
    return value
