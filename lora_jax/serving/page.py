"""The page at /: a chat in the browser with one model, or with two side by side.

page.html is all of it: it loads nothing from elsewhere, and asks this server alone.
"""

import functools
import importlib.resources

# What the browser lets the page do: run what is in it, and ask the server that it came from.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@functools.cache
def page() -> str:
    """The page as HTML."""
    return (importlib.resources.files(__package__) / "page.html").read_text(encoding="utf-8")
