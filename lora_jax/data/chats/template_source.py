"""The source of a chat template: its syntax tree, and what it looks for in a chat."""

import re
import typing

if typing.TYPE_CHECKING:
    import jinja2

_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_ROLES = {"user", "assistant", "system", "developer", "tool", "function", "ipython", "model"}


def marks_generation(source: str) -> bool:
    """Whether the template itself marks what the assistant writes."""
    return _GENERATION.search(source) is not None


def parsed(source: str) -> "jinja2.nodes.Template | None":
    """The syntax tree of a template; None if it has an error."""
    import jinja2

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return environment.parse(_GENERATION.sub("", source))
    except jinja2.TemplateError:
        return None


def literals(source: str) -> re.Pattern[str]:
    """Matches what a template compares its input with or looks for in it."""
    import jinja2

    tree = parsed(source)
    if tree is None:
        return re.compile("(?!)")
    tests = (jinja2.nodes.Compare, jinja2.nodes.Call, jinja2.nodes.Filter, jinja2.nodes.Test)
    found = {
        constant.value.strip()
        for node in tree.find_all(tests)
        for constant in node.find_all(jinja2.nodes.Const)
        if isinstance(constant.value, str)
    }
    texts = sorted((each for each in found - _ROLES if len(each) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")
