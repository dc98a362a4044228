"""The one exception for problems that a user can fix."""

from collections.abc import Sequence


class UserError(Exception):
    """A problem the caller can fix; the message says what was expected, what was found, where, and
    what to do.

    `found` and `where` may be lists, so that all occurrences of a problem are reported at once.
    """

    def __init__(
        self,
        expected: str,
        found: str | Sequence[str],
        where: str | Sequence[str] | None = None,
        do: str | None = None,
    ):
        self.found = _joined(found)
        lines = [
            f"  {label:<9} {text}"
            for label, text in (
                ("expected:", expected),
                ("found:", _joined(found)),
                ("where:", _joined(where)),
                ("to do:", do),
            )
            if text
        ]
        super().__init__("\n" + "\n".join(lines))


def _joined(items: str | Sequence[str] | None, most: int = 20) -> str | None:
    if items is None or isinstance(items, str):
        return items
    items = list(items)
    shown = items[:most] + ([f"… and {len(items) - most} more"] if len(items) > most else [])
    return "\n            ".join(shown)
