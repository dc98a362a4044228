"""Lines of a source of any size, read block by block as they are needed. No jax here."""

import bisect
import json
import os
import pathlib
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures

import numpy as np

from lora_jax import errors
from lora_jax.data import batches, files, sources

if typing.TYPE_CHECKING:
    import datasets

BLOCK = 4096  # rows that are read, arranged and shuffled together
MOST = 2**25  # characters of a block's texts, more or less: of long rows it has fewer


class Start(typing.NamedTuple):
    """Where a block begins: lines before it, and the position of its first row in the source."""

    line: int
    position: files.Position


class Stream:
    """stream[n]: the n-th line of a source that is read in its order, over and over.

    The rows of a block become lines together, and these are shuffled: default_rng([seed, number,
    block]). So a line is a function of its number, whatever was asked for before. Where a block
    begins is known once the ones before were read; `keep` writes it down, so that a resumed run
    need not read them. A thread makes a block ahead; in memory are about the last `window` lines
    and two blocks.
    """

    def __init__(
        self,
        source: str,
        arrange: "Callable[[datasets.Dataset], Sequence[batches.Line]]",
        *,
        columns: Mapping[str, str] | None,
        seed: int,
        number: int,
        window: int,
    ):
        """arrange: the lines of a block's rows, maybe none. number: of this source in a mixture."""
        self._source, self._columns = source, columns
        self._arrange, self._seed, self._number = arrange, (seed, number), number
        self._window = window
        self._starts = [Start(0, files.START)]
        self._blocks: dict[int, futures.Future[Sequence[batches.Line]]] = {}
        self._lock = threading.Lock()
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._rows: Iterator[files.Found] = iter(())  # at the position _at
        self._at: files.Position | None = None
        self._file: pathlib.Path | None = None

    def __getitem__(self, n: int) -> batches.Line:
        while True:  # until n lies in a block that is known
            with self._lock:
                block = bisect.bisect_right(self._starts, n, key=lambda start: start.line) - 1
                made = self._at_hand(n, block)
            lines, first = made.result(), self._starts[block].line
            if n < first + len(lines):
                return lines[n - first]

    def keep(self, file: pathlib.Path, *, write: bool) -> None:
        """Takes from `file` where blocks begin, as a run before has left it, and goes on in it.

        Whatever is missing in it is read again; what is of another stream is left out.
        """
        with self._lock:
            told = list(_told(file))
            known = min(len(told), len(self._starts))
            if told[:known] == self._starts[:known]:
                self._starts += told[known:]
            if write:
                file.parent.mkdir(exist_ok=True)
                new = file.with_suffix(".new")
                new.write_text("".join(map(_line, self._starts)))
                os.replace(new, file)
                self._file = file

    def _at_hand(self, n: int, block: int) -> "futures.Future[Sequence[batches.Line]]":
        """The block, which is to be made if need be, and the next; drops those far from n."""
        for each in (block, block + 1):
            if each not in self._blocks:
                self._blocks[each] = self._thread.submit(self._make, each)
        for each in [*self._blocks]:
            before = each < block and self._starts[each + 1].line <= n - self._window
            known = each < len(self._starts)
            after = each > block + 1 and known and self._starts[each].line > n + self._window
            if before or after:
                del self._blocks[each]
        return self._blocks[block]

    def _make(self, block: int) -> Sequence[batches.Line]:
        """The lines of a block, of which the ones before are known."""
        start = self._starts[block]
        found, after = self._read(start.position)
        lines: Sequence[batches.Line] = ()
        if found:
            lines = self._arrange(sources.table(found, self._columns, self._source))
        if after == files.START and start.line + len(lines) == 0:
            raise errors.UserError(
                expected="at least one row with a token to train on",
                found="none in the whole stream",
                where=self._source,
                do="raise --seq-len if the prompts fill it, or check the completions",
            )
        with self._lock:
            if block + 1 == len(self._starts):
                self._starts.append(Start(start.line + len(lines), after))
                if self._file:
                    with self._file.open("a") as file:
                        file.write(_line(self._starts[-1]))
        order = np.random.default_rng([*self._seed, block]).permutation(len(lines))
        return [lines[i] for i in order]

    def _read(self, position: files.Position) -> tuple[list[files.Found], files.Position]:
        """A block's rows, and where the next one begins: anew, if these are the last ones."""
        if position != self._at:
            self._rows = sources.stream(self._source, position)
        self._at, found, size = None, [], 0
        for row in self._rows:
            found.append(row)
            size += _size(row.row)
            if len(found) == BLOCK or size >= MOST:
                self._at = row.after
                return found, row.after
        return found, files.START


def _size(row: dict[str, typing.Any] | str) -> int:
    """Characters of a row's texts."""
    return sum(len(v) for v in row.values() if isinstance(v, str)) if isinstance(row, dict) else 0


def _line(start: Start) -> str:
    return json.dumps(start) + "\n"


def _told(file: pathlib.Path) -> Iterator[Start]:
    """What a file tells, up to a line that is damaged or was cut off by a kill."""
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            first, (at, number) = json.loads(line)
        except (ValueError, TypeError):
            return
        yield Start(first, (at, number))
