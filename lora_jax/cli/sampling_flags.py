"""What the verbs that generate have in common: flags of sampling, and the base model's settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax import errors
from lora_jax.cli import arguments
from lora_jax.generation import config
from lora_jax.training.settings import checks, convert, groups

_FILTERS = ("top_k", "top_p", "min_p")


def add(flags: arguments.Flags) -> None:
    """Adds --temperature, the filters, and --seed."""
    flags.add("--temperature", "0: always take the most likely token", type=float)
    flags.add("--top-k", "sample from the K most likely tokens; 0: all", type=int, metavar="K")
    flags.add("--top-p", "sample from the most likely tokens whose probabilities sum to P",
              type=float, metavar="P")  # fmt: skip
    flags.add("--min-p", "sample from tokens at least P times as likely as the most likely one",
              type=float, metavar="P")  # fmt: skip
    flags.add("--seed", "random seed of sampling", type=int)


def sampling(values: Mapping[str, Any], problems: list[errors.UserError]) -> config.Sampling:
    """The settings of sampling. problems: what is wrong with them is added."""
    found, names = config.Sampling(), {field.name for field in dataclasses.fields(config.Sampling)}
    with errors.noted(problems):
        given = {name: values[name] for name in names & values.keys() if values[name] is not None}
        found = config.Sampling(**given | {"stop": tuple(given.get("stop", ()))})
    without = [name for name in _FILTERS
               if name in values and values[name] != getattr(config.Sampling(), name)]  # fmt: skip
    if without and not values.get("temperature"):
        problems.append(
            errors.UserError(
                expected="flags that have an effect",
                found=[f"{convert.flag(name)} at temperature 0" for name in without],
                do="--temperature 1 to sample",
            )
        )
    return found


def base(typed: arguments.Given, problems: list[errors.UserError]) -> groups.ModelSettings:
    """The settings of the base model. problems: what is wrong with them is added."""
    own = {field.name for field in dataclasses.fields(groups.ModelSettings)}
    found = groups.ModelSettings(**{name: typed[name] for name in own & typed.keys()})
    problems += checks.quant_fast(found)
    return found
