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
        self.expected, self.found = expected, _joined(found)
        self.where, self.do = _joined(where), do
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

    @classmethod
    def together(cls, problems: "Sequence[UserError]", expected: str) -> "UserError":
        """One error for several problems; the problem itself where there is one."""
        if len(problems) == 1:
            return problems[0]
        return cls(expected, [problem.on_one_line() for problem in problems])

    def on_one_line(self) -> str:
        """What was found, where, and what was expected."""
        found = f"{self.where}: {self.found}" if self.where else str(self.found)
        return " ".join(f"{found} (expected {self.expected})".split())


def _joined(items: str | Sequence[str] | None, most: int = 20) -> str | None:
    if items is None or isinstance(items, str):
        return items
    items = list(items)
    shown = items[:most] + ([f"… and {len(items) - most} more"] if len(items) > most else [])
    return "\n            ".join(shown)
