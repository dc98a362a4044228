"""Which layers a LoRAConfig adapts, with what rank and scaling: PEFT's rules on dotted paths."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax import errors
from lora_jax.lora import config as lora_config


class Layer(NamedTuple):
    """What target selection and adapter checks need to know of a layer of a model.

    kind: "linear", "embedding" or "conv", see adapter.Factors; "parameter" for one that a module of
    another class holds itself; "" for a module that is no layer or cannot be adapted. in_features,
    out_features: K and N. problem: why the layer cannot be adapted, in words that continue its
    path; "" if it can.
    """

    kind: str
    in_features: int = 0
    out_features: int = 0
    problem: str = ""


class LayerConfig(NamedTuple):
    """A LoRAConfig resolved for one layer: the rank R of A and B, and the scaling of A B.

    kept: the columns [start, stop) of the layer's output that are adapted, None for all. Each range
    has its own rank, and R is their sum.
    """

    rank: int
    scaling: float
    kept: tuple[tuple[int, int], ...] | None = None


def select(
    layers: Mapping[str, Layer], config: lora_config.LoRAConfig, *, strict: bool = True
) -> dict[str, LayerConfig]:
    """{path: its LayerConfig} of the layers that `config` targets, among `layers` by path.

    strict: a setting that matches nothing is an error. Files of other programs have such settings.
    Raises: UserError that lists every setting that matches nothing, with the names that exist, and
    every targeted module that cannot be adapted.
    """
    kinds = ("linear",) if config.targets == ALL_LINEAR else ("linear", "embedding", "conv", "")
    taken = [path for path, layer in layers.items() if layer.kind in kinds]
    chosen = [path for path in taken if is_chosen(path, config)]
    unmatched = list(_unmatched(taken, layers, config)) if strict else []
    refused = [f"{path} {layers[path].problem}" for path in chosen if layers[path].problem]
    refused += [f"{path} is an embedding, whose B has no bias (lora_bias)" for path in chosen
                if config.lora_bias and layers[path].kind == "embedding"]  # fmt: skip
    if strict and config.targets != ALL_LINEAR:
        refused += [f"{path} is not a layer itself" for path in _around(layers, chosen, config)]
    if unmatched or refused:
        do = "choose among these, or "
        if config.targets == ALL_LINEAR:
            do += "register the class of your linear layers with the einsum it computes"
        else:
            do += f'use "{ALL_LINEAR}"'
        more = "; exclude what cannot be adapted, or register its class with the einsum it computes"
        names = _names(layers)
        if not names:
            refused = [f"{path} {layer.problem}" for path, layer in layers.items() if layer.problem]
        # Layers that differ only in their number are listed once.
        alike = dict.fromkeys(re.sub(r"\.\d+\b", ".N", line) for line in refused)
        raise errors.UserError(
            expected="settings that name layers of the model that can be adapted",
            found=[*unmatched, *(refused if len(alike) == len(refused) else alike)],
            where="names that exist: " + (", ".join(names) or "none"),
            do=do + (more if refused else ""),
        )
    return {path: layer_config(path, layers[path].out_features, config) for path in chosen}


def _names(layers: Mapping[str, Layer]) -> list[str]:
    """The last parts of the paths that may be targets, with kind and shape, the likeliest first.

    Those are linear layers, then the ones that are there most often.
    """
    found: dict[str, list[Layer]] = {}
    for path, layer in layers.items():
        if layer.kind and not layer.problem:
            name = re.sub(r"(\.\d+)+$", "", path).split(".")[-1]
            found.setdefault(name, []).append(layer)
    if any(own[0].kind == "linear" for own in found.values()):
        found = {name: own for name, own in found.items() if own[0].kind != "parameter"}
    order = sorted(found, key=lambda n: (found[n][0].kind != "linear", -len(found[n]), n))
    return [f"{name} ({own[0].kind} {own[0].in_features} → {own[0].out_features})"
            for name in order for own in [found[name]]]  # fmt: skip


ALL_LINEAR = "all-linear"


def is_chosen(path: str, config: lora_config.LoRAConfig) -> bool:
    """Whether `config` targets the layer at `path`."""
    if matches(path, config.exclude) or saves(path, config):
        return False
    if not matches(path, config.targets):
        return False
    if config.layers is None:
        return True
    if not isinstance(config.targets, str) and path in config.targets:
        return True  # PEFT takes a whole path in any layer
    return layer_number(path, config.layers_pattern) in config.layers


def matches(path: str, targets: Sequence[str] | str) -> bool:
    """Whether `path` matches one of `targets` by PEFT's rules: see LoRAConfig."""
    if targets == ALL_LINEAR:
        return path.split(".")[-1] != "lm_head"
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    layer = re.sub(r"(\.\d+)+$", "", path)  # the path of a stack of layers
    return any(
        name == target or name.endswith("." + target)
        for target in targets
        for name in (path, layer)
    )


def saves(path: str, config: lora_config.LoRAConfig) -> bool:
    """Whether the module at `path`, or one that contains it, is in config.modules_to_save."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save)


def scaling(path: str, rank: int, config: lora_config.LoRAConfig) -> float:
    """alpha / rank of the layer at `path`, or alpha / √rank with rsLoRA."""
    alpha = of_pattern(path, config.alpha_pattern, config.alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def with_ranks(config: lora_config.LoRAConfig, ranks: Mapping[str, int]) -> lora_config.LoRAConfig:
    """A config of plain LoRA in which each path has its rank in `ranks` and the same scaling."""
    plain = dataclasses.replace(config, parts={}, init_lora_weights="default")
    if all(rank == _rank(path, config) for path, rank in ranks.items()):
        return plain
    settings = {}
    for path, rank in ranks.items():
        root = math.sqrt(rank) if config.use_rslora else rank
        settings[path] = rank, _whole(scaling(path, _rank(path, config), config) * root)
    (rank, alpha), _ = collections.Counter(settings.values()).most_common(1)[0]
    others = {re.escape(path): own for path, own in settings.items() if own != (rank, alpha)}
    return dataclasses.replace(
        plain,
        rank=rank,
        alpha=alpha,
        rank_pattern={path: own[0] for path, own in others.items()},
        alpha_pattern={path: own[1] for path, own in others.items()},
    )


def _whole(number: float) -> float:
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12) else number


def saves_base(path: str, config: lora_config.LoRAConfig) -> bool:
    """Whether PEFT saves the base weight of the adapted layer at `path` with the adapter.

    It does so for an embedding or a head that is targeted by name.
    """
    names = ("embed_tokens", "lm_head")
    if path.split(".")[-1] not in names:
        return False
    if isinstance(config.targets, str):
        return config.targets != ALL_LINEAR and re.fullmatch(config.targets, path) is not None
    return any(name in config.targets for name in names)


def _rank(path: str, config: lora_config.LoRAConfig) -> int:
    return of_pattern(path, config.rank_pattern, config.rank)


def layer_config(path: str, out_features: int, config: lora_config.LoRAConfig) -> LayerConfig:
    """`config` resolved for the layer at `path`. Raises: UserError if `parts` do not fit it."""
    rank = _rank(path, config)
    parts = of_pattern(path, config.parts, None)
    if parts is None:
        return LayerConfig(rank, scaling(path, rank, config))
    unit, rest = divmod(out_features, sum(map(abs, parts)))
    if rest or not any(part > 0 for part in parts):
        raise errors.UserError(
            expected=f"parts that divide the {out_features} outputs, at least one of them adapted",
            found=f"parts {parts}",
            where=path,
            do="such as (1, -1, 1) for q and v of a layer that makes q, k and v",
        )
    ends = [unit * sum(map(abs, parts[:i])) for i in range(len(parts) + 1)]
    kept = tuple((ends[i], ends[i + 1]) for i, part in enumerate(parts) if part > 0)
    return LayerConfig(rank * len(kept), scaling(path, rank, config), kept)


def _unmatched(paths: list[str], modules: Iterable[str], config: lora_config.LoRAConfig):
    """The settings that match nothing; what is excluded may be any module."""

    def each(names):
        return [names] if isinstance(names, str) else [(name,) for name in names]

    for target in each(config.targets):
        if not any(is_chosen(p, config) and matches(p, target) for p in paths):
            yield f"target {_shown(target)} matches nothing"
    for name in each(config.exclude):
        if not any(matches(path, name) for path in modules):
            yield f"exclude {_shown(name)} matches nothing"
    present = {layer_number(path, config.layers_pattern) for path in paths}
    for layer in config.layers or ():
        if layer not in present:
            yield f"layer {layer} does not exist"
    for pattern in {**config.rank_pattern, **config.alpha_pattern, **config.parts}:
        if not any(_is_pattern_of(pattern, path) for path in paths):
            yield f"pattern {pattern!r} matches nothing"


def _around(layers: Iterable[str], chosen: Iterable[str], config: lora_config.LoRAConfig):
    """The targeted modules that are not layers and contain no chosen layer."""
    idle = _outer(layers) - _outer(chosen) - set(layers)
    return (path for path in sorted(idle) if is_chosen(path, config))


def _outer(paths: Iterable[str]) -> set[str]:
    """The paths of the modules that contain these."""
    split = [path.split(".") for path in paths]
    return {".".join(parts[:n]) for parts in split for n in range(1, len(parts))}


def layer_number(path: str, layers_pattern: Sequence[str] | str | None) -> int | None:
    """The first number in the path; with a pattern, the number right after it."""
    if not layers_pattern:
        return next((int(part) for part in path.split(".") if part.isdigit()), None)
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path) for pattern in patterns)
    return next((int(match[1]) for match in found if match), None)


def of_pattern(path: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """The value of the first pattern that matches the end of the path."""
    return next((v for pattern, v in patterns.items() if _is_pattern_of(pattern, path)), default)


def _is_pattern_of(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _shown(target: str | Sequence[str]) -> str:
    return repr(target) if isinstance(target, str) else ", ".join(map(repr, target))
