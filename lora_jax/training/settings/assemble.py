"""Builds TrainSettings from values by name: converts, completes, composes and checks them."""

import dataclasses
import glob
import os
import pathlib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence

from lora_jax import assets, errors
from lora_jax.training.settings import checks, convert, groups, names

# Where a resumed run finds the same contents.
MOVABLE = ("model", "init_adapter", "dataset", "eval_dataset")
PATHS = (*MOVABLE, "chat_template")
Origins = Mapping[str, str]  # {setting: the line of a file that gives it}


def build(**given: groups.Value) -> groups.TrainSettings:
    """The settings of a new run from values by name; strings are parsed as those of flags.

    Without a model and a dataset, the model, data and settings of the demo are used.
    Raises: one UserError that has all unknown names, values out of range, and contradictions.
    """
    return build_from(given)


def build_from(
    given: Mapping[str, groups.Value],
    origins: Origins | None = None,
    problems: Sequence[errors.UserError] = (),
) -> groups.TrainSettings:
    """As `build`. problems: found so far, to be in the same error."""
    values, found = converted(given)
    settings, wrong = _composed(with_demo(values), given=frozenset(values))
    # Of a setting without a valid value, only that is a problem.
    unclear = {name for name, value in given.items() if value is not None} - values.keys()
    unclear &= groups.FIELDS.keys()
    check = [each for each in checks.problems(settings)
             if not unclear & _named(each.found, each.where, each.do)]  # fmt: skip
    _raise([*problems, *_located([*found, *wrong, *check], origins)])
    if settings.eval.patience and not settings.eval.keep_best:
        settings = settings.replace(keep_best=True)
    return settings


def checked(settings: groups.TrainSettings) -> groups.TrainSettings:
    """`settings`, which may have been written by hand, with values in the types of their fields.

    Raises: UserError as `build`.
    """
    values, found = converted(settings.flat())
    whole, wrong = _composed(values, given=settings.given)
    _raise([*found, *wrong, *checks.problems(whole)])
    return whole


def given_to_resume(
    given: Mapping[str, groups.Value],
    origins: Origins | None = None,
    problems: Sequence[errors.UserError] = (),
) -> groups.Flat:
    """The settings that are given when a run is resumed. Raises: UserError as `build`."""
    values, found = converted(given)
    _, wrong = _composed(values, given=frozenset(values))
    _raise([*problems, *_located([*found, *wrong], origins)])
    return values


def converted(given: Mapping[str, groups.Value]) -> tuple[groups.Flat, list[errors.UserError]]:
    """(the values in the types of their fields, an error for each of the others).

    What is None is left out.
    """
    values: groups.Flat = {}
    problems: list[errors.UserError] = []
    for name, value in given.items():
        if names.is_empty(name, value):
            continue
        with errors.noted(problems):
            found = one(name, value)
            if found is not None:
                values[name] = found
    return values, problems


def one(name: str, value: groups.Value) -> groups.Value:
    """A value in the type of its field. Raises: UserError if it has none or cannot be read."""
    if name not in groups.FIELDS:
        raise names.problem(name, value)
    if (name, value) in (("report_to", "none"), ("max_steps", -1), ("max_steps", "-1")):
        return None  # as in transformers
    found = convert.value(name, value, groups.FIELDS[name].hint)
    if name in PATHS and found is not None:
        many = tuple(map(os.path.expanduser, [found] if isinstance(found, str) else found))
        return many[0] if isinstance(found, str) else many
    if found is not None and name in groups.CHOICES and found not in groups.CHOICES[name]:
        raise errors.UserError(
            expected=f"one of {', '.join(groups.CHOICES[name])}",
            found=repr(found),
            where=convert.flag(name),
        )
    return found


def compose(values: Mapping[str, groups.Value], *, given: frozenset[str]) -> groups.TrainSettings:
    """TrainSettings from {name: value} and defaults. Raises: UserError if a part is not valid."""
    settings, problems = _composed(values, given=given)
    _raise(problems)
    return settings


def from_record(flat: Mapping[str, groups.Value], given: frozenset[str]) -> groups.TrainSettings:
    """The settings of a run from its run.json, which another version may have written."""
    values, problems = converted({n: value for n, value in flat.items() if n in groups.FIELDS})
    _raise(problems)
    return compose(values, given=given)


def with_demo(values: groups.Flat) -> groups.Flat:
    """The values and, without a model and a dataset, the settings of the demo."""
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


def absolute(flat: groups.Flat) -> groups.Flat:
    """The settings with absolute paths, which can be used from any folder."""
    return {name: _absolute(value) if name in PATHS else value for name, value in flat.items()}


def exists(path: str) -> bool:
    """Whether there are files under a path or pattern, also before :config and @split."""
    path = os.path.expanduser(path)
    front = re.sub(r"(:[^:@/]+)?(@[^@/]+)?$", "", path)
    return any(os.path.exists(each) or glob.glob(each) for each in (path, front))


def _absolute(given: groups.Value) -> groups.Value:
    """The absolute path if there is such a file; else as given, such as a hub id."""
    if isinstance(given, str):
        return str(pathlib.Path(given).expanduser().absolute()) if exists(given) else given
    if isinstance(given, list | tuple):
        return type(given)(_absolute(each) for each in given)
    return given


def _composed(
    values: Mapping[str, groups.Value], *, given: frozenset[str]
) -> tuple[groups.TrainSettings, list[errors.UserError]]:
    """(the settings, an error for each part that is not valid and has its defaults instead)."""
    parts: dict[str, groups.Flat] = {}
    for name, value in values.items():
        parts.setdefault(groups.FIELDS[name].part, {})[name] = value
    made: dict[str, typing.Any] = {}
    problems: list[errors.UserError] = []
    for part, own in parts.items():
        try:
            made[part] = dataclasses.replace(getattr(groups.TrainSettings(), part), **own)
        except errors.UserError as error:
            problems += [error, *checks.out_of_range(own)]
    return groups.TrainSettings(**made, given=given), problems


def _named(*parts: str | None) -> set[str]:
    """The words in parts of an error; a setting may be written --max-steps or max_steps."""
    words = re.findall(r"[\w-]+", " ".join(filter(None, parts)))
    return {word.lstrip("-").replace("-", "_") for word in words}


def _raise(problems: Sequence[errors.UserError]) -> None:
    """Raises one error for all problems, if there are any."""
    if problems:
        raise errors.UserError.together(problems)


def _located(
    problems: Sequence[errors.UserError], origins: Origins | None
) -> Iterator[errors.UserError]:
    """Yields the problems; those with settings of a file say in which line they are."""
    for problem in problems:
        named = _named(problem.found, problem.where)
        lines = [line if problem.found == name else f"{line}: {name}"
                 for name, line in (origins or {}).items() if name in named]  # fmt: skip
        if lines:
            problem = errors.UserError(problem.expected, str(problem.found), lines, problem.do)
        yield problem
