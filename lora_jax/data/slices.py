"""The part of a split that a source names, such as owner/name@train[:1000]. Imports no jax."""

import re

_PART = re.compile(r"(?P<whole>.+@[^@/\[\]]+)\[(?P<first>(-?\d+%?)?):(?P<last>(-?\d+%?)?)\]")


def rows_of(source: str, total: int) -> range | None:
    """The rows, of `total`, that a source names as `datasets` does, such as @train[:1000] or
    @train[-20%:]; None: all."""
    match = _PART.fullmatch(source)
    if match is None:
        return None
    ends = (
        round(total * int(end[:-1]) / 100) if end.endswith("%") else int(end)
        for end in (match["first"] or "0", match["last"] or "100%")
    )
    return range(total)[slice(*ends)]


def bounds_of(source: str) -> tuple[int, int | None] | None:
    """(the first row, the one after the last) of the part that a source names, if its size need not
    be known: (0, None) without a part; None for one such as @train[80%:] or @train[-100:]."""
    match = _PART.fullmatch(source)
    if match is None:
        return 0, None
    if {*"%-"} & {*match["first"], *match["last"]}:
        return None
    return int(match["first"] or 0), int(match["last"]) if match["last"] else None


def whole(source: str) -> str:
    """The source without the part of it that it names."""
    match = _PART.fullmatch(source)
    return match["whole"] if match else source
