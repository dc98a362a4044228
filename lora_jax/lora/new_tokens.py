"""New tokens, which the base gets rows for: how they are trained. Imports no jax."""

import dataclasses
from collections.abc import Sequence

from lora_jax import errors
from lora_jax.lora import config as lora_config
from lora_jax.lora import targets, tied_head, token_indices

_PATHS = tied_head.EMBEDDING, tied_head.HEAD


def trained(
    config: lora_config.LoRAConfig, ids: Sequence[int | str], *, tied: bool
) -> lora_config.LoRAConfig:
    """The config with the tokens in trainable_token_indices of the embedding and of the head.

    What of them is trained in another way, as a target or in modules_to_save, stays so. tied: the
    head computes with the rows of the embedding, unless the config has other tokens for it.
    Raises: UserError if new tokens would have trained rows in one part of a tied weight only.
    """
    linear_only = config.targets == targets.ALL_LINEAR  # neither the embedding nor the head
    otherwise = {path for path in _PATHS
                 if targets.saves(path, config)
                 or (targets.is_chosen(path, config) and not linear_only)}  # fmt: skip
    if tied and otherwise:
        if len(otherwise) == 1 and not config.ensure_weight_tying:
            raise errors.UserError(
                expected="new tokens that are trained in the embedding and in the head, which are "
                "one weight in this model",
                found=f"{' '.join(otherwise)} alone in --targets or --modules-to-save",
                do="--ensure-weight-tying trains them as one; or name embed_tokens and lm_head",
            )
        return config
    named = token_indices.named(config)
    paths = [path for path in _PATHS if path not in otherwise]
    if tied and not token_indices.of(tied_head.HEAD, config):
        paths = [tied_head.EMBEDDING]
    for path in paths:
        last = path.rpartition(".")[2]
        end = next((end for end in named if path.endswith(end)), last)
        own = named.get(end, ())
        named[end] = (*own, *(token for token in ids if token not in own))
    alone = [*named] == [token_indices.DEFAULT]
    new = named[token_indices.DEFAULT] if alone else named
    return dataclasses.replace(config, trainable_token_indices=new)
