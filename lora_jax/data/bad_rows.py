"""Rows that cannot be trained on: refused, or skipped and counted. Imports no jax."""

import typing
from collections.abc import Callable, Mapping

import numpy as np

from lora_jax import errors
from lora_jax.data import rows
from lora_jax.data.examples import kinds
from lora_jax.data.formats import files

Encoded = typing.TypeVar("Encoded")
_SHOWN = 3  # places


class BadRows:
    """The bad rows that a run has skipped, at most `most` of them.

    places: {where a row is from: what is wrong with it}.
    """

    def __init__(self, most: int = 0):
        self.most = most
        self.places: dict[str, str] = {}
        self._told = 0

    def skip(self, found: Mapping[str, str]) -> bool:
        """Counts the rows in `found` and returns True, if they may be skipped.

        A row that was counted before, such as in an earlier pass over a stream, is counted once.
        """
        if len(self.places | found) > self.most:
            return False
        self.places.update(found)
        return True

    def news(self) -> str:
        """What was skipped since the last call, for the user; "" if nothing was."""
        new = [*self.places.items()][self._told :]
        self._told += len(new)
        if not new:
            return ""
        shown = "; ".join(f"{place}: {problem}" for place, problem in new[:_SHOWN])
        more = f"; … and {len(new) - _SHOWN} more" if len(new) > _SHOWN else ""
        return f"{self._told} skipped (of at most {self.most}): {shown}{more}"


def encode(
    found: rows.Rows,
    encode: Callable[[rows.Rows, bool], Encoded],
    bad: BadRows,
    *,
    may_be_empty: bool = False,
) -> tuple[rows.Rows, Encoded]:
    """(the rows without those that `encode` refuses, what it makes of them).

    encode: (rows, whether nothing may come of them) → what it makes of them, or a UserError.
    Raises: its UserError, if more rows are refused than may be skipped.
    """
    try:
        return found, encode(found, may_be_empty)
    except errors.UserError:
        if bad.most == 0 or files.STREAM in found.column_names:
            raise
        refused = _refused(found, lambda some: encode(some, True), bad.most)
        if not refused or not bad.skip({found[n][kinds.ORIGIN]: refused[n] for n in refused}):
            raise
        kept = found.select(n for n in range(len(found)) if n not in refused)
        return kept, encode(kept, may_be_empty)


def _refused(
    found: rows.Rows, encode: Callable[[rows.Rows], typing.Any], most: int
) -> dict[int, str]:
    """{number of a row: problem} of the rows that are refused alone; empty if more than `most`."""
    refused: dict[int, str] = {}
    parts = [np.arange(len(found))]
    while parts:
        part = parts.pop()
        try:
            encode(found.select(part))
        except errors.UserError as error:
            if len(part) > 1:
                parts += np.array_split(part, 2)[::-1]
                continue
            refused[int(part[0])] = str(error.found)
            if len(refused) > most:
                return {}
    return refused
