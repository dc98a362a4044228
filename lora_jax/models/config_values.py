"""Values of a parsed JSON object, checked one by one. Imports no jax."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

_LIMIT = 2**31  # sizes are 32-bit in arrays


class Values:
    """The values of a JSON object; what is wrong with them is collected in `problems`.

    null is like an absent key, and 4.0 like 4. A value of another type becomes the default.
    """

    def __init__(self, raw: Mapping[str, Any], prefix: str = ""):
        self.given = {key: value for key, value in raw.items() if value is not None}
        self.problems: list[str] = []
        self._prefix = prefix

    def count(self, key: str, default: int | None = None, most: int = _LIMIT - 1) -> Any:
        """A whole number from 1 to `most`."""
        value = self.given.get(key, default)
        if value is None or (_is_number(value) and 1 <= value <= most and value == int(value)):
            return value if value is None else int(value)
        return self._wrong(key, f"a whole number from 1 to {most}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """A finite number of at least 0."""
        value = self.given.get(key, default)
        if value is None or (_is_number(value) and 0 <= value < math.inf):
            return value if value is None else float(value)
        return self._wrong(key, "a finite number, 0 or more", default)

    def positive(self, key: str, default: float | None = None) -> Any:
        """A finite number above 0."""
        value = self.number(key, default)
        return value if value != 0 else self._wrong(key, "a number above 0", default)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers above 0; () if there is none."""
        value = self.given.get(key, [])
        if isinstance(value, list | tuple) and all(
            _is_number(each) and 0 < each < math.inf for each in value
        ):
            return tuple(map(float, value))
        return self._wrong(key, "a list of numbers above 0", ())

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false, also written as 1 or 0."""
        value = self.given.get(key, default)
        if isinstance(value, bool) or (_is_number(value) and value in (0, 1)):
            return bool(value)
        return self._wrong(key, "true or false", default)

    def _wrong(self, key: str, expected: str, default: Any) -> Any:
        self.problems.append(f"{self._prefix}{key} = {shown(self.given[key])} is not {expected}")
        return default


def shown(value: Any) -> str:
    """A value in an error message, shortened if it is long."""
    return reprlib.repr(value)


def shown_key(key: str) -> str:
    """A key in a message, shortened if it is long."""
    return key if key.isprintable() and len(key) <= 60 else shown(key)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # float() of a larger int overflows
