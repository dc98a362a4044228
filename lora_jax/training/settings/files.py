"""Reads and writes settings as YAML: `train --config FILE`, and the config.yaml of a run."""

import pathlib
import re
from typing import NamedTuple

from lora_jax import errors
from lora_jax.training.settings import assemble, checks, groups


class File(NamedTuple):
    """A YAML file: {name: value}, {name: its line}, and settings that it has twice."""

    values: groups.Flat
    origins: dict[str, str]
    problems: list[errors.UserError]


def load(path: pathlib.Path | str) -> groups.TrainSettings:
    """The settings in a YAML file, such as a run's config.yaml. Raises: UserError as `build`."""
    return assemble.build_from(*read(path))


def read(path: pathlib.Path | str) -> File:
    """The content of a YAML file. Raises: UserError if it cannot be read."""
    import yaml  # imported late, to keep --help fast

    do = None
    try:
        text = pathlib.Path(path).expanduser().read_bytes()  # UTF-8, or UTF-16 with a mark
        found, root = yaml.load(text, _loader()), yaml.compose(text, yaml.SafeLoader)
        problem = None if isinstance(found, dict | None) else f"a {type(found).__name__}"
    except OSError as error:
        problem = error.strerror or str(error)
        do = errors.similar_path(path) or (
            "check the path; a run writes such a file, config.yaml in its folder"
        )
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
    if problem is None and (odd := [key for key in found or {} if not isinstance(key, str)]):
        problem = f"the key {odd[0]!r}"
    if problem:
        raise errors.UserError(
            expected="a YAML file of `name: value` lines, named as the flags, such as rank: 8",
            found=problem,
            where=str(path),
            do=do or "correct the file",
        )
    lines: dict[str, list[int]] = {}
    for key, _ in root.value if found else ():
        lines.setdefault(_name(key.value), []).append(key.start_mark.line + 1)
    twice = [
        errors.UserError(
            expected="each setting once",
            found=f"{name} more than once",
            where=f"{path}, lines {' and '.join(map(str, numbers))}",
            do="keep one of the lines",
        )
        for name, numbers in lines.items()
        if len(numbers) > 1
    ]
    return File(
        {_name(key): value for key, value in (found or {}).items()},
        {name: f"{path}, line {numbers[-1]}" for name, numbers in lines.items()},
        twice,
    )


def _loader() -> type:
    """YAML's safe loader, to which 8:30 and 010 are no numbers of base 60 and 8, as in YAML 1.2."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_yaml_int(self, node: yaml.ScalarNode) -> int | str:
            other_base = re.search(r":|^[-+]?0\d", node.value)
            return node.value if other_base else super().construct_yaml_int(node)

        def construct_yaml_float(self, node: yaml.ScalarNode) -> float | str:
            return node.value if ":" in node.value else super().construct_yaml_float(node)

    for name in ("int", "float"):
        Loader.add_constructor(
            f"tag:yaml.org,2002:{name}", getattr(Loader, f"construct_yaml_{name}")
        )
    return Loader


def _name(key: str) -> str:
    return key.replace("-", "_")


def save(settings: groups.TrainSettings, path: pathlib.Path | str) -> None:
    """Writes all settings that have an effect, except output_dir, for `load` to read.

    The paths of the demo are left out, so that the file can be used on another machine.
    """
    import yaml

    kept = {
        name: value
        for name, value in settings.flat().items()
        if name != "output_dir"
        and value not in ({}, [])
        and not checks.is_inert(name, settings)
        and not (name in assemble.PATHS and name not in settings.given)  # the demo's
    }
    pathlib.Path(path).write_text(
        "# To repeat this run: lora-jax train --config FILE\n"
        + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True),
        encoding="utf-8",
    )
