"""The one exception for problems that a user can fix."""

import contextlib
import difflib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence


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
                ("found:", self.found),
                ("where:", self.where),
                ("to do:", do),
            )
            if text
        ]
        super().__init__("\n" + "\n".join(lines))

    @classmethod
    def together(cls, problems: "Sequence[UserError]") -> "UserError":
        """One error for several problems; the problem itself where there is one."""
        return problems[0] if len(problems) == 1 else _Several(problems)

    def on_one_line(self) -> str:
        """What was found, where, and what was expected."""
        found = f"{self.where}: {self.found}" if self.where else str(self.found)
        return " ".join(f"{found} (expected {self.expected})".split())


class _Several(UserError):
    """Several problems: the message has a paragraph for each, with its own place and remedy."""

    def __init__(self, problems: Sequence[UserError]):
        alike: dict[str, list[UserError]] = {}
        for problem in problems:
            alike.setdefault(problem.expected, []).append(problem)
        paragraphs = [_merged(group) for group in alike.values()]
        super().__init__(
            expected="; ".join(each.expected for each in paragraphs),
            found=[each.on_one_line() for each in paragraphs],
        )
        self.args = ("\n" + "\n\n".join(str(each).strip("\n") for each in paragraphs),)


def _merged(alike: Sequence[UserError]) -> UserError:
    """One error for problems with the same expectation."""
    if len(alike) == 1:
        return alike[0]
    same = len({each.do for each in alike}) == 1
    found = []
    for each in alike:
        text = f"{each.where}: {each.found}" if each.where else str(each.found)
        found.append(f"{text} ({each.do})" if each.do and not same else text)
    return UserError(alike[0].expected, found, do=alike[0].do if same else None)


@contextlib.contextmanager
def noted(problems: list[UserError]) -> Iterator[None]:
    """Inside, a UserError ends the block and is added to `problems`, to be raised with others."""
    try:
        yield
    except UserError as error:
        problems.append(error)


def did_you_mean(found: str, known: Iterable[str]) -> str | None:
    """What to do about a misspelled word: "did you mean …?"; None if no known one is like it."""
    close = difflib.get_close_matches(found, [*known], n=1)
    return f"did you mean {close[0]}?" if close else None


def similar_path(path: str | pathlib.Path) -> str | None:
    """The same for a path that does not exist: names beside it, or beside its missing parent."""
    path = pathlib.Path(path).expanduser()
    if os.path.exists(path):
        return None
    for missing in (path, *path.parents):
        with contextlib.suppress(OSError):
            if missing.parent.is_dir():
                beside = (each.name for each in missing.parent.iterdir())
                close = difflib.get_close_matches(missing.name, [*beside], n=1)
                rest = path.relative_to(missing)
                meant = missing.parent / close[0] / rest if close else None
                return f"did you mean {meant}?" if meant and os.path.exists(meant) else None
    return None


def _joined(items: str | Sequence[str] | None, most: int = 20) -> str | None:
    if items is None or isinstance(items, str):
        return items
    items = list(items)
    shown = items[:most] + ([f"… and {len(items) - most} more"] if len(items) > most else [])
    return "\n            ".join(shown)
