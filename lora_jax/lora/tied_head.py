"""An embedding and a head that share a weight: what is trained of each, by PEFT's rules.

In PEFT a head that is trained gets a weight of its own, and one that is not trained keeps the
original values. With ensure_weight_tying the head computes with what is trained of the embedding;
with trainable_token_indices it does so anyway, unless other tokens of the head are trained.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax import errors
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config
from lora_jax.lora import outer_names, targets, token_indices
from lora_jax.models import config as model_config

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_KINDS = {EMBEDDING: "embedding", HEAD: "linear"}
NAMES = tuple(path.split(".")[-1] for path in (EMBEDDING, HEAD))


class Plan(NamedTuple):
    """How a config adapts a model with a tied head.

    config: for the modules that the model then has. own_head: the head gets a weight of its own.
    joined: the head computes with what is trained of the embedding.
    """

    config: lora_config.LoRAConfig
    own_head: bool = False
    joined: bool = False


def plan(config: lora_config.LoRAConfig) -> Plan:
    """The plan for a model with a tied head. Raises: UserError as token_indices.check."""
    of_embedding, of_head = (token_indices.of(path, config) for path in (EMBEDDING, HEAD))
    if of_embedding or of_head:
        token_indices.check(_KINDS, config, "the LoRA settings, for a head that is tied")
    if of_embedding and of_head in ((), of_embedding):
        named = token_indices.named(config).items()
        left = {end: ids for end, ids in named if not HEAD.endswith(end)}
        return Plan(dataclasses.replace(config, trainable_token_indices=left), joined=True)
    if of_embedding or of_head:
        return Plan(config, own_head=True)
    if not config.ensure_weight_tying:
        return Plan(config, own_head=trains_head(config, tied=False))
    if any(end.split(".")[-1] in NAMES for end in config.modules_to_save):
        left = (end for end in config.modules_to_save
                if end != EMBEDDING and not _saves_head(end))  # fmt: skip
        config = dataclasses.replace(config, modules_to_save=(*left, EMBEDDING))
        return Plan(config, joined=True)
    if isinstance(config.targets, str):
        if not any(re.fullmatch(config.targets, name) for name in NAMES):
            return Plan(config)
        regex = rf"(?:{config.targets}|{re.escape(EMBEDDING)})"
        return Plan(dataclasses.replace(config, targets=regex), joined=True)
    if not any(target.split(".")[-1] in NAMES for target in config.targets):
        return Plan(config)
    left = (target for target in config.targets if not targets.matches(HEAD, (target,)))
    return Plan(dataclasses.replace(config, targets=(*left, EMBEDDING)), joined=True)


def plan_to_train(config: lora_config.LoRAConfig) -> Plan:
    """The same for new adapters.

    Raises: UserError if the changes of the embedding and of the head could not be the same.
    """
    found = plan(config)
    problems = []
    if config.ensure_weight_tying and found.own_head:
        problems.append("other trainable_token_indices for the head than for the embedding")
    by_token = token_indices.of(EMBEDDING, config)
    if found.joined and not by_token and targets.is_chosen(EMBEDDING, found.config):
        if config.use_dora:
            problems.append("use_dora, which has a magnitude for the embedding's columns and "
                            "another for the head's")  # fmt: skip
        if _alike(config, EMBEDDING) != _alike(config, HEAD):
            problems.append(f"another rank or alpha for {EMBEDDING} than for {HEAD}")
    if problems:
        raise errors.UserError(
            expected="one change for the embedding and its tied head (ensure_weight_tying)",
            found=problems,
            do="leave ensure_weight_tying out, or train the embedding with modules_to_save",
        )
    return found


def trains_head(config: lora_config.LoRAConfig, *, tied: bool) -> bool:
    """Whether the logits depend on an adapter of the head."""
    own = targets.saves(HEAD, config) or targets.is_chosen(HEAD, config)
    own = own or bool(token_indices.of(HEAD, config))
    return own or (tied and plan(config).joined)


class Fitted(NamedTuple):
    """An adapter for the modules that a LLaMA then has.

    base: {EMBEDDING or HEAD: base weight [V, D]} that the adapter brings along. num_tokens: the
    size V of the vocabulary. plan: of a model with a tied head.
    """

    adapter: lora_adapter.Adapter
    base: Mapping[str, np.ndarray]
    num_tokens: int
    plan: Plan


def fitted(
    adapter: lora_adapter.Adapter, shape: tuple[int, int], *, tied: bool, where: str
) -> Fitted:
    """The adapter as it fits a LLaMA with an embedding of that shape [V, D].

    PEFT also saves embeddings that are not trained, if they are targeted or have another size than
    the base's. Raises: UserError if the two tied weights differ, for another size of the
    vocabulary without the weights for it, and as token_indices.check.
    """
    saved, factors = dict(adapter.saved), dict(adapter.factors)
    for path, kind in _KINDS.items():
        if token_indices.of(path, adapter.config):
            token_indices.check({path: kind}, adapter.config, where)
    found = plan(adapter.config) if tied else Plan(adapter.config)
    if found.joined:
        found = _join(found, adapter.config, factors, saved, where)
    base = {path: array for path in (EMBEDDING, HEAD)
            if (array := _take_base(path, found.config, saved)) is not None}  # fmt: skip
    wrong = [f"{path}.weight has shape {array.shape}, expected (…, {shape[1]})"
             for path, array in base.items() if array.shape[1:] != shape[1:]]  # fmt: skip
    if wrong:
        raise errors.UserError(
            expected="an adapter for this base model", found=wrong, where=where,
            do=f"load it on the model that it was trained on: {adapter.base_model or 'unknown'}",
        )  # fmt: skip
    if tied and base:  # one weight in PEFT's model, whichever of its names is in the file
        base = dict.fromkeys((EMBEDDING, HEAD), _only(base.values(), "base weights", where))
    changed = dataclasses.replace(adapter, config=found.config, factors=factors, saved=saved)
    num_tokens = _num_tokens(changed, base, shape[0], found.joined, where)
    return Fitted(changed, base, num_tokens, found)


def num_tokens(adapter: lora_adapter.Adapter, base: model_config.LlamaConfig, where: str) -> int:
    """The size of the vocabulary of that base with the adapter. Raises: as `fitted`."""
    shape = base.vocab_size, base.hidden_size
    adapter = outer_names.inner(adapter, base)
    return fitted(adapter, shape, tied=base.tie_word_embeddings, where=where).num_tokens


def _join(found, config, factors, saved, where) -> Plan:
    """Takes the head's part, which is the embedding's as well, out of factors and saved."""
    by_token = token_indices.of(EMBEDDING, found.config)
    if by_token or targets.saves(EMBEDDING, found.config):
        form = token_indices.tensor if by_token else "{}.weight".format
        names = [form(path) for path in (EMBEDDING, HEAD)]
        if given := [saved.pop(name) for name in names if name in saved]:
            saved[names[0]] = _only(given, "trained weights", where)
        return found
    head, embedding = factors.get(HEAD), factors.get(EMBEDDING)
    if head is None or embedding is None or _same(head, embedding, config):
        factors.pop(HEAD, None)
        return found
    # With DoRA, or with a rank or alpha of its own, the head is not the embedding's transpose. Its
    # rank is the embedding's, and its scaling is that of its own settings.
    if isinstance(config.targets, str):
        both = "|".join((config.targets, re.escape(EMBEDDING), re.escape(HEAD)))
    else:
        both = (*config.targets, EMBEDDING, HEAD)
    config = dataclasses.replace(config, targets=both)
    rank, scaling = _alike(config, HEAD)
    if head.A is not None and head.A.shape[1] != rank:
        rank = head.A.shape[1]
        alpha = scaling * (math.sqrt(rank) if config.use_rslora else rank)
        config = dataclasses.replace(
            config,
            rank_pattern={HEAD: rank} | _without_head(config.rank_pattern),
            alpha_pattern={HEAD: alpha} | _without_head(config.alpha_pattern),
        )
    return Plan(config, own_head=True)


def _without_head(pattern: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in pattern.items() if key != HEAD}


def _same(head: lora_adapter.Factors, embedding: lora_adapter.Factors, config) -> bool:
    parts = (head.A, head.B, embedding.A, embedding.B)
    if head.magnitude is not None or any(part is None for part in parts):
        return False
    equal = np.array_equal(head.A, embedding.B.T) and np.array_equal(head.B, embedding.A.T)
    return equal and _alike(config, EMBEDDING) == _alike(config, HEAD)


def _alike(config: lora_config.LoRAConfig, path: str) -> tuple[int, float]:
    own = targets.layer_config(path, 1, dataclasses.replace(config, parts={}))
    return own.rank, own.scaling


def separate(
    factors: dict[str, lora_adapter.Factors],
    saved: dict[str, np.ndarray],
    config: lora_config.LoRAConfig,
) -> None:
    """Adds the head's part to the embedding's, as PEFT saves them: the inverse of `fitted`."""
    if own := factors.get(EMBEDDING):
        factors[HEAD] = lora_adapter.Factors(own.B.T, own.A.T)
        if targets.saves_base(EMBEDDING, config):
            saved[f"{HEAD}.base_layer.weight"] = saved[f"{EMBEDDING}.base_layer.weight"]
    elif f"{EMBEDDING}.weight" in saved:
        saved[f"{HEAD}.weight"] = saved[f"{EMBEDDING}.weight"]


def _take_base(path: str, config: lora_config.LoRAConfig, saved: dict) -> np.ndarray | None:
    """The base weight in the file, which it takes out of `saved`."""
    array = saved.pop(f"{path}.base_layer.weight", None)
    if array is None and not targets.saves(path, config):
        array = saved.pop(f"{path}.weight", None)
    return array


def _only(arrays: Iterable[np.ndarray], what: str, where: str) -> np.ndarray:
    """One of the arrays. Raises: UserError unless they are equal."""
    first, *others = arrays
    if any(not np.array_equal(first, other) for other in others):
        raise errors.UserError(
            expected=f"the same {what} for embed_tokens and lm_head, which the base ties",
            found="two that differ",
            where=where,
            do="pass the base that the adapter was trained on, with --model: its head is not tied",
        )
    return first


def _num_tokens(
    adapter: lora_adapter.Adapter,
    base: Mapping[str, np.ndarray],
    num_tokens: int,
    joined: bool,
    where: str,
) -> int:
    """The size of the vocabulary with the adapter. num_tokens: the base's."""
    weights = base | {path: adapter.saved[name] for path in (EMBEDDING, HEAD)
                      if (name := f"{path}.weight") in adapter.saved}  # fmt: skip
    sizes = {path: len(array) for path, array in weights.items() if array.ndim}
    complete = {*weights}  # of which all rows are known
    for path in (EMBEDDING, HEAD):
        ids = token_indices.of(path, adapter.config)
        if path not in weights and (new := [id_ for id_ in ids if id_ >= num_tokens]):
            sizes[path] = max(new) + 1
            complete |= {path} if len(new) == sizes[path] - num_tokens else set()
    for path, part, axis in ((EMBEDDING, "A", 0), (HEAD, "B", 1)):
        array = getattr(adapter.factors.get(path), part, None)
        if array is not None:
            sizes.setdefault(path, array.shape[axis])
    if set(sizes.values()) <= {num_tokens}:
        return num_tokens
    missing = {EMBEDDING} | ({HEAD} if not joined else set())
    missing -= complete
    if len(set(sizes.values())) > 1 or missing:
        lacks = f", and no weight of {' or '.join(sorted(missing))}" if missing else ""
        raise errors.UserError(
            expected=f"an adapter for the {num_tokens} tokens of the base, or one that brings an "
            "embedding and a head of another size",
            found=[f"{path}.weight has {size} rows in the adapter, {num_tokens} in the base{lacks}"
                   for path, size in sizes.items() if size != num_tokens],
            where=where,
            do="save it with PEFT's save_pretrained(…, save_embedding_layers=True), or give the "
            "base as many rows first: resize_token_embeddings and save_pretrained of transformers",
        )  # fmt: skip
    return next(iter(sizes.values()))


def _saves_head(end: str) -> bool:
    return re.match(rf"(^|.*\.){end}($|\..*)", HEAD) is not None
