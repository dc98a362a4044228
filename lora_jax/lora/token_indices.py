"""The tokens whose embeddings are trained one by one: PEFT's trainable_token_indices.

Imports no jax.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lora_jax import errors
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config
from lora_jax.lora import targets

_DELTA = "token_adapter.trainable_tokens_delta"
DEFAULT = "embed_tokens"  # the module that a list without a name is for
Ids = tuple[int | str, ...]  # texts only in the settings of a run, until it has its tokenizer


def named(config: lora_config.LoRAConfig, default: str = DEFAULT) -> dict[str, Ids]:
    """{end of a module's path: the ids of its tokens, in the order of the rows in the file}."""
    given = config.trainable_token_indices or {}
    return dict(given) if isinstance(given, Mapping) else {default: given}


def of(path: str, config: lora_config.LoRAConfig) -> Ids:
    """The ids of the tokens that are trained in the module at `path`; () for none."""
    return next((ids for end, ids in named(config).items() if path.endswith(end)), ())


def texts(config: lora_config.LoRAConfig) -> list[str]:
    """The tokens that are given by their text."""
    each = (token for ids in named(config).values() for token in ids)
    return [token for token in each if isinstance(token, str)]


def with_ids(config: lora_config.LoRAConfig, ids: Mapping[str, int]) -> lora_config.LoRAConfig:
    """The config with ids in place of the texts of tokens. ids: {text: id}."""
    given = {end: tuple(ids[token] if isinstance(token, str) else token for token in tokens)
             for end, tokens in named(config).items()}  # fmt: skip
    by_name = isinstance(config.trainable_token_indices, Mapping)
    new = given if by_name else given.get(DEFAULT)
    return dataclasses.replace(config, trainable_token_indices=new)


def with_any_ids(config: lora_config.LoRAConfig) -> lora_config.LoRAConfig:
    """The config with other ids in place of the texts of tokens, for what depends on no id."""
    taken = {token for ids in named(config).values() for token in ids}
    free = (number for number in itertools.count() if number not in taken)
    return with_ids(config, dict(zip(texts(config), free, strict=False)))


def tensor(path: str) -> str:
    """The name of the rows [tokens, D] in PEFT's file. Not differences: the rows themselves."""
    return f"{path}.{_DELTA}"


def has_rows(name: str, config: lora_config.LoRAConfig) -> bool:
    """Whether a tensor of PEFT's file has the rows of tokens that `config` names."""
    path = name.removesuffix(f".{_DELTA}")
    return path != name and bool(of(path, config))


def as_factors(
    adapter: lora_adapter.Adapter,
    base: Mapping[str, Callable[[np.ndarray], Any]],
    num_tokens: int,
    where: str,
) -> lora_adapter.Adapter:
    """The same adapter, but for rounding, with A and B in place of rows: one picks the tokens.

    base: by path, ids → their rows in the base. The first is the embedding, the others are heads.
    Not for DoRA. Raises: UserError if the rows do not fit the base.
    """
    factors, saved, config = dict(adapter.factors), dict(adapter.saved), adapter.config
    ranks: dict[str, int] = {}
    for number, (path, rows_of) in enumerate(base.items()):
        if not (ids := of(path, config)):
            continue
        new, old = saved.pop(tensor(path), None), np.float32(rows_of(np.array(ids)))
        if new is None or new.shape != old.shape or max(ids) >= num_tokens:
            raise errors.UserError(
                expected=f"{tensor(path)} {old.shape}, for tokens of the base's {num_tokens}",
                found=f"{'none' if new is None else new.shape}, for the tokens {ids}",
                where=where,
            )
        pick, change = np.zeros((num_tokens, len(ids)), np.float32), np.float32(new) - old
        pick[ids, range(len(ids))] = 1
        own = lora_adapter.Factors(pick, change, None, "embedding")
        factors[path] = lora_adapter.Factors(change.T, pick.T) if number else own
        ranks[re.escape(path)] = len(ids)
    alphas = {path: math.sqrt(n) if config.use_rslora else n for path, n in ranks.items()}
    config = dataclasses.replace(
        config,
        targets=tuple(factors),
        exclude=(),
        layers=None,
        trainable_token_indices=None,
        rank_pattern=ranks | config.rank_pattern,
        alpha_pattern=alphas | config.alpha_pattern,
    )
    return dataclasses.replace(adapter, config=config, factors=factors, saved=saved)


def check(layers: Mapping[str, str], config: lora_config.LoRAConfig, where: str) -> None:
    """Raises: UserError if layers with trained tokens are trained in another way, too.

    layers: {path: kind, see targets.Layer} of a layer, or of several that share their weight.
    """
    linear_only = config.targets == targets.ALL_LINEAR
    problems = [f"{path} in targets" for path, kind in layers.items()
                if targets.is_chosen(path, config)
                and not (linear_only and kind != "linear")]  # fmt: skip
    problems += [f"{path} in modules_to_save" for path in layers if targets.saves(path, config)]
    if problems:
        raise errors.UserError(
            expected=f"trainable_token_indices as all that is trained of {' and '.join(layers)}",
            found=problems,
            where=where,
            do="leave one of them out; modules_to_save trains the rows of all tokens",
        )
