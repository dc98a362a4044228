"""The fields of a JSON body, read by name and kind. What is wrong is collected, not raised."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from lora_jax.serving import refusal

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(body: bytes) -> dict[str, Any]:
    """The object in a request's body. Raises: Refusal if it is no JSON object of valid text."""
    try:
        # json.loads would take bytes that are half of a character.
        text = body.decode(json.detect_encoding(body))
        found = json.loads(text, parse_constant=_no_constant)
        if _SURROGATE.search(text):  # half of a character, which has no UTF-8
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise refusal.Refusal("The body has \\u escapes of half a character.") from None
    except (ValueError, RecursionError) as error:
        raise refusal.Refusal(f"The body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise refusal.Refusal(f"The body is {kind(found)}, not a JSON object.")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def kind(value: object) -> str:
    """What JSON calls a value."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string",
             list: "an array", dict: "an object"}  # fmt: skip
    return names.get(type(value), "null")


class Fields:
    """Reads the fields of an object. null is as good as a missing field.

    problems: (message, the field) of what is wrong so far; raise_problems raises them all at once.
    """

    def __init__(self, given: Mapping[str, Any], within: str = ""):
        self._given, self._within = given, within
        self.problems: list[tuple[str, str]] = []

    def __contains__(self, name: str) -> bool:
        return self._given.get(name) is not None

    def get(self, name: str) -> Any:
        return self._given.get(name)

    def wrong(self, name: str, message: str) -> None:
        """Notes what is wrong with a field."""
        name = self._within + name
        self.problems.append((f"{name}: {message}", name))

    def raise_problems(self) -> None:
        """Raises: Refusal that has all problems."""
        if self.problems:
            message = "; ".join(message for message, _ in self.problems[:20])
            raise refusal.Refusal(message, param=self.problems[0][1])

    def _of(self, kind_of_value: type, name: str, what: str, default: Any) -> Any:
        value = self.get(name)
        if value is None or isinstance(value, kind_of_value):
            return default if value is None else value
        self.wrong(name, f"{kind(value)}, not {what}")
        return default

    def flag(self, name: str, default: bool = False) -> bool:
        return self._of(bool, name, "a boolean", default)

    def text(self, name: str, default: Any = None) -> Any:
        return self._of(str, name, "a string", default)

    def object(self, name: str) -> dict[str, Any]:
        return self._of(dict, name, "an object", {})

    def whole(
        self, name: str, default: Any = None, *, least: float = -math.inf, most: float = math.inf
    ) -> Any:
        """A whole number in [least, most]."""
        value = self.get(name)
        if value is None:
            return default
        if not is_number(value) or value != math.trunc(value):
            self.wrong(name, f"{_shown(value)}, not a whole number")
            return default
        return int(value) if self._within_range(name, value, least, most) else default

    def number(
        self, name: str, default: Any = None, *, least: float = -math.inf, most: float = math.inf
    ) -> Any:
        """A number in [least, most]."""
        value = self.get(name)
        if value is None:
            return default
        if not is_number(value):
            self.wrong(name, f"{_shown(value)}, not a number")
            return default
        return float(value) if self._within_range(name, value, least, most) else default

    def _within_range(self, name: str, value: float, least: float, most: float) -> bool:
        if value < least:
            self.wrong(name, f"{value} is below {least}")
        elif value > most:
            self.wrong(name, f"{value} is above {most}")
        return least <= value <= most

    def array(self, name: str, each: type, what: str) -> list[Any]:
        """An array of values of one kind."""
        value = self.get(name)
        if value is None:
            return []
        if isinstance(value, list) and all(
            isinstance(one, each) and not isinstance(one, bool) for one in value
        ):
            return value
        self.wrong(name, f"{kind(value)}, not an array of {what}")
        return []


def is_number(value: object) -> bool:
    """Whether a value is a finite number. 10**400 is one in JSON, and in no float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _shown(value: object) -> str:
    return str(value) if isinstance(value, float) else kind(value)
