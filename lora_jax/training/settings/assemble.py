"""Builds TrainSettings from values by name: converts, completes, composes and checks them."""

import dataclasses
import difflib
import pathlib
import typing
from collections.abc import Mapping

from lora_jax import assets, errors
from lora_jax.training.settings import checks, convert, groups

_PATHS = ("model", "dataset", "eval_dataset")  # made absolute, to work from any folder


def build(**given: groups.Value) -> groups.TrainSettings:
    """The settings of a new run from values by name; strings are parsed as those of flags.

    Without a model and a dataset, the model, data and settings of the demo are used.
    Raises: UserError that lists all unknown names, values out of range, and contradictions.
    """
    values = converted(given)
    settings = compose(_with_demo(values), given=frozenset(values))
    if problems := [*checks.problems(settings)]:
        raise errors.UserError.together(problems, "settings that go together")
    if settings.eval.patience and not settings.eval.keep_best:
        settings = settings.replace(keep_best=True)
    return settings


def converted(given: Mapping[str, groups.Value]) -> groups.Flat:
    """The values, converted to the types of their fields; None is dropped.

    Raises: UserError that lists all unknown names and values that cannot be read.
    """
    problems, values = [], {}
    for name, value in given.items():
        if name not in groups.FIELDS:
            close = difflib.get_close_matches(name, groups.FIELDS, n=1)
            problems.append(
                errors.UserError(
                    expected="names of settings, as train --help-all lists them",
                    found=name,
                    do=f"did you mean {close[0]}?" if close else None,
                )
            )
            continue
        try:
            found = convert.value(name, value, groups.FIELDS[name].hint)
            if found is not None and name in groups.CHOICES and found not in groups.CHOICES[name]:
                raise errors.UserError(
                    expected=f"one of {', '.join(groups.CHOICES[name])}",
                    found=repr(found),
                    where=convert.flag(name),
                )
        except errors.UserError as error:
            problems.append(error)
            continue
        if found is not None:
            values[name] = _found_anywhere(found) if name in _PATHS else found
    if problems:
        raise errors.UserError.together(problems, "settings that can be read")
    return values


def compose(values: Mapping[str, groups.Value], *, given: frozenset[str]) -> groups.TrainSettings:
    """TrainSettings from {name: value} and defaults. Raises: UserError if a part is not valid."""
    parts: dict[str, groups.Flat] = {}
    for name, value in values.items():
        parts.setdefault(groups.FIELDS[name].part, {})[name] = value
    made, problems = {}, []
    for part, own in parts.items():
        try:
            made[part] = dataclasses.replace(getattr(groups.TrainSettings(), part), **own)
        except errors.UserError as error:
            problems.append(error)
    if problems:
        problems += checks.out_of_range(values)
        raise errors.UserError.together(problems, "settings that go together")
    return groups.TrainSettings(**made, given=given)


def from_record(flat: Mapping[str, groups.Value], given: frozenset[str]) -> groups.TrainSettings:
    """The settings of a run from its run.json, which another version may have written."""
    known = {name: value for name, value in flat.items() if name in groups.FIELDS}
    return compose(converted(known), given=given)


def _with_demo(values: groups.Flat) -> groups.Flat:
    found = dict(values)
    if "model" not in values and "dataset" not in values:
        found = assets.settings() | found
    if "epochs" in values and "max_steps" not in values:
        found.pop("max_steps", None)
    if values.get("sweep"):
        name, each = convert.sweep(str(values["sweep"]))
        found[name] = max(each.values())
    if "dataset" not in values and not values.get("dpo"):
        found.setdefault("eval_dataset", str(assets.EVAL))
    return found


def _found_anywhere(given: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """The absolute path if it exists; else as given, such as a hub id."""
    if isinstance(given, tuple):
        return tuple(typing.cast(str, _found_anywhere(each)) for each in given)
    path = pathlib.Path(given).expanduser()
    return str(path.absolute()) if path.exists() else given
