"""Reads and writes settings as YAML: `train --config FILE`, and the config.yaml of a run."""

import pathlib

from lora_jax import errors
from lora_jax.training.settings import assemble, checks, groups


def load(path: pathlib.Path | str) -> groups.TrainSettings:
    """The settings in a YAML file, such as a run's config.yaml. Raises: UserError as `build`."""
    return assemble.build(**read(path))


def read(path: pathlib.Path | str) -> groups.Flat:
    """{name: value} of a YAML file. Raises: UserError if it cannot be read."""
    import yaml  # imported late, to keep --help fast

    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        found, root = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
        problem = None if isinstance(found, dict | None) else f"a {type(found).__name__}"
    except OSError as error:
        problem = error.strerror or str(error)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
    if problem is None and (odd := [key for key in found or {} if not isinstance(key, str)]):
        problem = f"the key {odd[0]!r}"
    if problem is None and found:
        names = [key.value for key, _ in root.value]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            problem = f"{', '.join(twice)} more than once"
    if problem:
        raise errors.UserError(
            expected="a YAML file of `name: value` lines, named as the flags, such as rank: 8",
            found=problem,
            where=str(path),
        )
    return {name.replace("-", "_"): value for name, value in (found or {}).items()}


def save(settings: groups.TrainSettings, path: pathlib.Path) -> None:
    """Writes all settings that have an effect, except output_dir, for `load` to read."""
    import yaml

    kept = {
        name: value
        for name, value in settings.flat().items()
        if name != "output_dir" and value not in ({}, []) and not checks.is_inert(name, settings)
    }
    path.write_text(
        "# To repeat this run: lora-jax train --config FILE\n"
        + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True),
        encoding="utf-8",
    )
