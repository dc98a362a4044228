"""Cases of a parametrized test that run with `-m long` alone, and fewer examples of a slow one."""

from typing import Any

import hypothesis
import pytest


def few() -> hypothesis.settings:
    """A third of the profile's examples, for a test whose examples are slow."""
    return hypothesis.settings(max_examples=hypothesis.settings.default.max_examples // 3)


def long(*cases: Any) -> list[Any]:
    """The cases, marked; a tuple is the values of several parameters."""
    several = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*values, marks=pytest.mark.long) for values in several]
