"""Converts the values of settings from the strings of flags or of a YAML file."""

import datetime
import fractions
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax import errors
from lora_jax.parallel import axes

MAX_WEIGHT = 100_000  # of the sum of weights: a mixture's order repeats after that many sequences
SWEPT = {"lr": float, "rank": int}  # the settings that a sweep can vary
_NUMBER = {float: r"\d*\.?\d+(?:[eE][-+]?\d+)?", int: r"\d+"}


def flag(name: str) -> str:
    """--max-steps from max_steps."""
    return f"--{name.replace('_', '-')}"


def value(name: str, given: Any, hint: Any) -> Any:
    """`given` as a value of the type `hint`; a string is parsed as the value of the flag `name`.

    Raises: UserError if it cannot be converted.
    """
    if given is None:
        return None
    if name in _TEXTS and isinstance(given, str):
        return _TEXTS[name](given)
    if name in _LISTS and isinstance(given, Sequence) and not isinstance(given, str):
        return _LISTS[name](given)
    kinds = [kind for kind in _kinds(hint) if kind is not types.NoneType]
    for kind in kinds:
        found = _of_kind(given, kind)
        if found is not None:
            return found
    if float in kinds:
        kinds = [kind for kind in kinds if kind is not int]
    raise errors.UserError(
        expected=" or ".join(_name(kind) for kind in kinds),
        found=repr(given),
        where=flag(name),
    )


def _name(kind: Any) -> str:
    return _NAMES.get(kind) or _NAMES.get(typing.get_origin(kind), "text")


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _of_kind(given: Any, kind: Any) -> Any:
    """`given` as a `kind`; None if it cannot be one."""
    if isinstance(kind, types.UnionType):
        found = (_of_kind(given, each) for each in typing.get_args(kind))
        return next((value for value in found if value is not None), None)
    origin, (inner, *_) = typing.get_origin(kind), typing.get_args(kind) or (str,)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        each = [given] if isinstance(given, str | int | float | os.PathLike) else given
        if not isinstance(each, Sequence):
            return None
        items = [_of_kind(item, inner) for item in each]
        return None if None in items else tuple(items)
    if origin is dict:
        of_each = typing.get_args(kind)[1]
        items = given.items() if isinstance(given, Mapping) else ()
        found = {name: _of_kind(item, of_each) for name, item in items}
        return found if isinstance(given, Mapping) and None not in found.values() else None
    if kind is bool:
        return given if isinstance(given, bool) else None
    if isinstance(given, bool):
        return None
    if kind in (int, float):
        if kind is float and isinstance(given, int):
            return given  # 16 stays 16 in files
        try:
            number = kind(given)
        except (TypeError, ValueError, OverflowError):
            return None
        return None if isinstance(given, float) and number != given == given else number
    if isinstance(given, datetime.date):  # as YAML reads 2026-01-31
        return given.isoformat()
    return str(given) if isinstance(given, kind | os.PathLike) else None


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", tuple: "a list",
          tuple[str, ...]: "a list of texts", Sequence: "a list", dict: "a mapping"}  # fmt: skip


def names(name: str, text: str) -> tuple[str, ...] | str:
    """("q_proj", "v_proj") from "q_proj,v_proj" or "q_proj v_proj"; regular expressions and
    all-linear unchanged."""
    if text == "all-linear":
        return text
    if all(c.isalnum() or c in "_,. " for c in text):
        return _split(text)
    try:
        re.compile(text)
    except re.error as error:
        raise errors.UserError(
            expected="names such as q_proj,v_proj, a regular expression, or all-linear",
            found=f"{text}: {error}",
            where=flag(name),
        ) from None
    return text


def several_names(name: str, texts: Sequence[str]) -> tuple[str, ...] | str:
    """("q_proj", "v_proj") from ["q_proj", "v_proj"]; a single text as in `names`."""
    return names(name, str(texts[0])) if len(texts) == 1 else _split(*texts)


def _split(*texts: Any) -> tuple[str, ...]:
    return tuple(" ".join(map(str, texts)).replace(",", " ").split())


def layers(text: str) -> tuple[int, ...]:
    """(0, 2, 3, 4) from "0,2-4"."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise errors.UserError(
                expected="layer numbers such as 0,2 or 16-31", found=repr(text), where="--layers"
            )
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(found))


def patterns(name: str, texts: Sequence[str], number: Callable[[str], float]) -> dict[str, float]:
    """{"down_proj": 4} from ["down_proj=4"]."""
    found = {}
    for text in texts:
        pattern, _, number_text = str(text).rpartition("=")
        try:
            re.compile(pattern)
            found[pattern] = number(number_text)
        except (ValueError, re.error):
            pattern = ""
        if not pattern:
            raise errors.UserError(
                expected="REGEX=NUMBER, such as down_proj=4", found=repr(text), where=flag(name)
            )
    return found


def columns(text: str) -> dict[str, str]:
    """{"prompt": "question"} from "prompt=question"."""
    pairs = [part.partition("=") for part in text.split(",")]
    named = {ours.strip(): theirs for ours, _, theirs in pairs}
    if not all(named) or not all(named.values()) or len(named) < len(pairs):
        raise errors.UserError(
            expected="FIELD=COLUMN pairs, each field once, e.g. prompt=question,completion=answer",
            found=repr(text),
            where="--columns",
        )
    return named


def weights(text: str) -> tuple[int, ...]:
    """(3, 1) from "3,1" or "0.75,0.25": the smallest whole numbers."""
    try:
        parts = [fractions.Fraction(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        parts = [fractions.Fraction(0)]
    whole = [int(part * math.lcm(*(p.denominator for p in parts))) for part in parts]
    smallest = tuple(part // (math.gcd(*whole) or 1) for part in whole)
    if min(smallest) <= 0 or sum(smallest) > MAX_WEIGHT:
        raise errors.UserError(
            expected="a positive number for each data set, such as 3,1 or 0.75,0.25; as whole "
            f"numbers, with a sum of at most {MAX_WEIGHT}",
            found=repr(text),
            where="--weights",
            do="round them, or leave out data sets without weight",
        )
    return smallest


def seconds(text: str) -> float:
    """5400.0 from "1h30m", "90m" or "5400"."""
    given = text.replace(" ", "")
    if re.fullmatch(r"\d+(\.0*)?", given):  # in 1h30 it could be minutes, too
        given += "s"
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)(?:\.0*)?s)?", given)
    found = parts and sum(
        int(number or 0) * unit
        for number, unit in zip(parts.groups(), (86400, 3600, 60, 1), strict=True)
    )
    if not found:
        raise errors.UserError(
            expected="a time such as 8h, 1h30m or 45m", found=repr(text), where="--max-time"
        )
    return float(found)


def sweep(text: str) -> tuple[str, dict[str, float]]:
    """("lr", {"lr=1e-4": 1e-4, "lr=3e-4": 3e-4}) from "lr=1e-4,3e-4".

    Raises: UserError unless these are two or more different positive numbers.
    """
    setting, _, rest = text.replace(" ", "").partition("=")
    values, kind = rest.split(","), SWEPT.get(setting)
    numbers = [
        kind(each) if kind and re.fullmatch(_NUMBER[kind], each) else None for each in values
    ]
    fits = all(number and number < math.inf for number in numbers)
    if not fits or not 1 < len(numbers) == len(set(numbers)):
        raise errors.UserError(
            expected="two or more learning rates or ranks, such as lr=1e-4,3e-4 or rank=4,8,16",
            found=repr(text),
            where="--sweep",
        )
    return setting, {f"{setting}={v}": n for v, n in zip(values, numbers, strict=True)}


def _kept(parse: Callable[[str], Any]) -> Callable[[str], str]:
    """The text itself, if `parse` takes it."""

    def kept(text: str) -> str:
        parse(text)
        return text

    return kept


_TEXTS: dict[str, Callable[[str], Any]] = {
    "targets": lambda text: names("targets", text),
    "exclude": lambda text: names("exclude", text),
    "layers": layers,
    "rank_pattern": lambda text: patterns("rank_pattern", [text], int),
    "alpha_pattern": lambda text: patterns("alpha_pattern", [text], float),
    "modules_to_save": _split,
    "columns": columns,
    "weights": weights,
    "max_time": seconds,
    "sweep": _kept(sweep),
    "mesh": _kept(axes.sizes),
}
_LISTS: dict[str, Callable[[Sequence[Any]], Any]] = {
    "targets": lambda texts: several_names("targets", texts),
    "exclude": lambda texts: several_names("exclude", texts),
    "modules_to_save": lambda texts: _split(*texts),
    "columns": lambda texts: columns(",".join(map(str, texts))),
    "rank_pattern": lambda texts: patterns("rank_pattern", texts, int),
    "alpha_pattern": lambda texts: patterns("alpha_pattern", texts, float),
    "weights": lambda numbers: weights(",".join(map(str, numbers))),
}
