"""The embedding and the head in an adapter: what PEFT saves unasked, and what it keeps tied."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from lora_jax import errors
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config
from lora_jax.lora import targets

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def resolved(
    adapter: lora_adapter.Adapter, *, tied: bool, same: Callable[[str, np.ndarray], bool | None]
) -> lora_adapter.Adapter:
    """The adapter with a config that names all the modules that it changes in this base.

    PEFT writes an embedding or a head that the config does not name if it believes that the
    vocabulary was changed. It is left out if it equals the base's; else the config names it. With
    ensure_weight_tying and a tied base the head gets what the embedding has.

    tied: whether the base's head is its embedding. same: whether the base's module at a path has
    these values; None if there is no such module.
    Raises: UserError if a head that should be tied differs from the embedding.
    """
    config, saved = adapter.config, dict(adapter.saved)
    changed = []
    if tied and adapter.ensure_weight_tying:
        adapter = _with_tied_head(adapter)
        config, saved = adapter.config, dict(adapter.saved)
    for name, array in adapter.saved.items():
        path = name.removesuffix(".weight")
        unasked = lora_adapter.is_vocabulary(name) and path not in adapter.factors
        if not unasked or is_saved(path, config):
            continue
        equal = same(path, array)
        if equal:
            del saved[name]
        elif equal is not None:
            changed.append(path)
    if tied and changed:  # one tensor in PEFT: the value read last is that of both
        value = saved[f"{HEAD if HEAD in changed else EMBEDDING}.weight"]
        for path in (EMBEDDING, HEAD):
            if not is_saved(path, config) and path not in adapter.factors:
                saved[f"{path}.weight"] = value
                changed.append(path)
    config = _saving(config, changed)
    return dataclasses.replace(adapter, config=config, saved=saved)


def is_saved(path: str, config: lora_config.LoRAConfig) -> bool:
    """Whether the module at `path` is trained whole."""
    return any(path.endswith(end) for end in config.modules_to_save)


def changes_head(path: str, config: lora_config.LoRAConfig) -> bool:
    """Whether the head at `path` is adapted or trained whole."""
    return is_saved(path, config) or targets.is_chosen(path, config)


def stays_tied(adapter: lora_adapter.Adapter) -> bool:
    """Whether a resolved adapter changes a tied head just as it changes the embedding."""
    if EMBEDDING in adapter.factors and HEAD in adapter.factors:
        # DoRA norms the columns of each, which are not the same.
        return adapter.ensure_weight_tying and not adapter.config.use_dora
    embedding, head = (adapter.saved.get(f"{path}.weight") for path in (EMBEDDING, HEAD))
    return embedding is not None and head is not None and np.array_equal(embedding, head)


def _with_tied_head(adapter: lora_adapter.Adapter) -> lora_adapter.Adapter:
    """The adapter with a head that has what the embedding has."""
    config, embedding = adapter.config, adapter.factors.get(EMBEDDING)
    if is_saved(EMBEDDING, config) and f"{EMBEDDING}.weight" in adapter.saved:
        whole = adapter.saved[f"{EMBEDDING}.weight"]
        saved = {f"{HEAD}.weight": whole, **adapter.saved}
        _refuse_unequal({f"{HEAD}.weight": (saved[f"{HEAD}.weight"], whole)})
        return dataclasses.replace(adapter, config=_saving(config, [HEAD]), saved=saved)
    if embedding is None or embedding.A is None or embedding.B is None:
        return adapter
    turned = lora_adapter.Factors(embedding.B.T, embedding.A.T)
    head = adapter.factors.get(HEAD, turned)
    if head.A is not None and head.B is not None:
        _refuse_unequal(
            {f"{HEAD}.lora_A": (head.A, turned.A), f"{HEAD}.lora_B": (head.B, turned.B)}
        )
    rank = turned.A.shape[1]
    alpha = adapter.scaling(EMBEDDING) * (math.sqrt(rank) if config.use_rslora else rank)
    if not targets.is_chosen(HEAD, config):
        own = config.targets
        own = f"(?:{own})|{HEAD}" if isinstance(own, str) else (*own, HEAD)
        config = dataclasses.replace(
            config,
            targets=own,
            rank_pattern={HEAD: rank, **config.rank_pattern},
            alpha_pattern={HEAD: alpha, **config.alpha_pattern},
        )
    return dataclasses.replace(adapter, config=config, factors={**adapter.factors, HEAD: head})


def _saving(config: lora_config.LoRAConfig, paths: list[str]) -> lora_config.LoRAConfig:
    """The config that trains the modules at these paths, too, whole."""
    more = tuple(path for path in dict.fromkeys(paths) if not is_saved(path, config))
    return dataclasses.replace(config, modules_to_save=(*config.modules_to_save, *more))


def _refuse_unequal(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    unequal = [name for name, (one, other) in pairs.items() if not np.array_equal(one, other)]
    if unequal:
        raise errors.UserError(
            expected="a head with the embedding's values, because ensure_weight_tying is true",
            found=[f"{name} differs from the embedding's" for name in unequal],
            where="the adapter",
            do="set ensure_weight_tying to false in adapter_config.json to use both as they are",
        )
