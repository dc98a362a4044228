"""The rows of a source, each as its author wrote it. Imports no jax.

A row keeps its own keys in their order and its own types, whatever other rows have: a table would
give each row the keys of all, and each column one type.
"""

import array
import bisect
import itertools
import json
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from lora_jax.data.examples import kinds
from lora_jax.data.formats import arrow_files, records

if typing.TYPE_CHECKING:
    import pyarrow

Row = dict[str, typing.Any]


class Texts:
    """The rows of a file as JSON texts, which take a fraction of the memory of objects.

    names: the columns in order of first appearance. between(first, end): the rows from `first` to
    before `end`, each a new object. origin(n): where row n is from.
    """

    def __init__(self, found: Iterable[records.Record]):
        """found: records without a problem, of one file."""
        self._texts: list[bytes] = []
        self._numbers = array.array("q")
        self._file = ""
        names: dict[str, None] = {}
        dump = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode
        for each in found:
            example = typing.cast(Row, each.example)
            names.update(dict.fromkeys(example))
            self._texts.append(dump(example).encode("utf-8", "surrogatepass"))
            self._numbers.append(each.number)
            self._file = each.file
        self.names = [*names]

    def __len__(self) -> int:
        return len(self._texts)

    def between(self, first: int, end: int) -> Iterator[Row]:
        return map(json.loads, self._texts[first:end])

    def origin(self, n: int) -> str:
        return f"{self._file}:{self._numbers[n]}"


class Table:
    """As Texts: the rows of an Arrow table, which may lie on the disk."""

    def __init__(self, table: "pyarrow.Table", file: str, where: str):
        """file, where: its name in origins, and in messages."""
        self._table, self._file, self._where = table, file, where
        self.names = arrow_files.names(table, where)

    def __len__(self) -> int:
        return len(self._table)

    def between(self, first: int, end: int) -> Iterator[Row]:
        return arrow_files.rows(self._table.slice(first, end - first), self._where)

    def origin(self, n: int) -> str:
        return f"{self._file}:{n + 1}"


class Objects:
    """As Texts: a few rows as they are, such as a block of a stream."""

    def __init__(self, found: Sequence[records.Record]):
        """found: records without a problem."""
        self._found = found
        self.names = [*dict.fromkeys(itertools.chain(*(self._row(each) for each in found)))]

    @staticmethod
    def _row(each: records.Record) -> Row:
        return typing.cast(Row, each.example)

    def __len__(self) -> int:
        return len(self._found)

    def between(self, first: int, end: int) -> Iterator[Row]:
        return (dict(self._row(each)) for each in self._found[first:end])

    def origin(self, n: int) -> str:
        return self._found[n].origin


Part = Texts | Table | Objects


class Rows(Sequence[Row]):
    """The rows of one source. Each is a new dict with its origin under kinds.ORIGIN.

    column_names: the columns of all rows in order of first appearance.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        chosen: np.ndarray | None = None,
        renamed: Mapping[str, str] | None = None,
        dropped: frozenset[str] = frozenset(),
    ):
        """chosen: the numbers of the rows; None: all. renamed: {column: new name}. dropped: columns
        that are left out, by their first names."""
        self._parts, self._chosen = parts, chosen
        self._renamed, self._dropped = dict(renamed or {}), dropped
        self._ends = [*itertools.accumulate(map(len, parts))]
        names = dict.fromkeys(itertools.chain(*(part.names for part in parts)))
        self.column_names = [self._renamed.get(n, n) for n in names if n not in dropped]

    def __len__(self) -> int:
        if self._chosen is not None:
            return len(self._chosen)
        return self._ends[-1] if self._ends else 0

    @typing.overload
    def __getitem__(self, n: int) -> Row: ...
    @typing.overload
    def __getitem__(self, n: slice) -> "Rows": ...
    def __getitem__(self, n):
        numbers = range(len(self))[n]  # IndexError, and numbers from the end
        if isinstance(n, slice):
            return self.select(numbers)
        first = numbers if self._chosen is None else int(self._chosen[numbers])
        return next(self._between(first, first + 1))

    def __iter__(self) -> Iterator[Row]:
        if self._chosen is None:
            yield from self._between(0, len(self))
        elif len(self):
            borders = np.flatnonzero(np.diff(self._chosen) != 1) + 1
            for run in np.split(self._chosen, borders):
                yield from self._between(int(run[0]), int(run[-1]) + 1)

    def select(self, numbers: np.ndarray | Iterable[int]) -> "Rows":
        """The rows with these numbers, in this order."""
        of = np.fromiter(numbers, np.int64)
        chosen = of if self._chosen is None else self._chosen[of]
        return Rows(self._parts, chosen, self._renamed, self._dropped)

    def rename(self, names: Mapping[str, str], drop: Iterable[str] = ()) -> "Rows":
        """With columns renamed as in {column: new name}, and others left out."""
        first = {self._renamed.get(name, name): name for part in self._parts for name in part.names
                 if name not in self._dropped}  # fmt: skip
        renamed = self._renamed | {first[name]: new for name, new in names.items()}
        dropped = self._dropped | {first[name] for name in drop}
        return Rows(self._parts, self._chosen, renamed, dropped)

    def _between(self, first: int, end: int) -> Iterator[Row]:
        """The rows of all parts from number `first` to before `end`."""
        number = bisect.bisect_right(self._ends, first)
        while first < end:
            part, before = self._parts[number], self._ends[number] - len(self._parts[number])
            upto = min(end, self._ends[number])
            found = part.between(first - before, upto - before)
            for n, row in enumerate(found, start=first - before):
                yield self._made(row) | {kinds.ORIGIN: part.origin(n)}
            first, number = upto, number + 1

    def _made(self, row: Row) -> Row:
        if not self._renamed and not self._dropped:
            return row
        return {
            self._renamed.get(name, name): value
            for name, value in row.items()
            if name not in self._dropped
        }
