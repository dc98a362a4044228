"""HTML and SVG elements as strings, with all other text escaped."""

import html
from collections.abc import Iterable
from typing import Any


class Markup(str):
    """Text that is HTML already. `tag` escapes any other text."""


def tag(name: str, *inside: Any, **attributes: Any) -> Markup:
    """An element; `class_` and `stroke_width` stand for `class` and `stroke-width`."""
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{named}>{joined(inside)}</{name}>")


def joined(parts: Iterable[Any]) -> Markup:
    """The parts one after the other; those that are not Markup are escaped."""
    return Markup(
        "".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in parts)
    )
