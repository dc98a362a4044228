"""Sequences of a source of any size, read block by block as needed. Imports no jax."""

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
from lora_jax.data import bad_rows, rows, sources
from lora_jax.data.formats import records
from lora_jax.data.packing import TokenSequence

BLOCK = 4096  # examples that are read, arranged and shuffled together
MAX_CHARACTERS = 2**25  # roughly, in a block: blocks of long examples have fewer


class Start(typing.NamedTuple):
    """Where a block starts: the number of its first sequence, and the position of its first example
    in the source.

    before: the fingerprint of the block before it.
    """

    sequence: int
    position: records.Position
    before: str = ""


class Stream:
    """stream[n]: the n-th sequence of a source that is read in its order, over and over.

    The examples of a block are arranged into sequences together, which are then shuffled with
    default_rng([seed, number, block]). So a sequence depends on its number alone, not on what was
    requested before. Where a block starts is known once all blocks before it were read; `keep`
    saves it, so that a resumed run need not read them again. A thread prepares one block ahead;
    memory holds about the last `window` sequences and two blocks.
    """

    def __init__(
        self,
        source: str,
        arrange: Callable[[rows.Rows], Sequence[TokenSequence]],
        *,
        columns: Mapping[str, str] | None,
        seed: int,
        number: int,
        window: int,
        bad: bad_rows.BadRows | None = None,
    ):
        """arrange: a block's examples → its sequences, perhaps none. number: of this source in a
        mixture. bad: counts the rows that are skipped."""
        self._source, self._columns = source, columns
        self._arrange, self._seed, self._number = arrange, (seed, number), number
        self._window, self._bad = window, bad
        self._starts = [Start(0, records.START)]
        self._blocks: dict[int, futures.Future[Sequence[TokenSequence]]] = {}
        self._lock = threading.Lock()
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._records: Iterator[records.Record] = iter(())  # at the position _at
        self._at: records.Position | None = None
        self._file: pathlib.Path | None = None

    def __getitem__(self, n: int) -> TokenSequence:
        while True:  # until n is in a block whose start is known
            with self._lock:
                block = bisect.bisect_right(self._starts, n, key=lambda start: start.sequence) - 1
                made = self._prepared(n, block)
            sequences, first = made.result(), self._starts[block].sequence
            if n < first + len(sequences):
                return sequences[n - first]

    def keep(self, file: pathlib.Path, *, write: bool) -> None:
        """Takes the starts of blocks that an earlier run saved in `file`; with `write`, adds new
        ones.

        Blocks that are missing there are read again; those of another stream are ignored. A block
        that is read again must be the same as before: rows that were trained on may not change.
        Later ones may, such as a row that ended the run and was corrected.
        """
        with self._lock:
            saved = list(_saved(file))
            known = min(len(saved), len(self._starts))
            if saved[:known] == self._starts[:known]:
                self._starts += saved[known:]
            if write:
                file.parent.mkdir(exist_ok=True)
                new = file.with_suffix(".new")
                new.write_text("".join(map(_text, self._starts)))
                os.replace(new, file)
                self._file = file

    def _prepared(self, n: int, block: int) -> "futures.Future[Sequence[TokenSequence]]":
        """The block; starts preparing it and the next if necessary, and drops those far from n."""
        for each in (block, block + 1):
            if each not in self._blocks:
                self._blocks[each] = self._thread.submit(self._make, each)
        for each in [*self._blocks]:
            before = each < block and self._starts[each + 1].sequence <= n - self._window
            known = each < len(self._starts)
            after = each > block + 1 and known and self._starts[each].sequence > n + self._window
            if before or after:
                del self._blocks[each]
        return self._blocks[block]

    def _make(self, block: int) -> Sequence[TokenSequence]:
        """The sequences of a block whose start is known."""
        start = self._starts[block]
        found, after = self._read(start.position)
        sequences: Sequence[TokenSequence] = ()
        content = ""
        if found:
            examples = sources.table(found, self._columns, self._source, self._bad)
            content = sources.fingerprint(examples)
            sequences = self._arrange(examples) if len(examples) else ()
        if after == records.START and start.sequence + len(sequences) == 0:
            raise errors.UserError(
                expected="at least one example with a token to train on",
                found="none in the whole stream",
                where=self._source,
                do="raise --seq-len if the prompts fill it, or check the completions",
            )
        with self._lock:
            if block + 1 == len(self._starts):
                self._starts.append(Start(start.sequence + len(sequences), after, content))
                if self._file:
                    with self._file.open("a") as file:
                        file.write(_text(self._starts[-1]))
            elif self._starts[block + 1].before != content:
                raise errors.UserError(
                    expected="the rows that the run has read before",
                    found="others",
                    where=f"{self._source}, the block of rows after {start.position[1]}",
                    do="put the data back, or start a new run; only rows that the run has not "
                    "reached may change",
                )
        order = np.random.default_rng([*self._seed, block]).permutation(len(sequences))
        return [sequences[i] for i in order]

    def _read(self, position: records.Position) -> tuple[list[records.Record], records.Position]:
        """A block's records, and where the next block starts: records.START after the last one."""
        if position != self._at:
            self._records = sources.stream(self._source, position)
        self._at, found, size = None, [], 0
        for record in self._records:
            found.append(record)
            size += _size(record.example)
            if len(found) == BLOCK or size >= MAX_CHARACTERS:
                self._at = record.after
                return found, record.after
        return found, records.START


def _size(example: dict[str, typing.Any] | str) -> int:
    """Characters in an example's strings."""
    values = example.values() if isinstance(example, dict) else ()
    return sum(len(value) for value in values if isinstance(value, str))


def _text(start: Start) -> str:
    return json.dumps(start) + "\n"


def _saved(file: pathlib.Path) -> Iterator[Start]:
    """The starts in a file, up to a line that is damaged or was cut off when a run was killed."""
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            sequence, (at, number), before = json.loads(line)
        except (ValueError, TypeError):
            return
        yield Start(sequence, (at, number), before)
