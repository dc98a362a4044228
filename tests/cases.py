"""Cases of a parametrized test that run with `-m long` alone."""

from typing import Any

import pytest


def long(*cases: Any) -> list[Any]:
    """The cases, marked; a tuple is the values of several parameters."""
    several = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*values, marks=pytest.mark.long) for values in several]
