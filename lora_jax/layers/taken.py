"""What was adapted or quantized in a model, and what was left as it is."""

import re
from collections.abc import Mapping

MAX_LINES = 20


class Taken(dict):
    """{dotted path: rank or format} of what was taken; `left` has {dotted path: why} of the rest.

    `left` are the weights of two axes or more. As text, layers that differ in their number only are
    one line.
    """

    left: Mapping[str, str]

    def __init__(self, taken: Mapping[str, object], left: Mapping[str, str]):
        super().__init__(taken)
        self.left = dict(left)

    def __str__(self) -> str:
        lines = [*_lines(self, "{}: {}"), *_lines(self.left, "left: {}, {}")]
        return "\n".join(lines)


def _lines(found: Mapping[str, object], form: str) -> list[str]:
    alike: dict[tuple[str, str], int] = {}
    for name, value in found.items():
        key = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", name), str(value)
        alike[key] = alike.get(key, 0) + 1
    lines = [form.format(f"{name} ({count})" if count > 1 else name, value)
             for (name, value), count in alike.items()]  # fmt: skip
    more = len(lines) - MAX_LINES
    return lines if more <= 0 else [*lines[:MAX_LINES], f"… {more} more"]
