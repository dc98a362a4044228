"""The configurations in the README.md of a folder of data: which files each has, by split.

They stand as YAML at the beginning, under `configs`, as the library `datasets` reads them. Imports
no jax.
"""

import itertools
import pathlib
import typing
from collections.abc import Mapping, Sequence

from lora_jax import errors

NAME = "README.md"


class Config(typing.NamedTuple):
    """A configuration: {split: patterns of its files}, or without these the folder they are in."""

    name: str
    files: Mapping[str, Sequence[str]]
    folder: str
    is_default: bool


def choose(folder: pathlib.Path, name: str) -> Config | None:
    """The configuration of that name, or the default one; None if the folder has no configurations.

    Raises: UserError if there is no such configuration, or no default one and several others.
    """
    found = {config.name: config for config in _configs(folder / NAME)}
    default = [each for each in found.values() if len(found) == 1 or each.is_default]
    if name in found:
        return found[name]
    if not name and (len(default) == 1 or not found):
        return default[0] if default else None
    raise errors.UserError(
        expected=f"the configuration {name}" if name else "the name of a configuration",
        found=f"the configurations {', '.join(found)}" if found else "no configurations",
        where=str(folder / NAME),
        do=f"choose one, as in {folder}:{next(iter(found))}" if found else f"leave :{name} out",
    )


def _configs(path: pathlib.Path) -> list[Config]:
    """What a README.md lists under `configs`. Raises: UserError if it is malformed."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
        first, _, rest = text.partition("\n")
        if first.strip() != "---":
            return []
        header = yaml.safe_load(rest.partition("\n---")[0])
        listed = header.get("configs") or [] if isinstance(header, dict) else []
        return [_config(each) for each in listed]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise errors.UserError(
            expected="configs in YAML, each with a config_name and perhaps data_files or data_dir",
            found=(str(error).splitlines() or [type(error).__name__])[0],
            where=str(path),
            do="correct it, or choose the files with a pattern, such as '*.jsonl'",
        ) from error


def _config(raw: Mapping[str, typing.Any]) -> Config:
    name, files = str(raw["config_name"]), raw.get("data_files") or {}
    if isinstance(files, str):
        files = [files]
    if isinstance(files, list):
        if all(isinstance(each, str) for each in files):
            files = [{"split": "train", "path": files}]
        files = {str(each["split"]): each["path"] for each in files}
    files = {split: [path] if isinstance(path, str) else path for split, path in files.items()}
    for path in map(pathlib.PurePath, itertools.chain(*files.values())):
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{path}, which is outside of the folder")
    is_default = name == "default" or raw.get("default") is True
    return Config(name, files, str(raw.get("data_dir") or ""), is_default)
