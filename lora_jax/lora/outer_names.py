"""Adapters of the language model in a composite model: with PEFT's names there, and with a LLaMA's.

PEFT names the layers of the whole model, such as `model.language_model.layers.0.mlp.up_proj`, and
matches settings with these names. In memory the names are a LLaMA's: `model.layers.0.mlp.up_proj`.
Imports no jax.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lora_jax import errors
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config
from lora_jax.lora import targets
from lora_jax.models import composite, names
from lora_jax.models import config as model_config

# The ends of names that nothing beside a language model has.
_OWN = ("lm_head", "embed_tokens", "input_layernorm", "post_attention_layernorm",
        "pre_feedforward_layernorm", "post_feedforward_layernorm")  # fmt: skip


def inner(adapter: lora_adapter.Adapter, base: model_config.LlamaConfig) -> lora_adapter.Adapter:
    """The adapter with the names of a LLaMA, without what is beside the language model.

    One with these names already, such as one of the language model alone, does not change.
    """
    paths = [*adapter.factors, *adapter.saved]
    around = base.composite
    if all(names.inner(path, around) == path for path in paths) and not beside(adapter, base):
        return adapter

    def own(arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {names.inner(path, around): array for path, array in arrays.items()
                if not names.is_beside(path, around)}  # fmt: skip

    old = names.are_old(paths, around)
    named = {names.outer(path, around, old=old): path for path in _modules(base)}
    given = adapter.config
    others = [path for path in paths if names.is_beside(path, around)]
    config = dataclasses.replace(
        given,
        exclude=_without_beside(given.exclude, around),
        modules_to_save=tuple(name for name in given.modules_to_save
                              if any(_saves(path, name) for path in named)
                              or not any(_saves(path, name) for path in others)),
    )  # fmt: skip
    config = _renamed(config, named)
    # PEFT has a name for each layer of a stack, all of which are saved here, or none.
    saved = (re.sub(r"^model\.layers\.\d+\.", "", name) for name in config.modules_to_save)
    config = dataclasses.replace(config, modules_to_save=tuple(dict.fromkeys(saved)))
    return dataclasses.replace(
        adapter, config=config, factors=own(adapter.factors), saved=own(adapter.saved)
    )


def inner_config(
    config: lora_config.LoRAConfig, base: model_config.LlamaConfig
) -> lora_config.LoRAConfig:
    """The settings with the names of a LLaMA.

    They may have the names of the whole model, as transformers has them or had them before 4.52, or
    those of a LLaMA: the first with which all of them match, else the first that choose layers.
    What matches nothing stays, and so has the names of a LLaMA; an exclude of what lies beside the
    language model is left out, as nothing there is adapted.
    """
    around = base.composite
    if not around:
        return config
    own = _modules(base)
    forms = [{names.outer(path, around, old=old): path for path in own} for old in (False, True)]
    forms.append({path: path for path in own})
    given = config.exclude
    if not isinstance(given, str):
        given = tuple(name for name in given if not names.is_beside(name, around))
    elif not any(targets.matches(path, given) for named in forms for path in named):
        given = () if any(targets.matches(path, given) for path in _like_beside(around)) else given
    config = dataclasses.replace(config, exclude=given)
    choosing = [named for named in forms
                if any(targets.is_chosen(path, config) for path in named)]  # fmt: skip
    named = next((each for each in choosing if _match_all(config, each)), (choosing or forms)[0])
    found = _renamed(config, named)
    exclude = found.exclude or given
    all_chosen = dataclasses.replace(found, exclude=())
    if base.tie_word_embeddings and not isinstance(exclude, str):
        # A pattern for all but language_model matches the head, which is no layer if it is tied.
        exclude = tuple(name for name in exclude
                        if name != "lm_head" or targets.is_chosen(name, all_chosen))  # fmt: skip
    return dataclasses.replace(found, exclude=exclude)


def _match_all(config: lora_config.LoRAConfig, paths: Iterable[str]) -> bool:
    """Whether each of the settings that leave out layers or are for some only matches one."""
    given = config.exclude
    excluded = [given] if isinstance(given, str) else [(name,) for name in given]
    patterns = [*config.rank_pattern, *config.alpha_pattern, *config.parts]
    return all(any(targets.matches(path, each) for path in paths) for each in excluded) and all(
        any(targets.of_pattern(path, {each: True}, False) for path in paths) for each in patterns
    )


def outer(adapter: lora_adapter.Adapter, base: model_config.LlamaConfig) -> lora_adapter.Adapter:
    """The inverse of `inner`, for PEFT on the whole model: it adapts nothing else there."""
    around = base.composite
    if not around:
        return adapter
    named = {path: names.outer(path, around) for path in _modules(base)}
    config = _renamed(adapter.config, named, may_stay=lambda name: name.endswith(_OWN))
    factors, saved = ({names.outer(path, around): array for path, array in arrays.items()}
                      for arrays in (adapter.factors, adapter.saved))  # fmt: skip
    if isinstance(config.targets, str) or not {*config.targets} <= {*named.values()}:
        exclude = _with_beside(config.exclude, around)
        config = dataclasses.replace(config, exclude=exclude)
    return dataclasses.replace(adapter, config=config, factors=factors, saved=saved)


def beside(adapter: lora_adapter.Adapter, base: model_config.LlamaConfig) -> list[str]:
    """What the adapter adapts beside the language model, such as a vision tower."""
    return names.beside([*adapter.factors, *adapter.saved], base.composite)


def note(adapter: lora_adapter.Adapter, base: model_config.LlamaConfig) -> str:
    """What a user should know of an adapter whose text is generated; "" for most."""
    found = ", ".join(beside(adapter, base))
    return f"the adapter's part for {found} is not used, as text does not need it" if found else ""


def refuse_beside(adapter: lora_adapter.Adapter, base: model_config.LlamaConfig) -> None:
    """Raises: UserError if the adapter adapts more than the language model."""
    if found := beside(adapter, base):
        raise errors.UserError(
            expected=f"an adapter of the language model of the {base.composite} alone, to merge",
            found=f"one that also adapts {', '.join(found)}",
            do="use PEFT's merge_and_unload for it, or use the adapter unmerged: generate, chat "
            "and serve take it",
        )


# ---------------------------------------------------------------------------------- settings


def _renamed(
    config: lora_config.LoRAConfig,
    named: Mapping[str, str],
    may_stay: Callable[[str], bool] = lambda name: True,
) -> lora_config.LoRAConfig:
    """The config that means on the new names what `config` means on the old ones.

    named: {old name: new name} of each module. A setting that means the same on both stays as it
    is, and one that matches nothing, too; others become lists of names. may_stay: which names of
    modules that are trained in another way than by A and B may stay.
    """
    layers = {old: new for old, new in named.items() if not old.endswith("norm")}

    def as_names(given: Sequence[str] | str, chosen: Callable[[str], bool]) -> Any:
        if isinstance(given, str):
            found, alike = _matched(layers, lambda path: targets.matches(path, given))
            if alike or given == targets.ALL_LINEAR:
                return given
            return tuple(named[path] for path in found if chosen(path))
        return tuple(
            name
            for each in given
            for name in _each(each, layers, lambda path, n: targets.matches(path, (n,)), chosen)
        )

    pattern = config.layers_pattern
    if not _matched(layers, lambda path: targets.layer_number(path, pattern))[1]:
        pattern = None  # the number of a layer is the only one in its path

    def in_layers(path: str) -> bool:
        number = targets.layer_number(path, config.layers_pattern)
        whole = not isinstance(config.targets, str) and path in config.targets
        return config.layers is None or whole or number in config.layers

    saved = (
        name
        for each in config.modules_to_save
        for name in _each(each, named, _saves, may_stay=may_stay)
    )
    tokens = config.trainable_token_indices
    if isinstance(tokens, Mapping):
        tokens = {name: ids for end, ids in tokens.items()
                  for name in _each(end, named, str.endswith, may_stay=may_stay)}  # fmt: skip
    linear = layers
    if config.targets == targets.ALL_LINEAR:  # a pattern for what is not taken is an error
        linear = {old: new for old, new in layers.items() if not old.endswith(_OWN)}
    return dataclasses.replace(
        config,
        targets=as_names(config.targets, in_layers) or config.targets,
        exclude=as_names(config.exclude, lambda path: True),
        layers_pattern=pattern,
        rank_pattern=_patterns(config.rank_pattern, linear),
        alpha_pattern=_patterns(config.alpha_pattern, linear),
        parts=_patterns(config.parts, linear),
        modules_to_save=tuple(dict.fromkeys(saved)),
        trainable_token_indices=tokens,
    )


def _each(
    name: str,
    named: Mapping[str, str],
    is_match: Callable[[str, str], bool],
    chosen: Callable[[str], bool] = lambda path: True,
    may_stay: Callable[[str], bool] = lambda name: True,
) -> Iterable[str]:
    """The new names for a name in the settings; itself if it matches the same or nothing."""
    if name in named:
        return (named[name],) if chosen(name) else ()
    if name in named.values():
        return (name,)
    found, alike = _matched(named, lambda path: is_match(path, name))
    if not found or (alike and may_stay(name)):
        return (name,)
    return (named[path] for path in found if chosen(path))


def _patterns(patterns: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, Any]:
    def index(path: str) -> int | None:
        """Of the pattern that holds for it, the first one that matches."""
        return targets.of_pattern(path, {key: n + 1 for n, key in enumerate(patterns)}, None)

    found, alike = _matched(named, index)
    if alike:
        return dict(patterns)
    values = [*patterns.values()]
    idle = {key: value for key, value in patterns.items()
            if not any(targets.of_pattern(path, {key: True}, False) for path in named)}  # fmt: skip
    return {re.escape(named[path]): values[index(path) - 1] for path in found} | idle


def _matched(named: Mapping[str, str], value: Callable[[str], Any]) -> tuple[list[str], bool]:
    """(the old names with a value, whether each new name has the same)."""
    values = {old: value(old) for old in named}
    alike = all(values[old] == value(new) for old, new in named.items())
    return [old for old, own in values.items() if own], alike


def _saves(path: str, name: str) -> bool:
    """Whether that name in modules_to_save is of the module at `path`, or of one around it."""
    parts = path.split(".")
    return any(".".join(parts[: n + 1]).endswith(name) for n in range(len(parts)))


def _beside_regex(around: str) -> str:
    return rf"(model\.)?({'|'.join(composite.COMPOSITES[around].beside)})\..*"


def _like_beside(around: str) -> list[str]:
    """Names such as layers beside the language model have."""
    parts = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o", "out")]
    parts += ["attn.qkv", "attn.proj", "linear_1"]
    parts += [f"mlp.{name}" for name in ("fc1", "fc2", "linear_fc1", "up_proj")]
    layers = [f"{stack}.0.{name}" for stack in ("encoder.layers", "blocks") for name in parts]
    return [f"{prefix}{part}.{name}" for prefix in ("", "model.")
            for part in composite.COMPOSITES[around].beside
            for name in (*layers, "merger.mlp.0", "merger.linear_fc1")]  # fmt: skip


def _with_beside(exclude: Sequence[str] | str, around: str) -> str:
    if not isinstance(exclude, str):
        exclude = rf"(.*\.)?({'|'.join(map(re.escape, exclude))})" if exclude else ""
    return "|".join(filter(None, [exclude, _beside_regex(around)]))


def _without_beside(exclude: Sequence[str] | str, around: str) -> Sequence[str] | str:
    if not isinstance(exclude, str) or not exclude.endswith(_beside_regex(around)):
        return exclude
    return exclude.removesuffix(_beside_regex(around)).removesuffix("|") or ()


def _modules(base: model_config.LlamaConfig) -> list[str]:
    """The modules of a LLaMA that have weights."""
    qkv, gate_up = (("qkv",), ("gate_up",)) if base.fused_projections else ("qkv", ("gate", "up"))
    parts = [f"self_attn.{name}_proj" for name in (*qkv, "o")]
    parts += [f"mlp.{name}_proj" for name in (*gate_up, "down")]
    parts += [f"self_attn.{name}_norm" for name in ("qk" if base.qk_norm else "")]
    parts += ["post_attention_layernorm"]
    parts += ["input_layernorm"] if base.norms != "post" else []
    parts += ["pre_feedforward_layernorm"] if base.norms == "both" else []
    parts += ["post_feedforward_layernorm"] if base.norms != "pre" else []
    layers = [f"model.layers.{layer}.{part}"
              for layer in range(base.num_hidden_layers) for part in parts]  # fmt: skip
    return ["model.embed_tokens", *layers, "model.norm", "lm_head"]
