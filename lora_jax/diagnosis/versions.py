"""Version numbers, compared as pip would compare releases."""

import re

_OPERATORS = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "~=": lambda a, b: a >= b,  # its upper bound is left to pip
}


def numbers(version: str) -> tuple[int, ...]:
    """(0, 10, 2) from "0.10.2.dev7": the numbers that it starts with, without zeros at the end."""
    found = [int(number) for number in re.findall(r"\d+", re.match(r"[\d.]*", version)[0])]
    while found and found[-1] == 0:
        found.pop()
    return tuple(found)


def meets(version: str, wanted: str) -> bool:
    """Whether a version meets a requirement such as "<=0.10.2,>=0.10.1" or "==0.0.42.*"."""
    for condition in filter(None, wanted.replace(" ", "").split(",")):
        operator, bound = re.match(r"([<>=!~]*)(.*)", condition).groups()
        if bound.endswith(".*"):
            inside = f"{version}.".startswith(bound.removesuffix("*"))
            met = inside == (operator == "==")
        else:
            met = _OPERATORS[operator](numbers(version), numbers(bound))
        if not met:
            return False
    return True
