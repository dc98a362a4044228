"""PEFT's adapter_config.json: which of its settings are read, and what is written."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax import errors
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config
from lora_jax.lora import targets as lora_targets

_DEFAULTS = {"r": 8, "lora_alpha": 8}  # what PEFT assumes for a key that is left out
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("use_rslora", "use_dora", "base_model_name_or_path", "bias", "init_lora_weights"),
    *("ensure_weight_tying", "trainable_token_indices", "lora_bias"),
}
# Keys whose value does not change what a trained adapter computes: how it was initialized, how its
# gradients were computed, where it ran.
_INERT = {
    *("task_type", "revision", "inference_mode", "peft_version", "auto_mapping"),
    *("fan_in_fan_out", "qalora_group_size", "megatron_core", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
}
_NUMBER = (int, float)
_TYPES = {  # of the settings that are read: the type of a value, and of its elements
    "r": (int, ()),
    "lora_alpha": (_NUMBER, ()),
    "lora_dropout": (_NUMBER, ()),
    "target_modules": ((str, list), str),
    "exclude_modules": ((str, list), str),
    "modules_to_save": (list, str),
    "layers_to_transform": ((int, list), int),
    "layers_pattern": ((str, list), str),
    "rank_pattern": (dict, int),
    "alpha_pattern": (dict, _NUMBER),
    "base_model_name_or_path": (str, ()),
    "revision": (str, ()),
}
_SWITCHES = ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying")
_EMPTY = (None, False, 0, "", [], {})
# These do not change the base, or PEFT takes their change out of the saved A and B.
_INITS = (None, True, False, "gaussian", "loftq", "orthogonal", "eva", "mica")
# These change the base, by an amount that depends on its weights alone. Without a conversion, A and
# B are saved as they are, and PEFT changes the base again when it loads them.
_CHANGING = ("pissa", "olora")


def parse(
    raw: Mapping[str, Any], where: str, paths: Sequence[str] | None = None
) -> lora_config.LoRAConfig:
    """The LoRAConfig in a parsed adapter_config.json.

    where: its file, for messages. paths: those of the adapted layers, if they are known; a config
    without target_modules targets them.
    Raises: UserError that names every key that changes the mathematics and is not implemented.
    """
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise errors.UserError(
            expected="a LoRA adapter (peft_type LORA)",
            found=f"peft_type = {kind!r}",
            where=where,
            do="train it with LoRA; other kinds of adapters are not implemented",
        )
    raw = {**_DEFAULTS, **raw}
    if raw.get("target_modules") is None and paths:
        raw["target_modules"] = sorted(paths)
    problems = [f"no {key}" for key in _DEFAULTS if not raw[key]]
    if not raw.get("target_modules") and not raw.get("modules_to_save"):
        problems.append("no target_modules")
    if raw.get("bias") not in (None, "none", "all", "lora_only"):
        problems.append(f"bias = {raw['bias']!r}")
    init = raw.get("init_lora_weights", True)
    known = (*_INITS, *_CHANGING)
    if not any(init is e or (init == e and isinstance(init, str)) for e in known):
        problems.append(
            f"init_lora_weights = {init!r} (it changed the base: save the adapter with "
            "path_initial_model_for_weight_conversion)"
        )
    problems += [
        f"{key} = {value!r}"
        for key, value in raw.items()
        if key not in _READ | _INERT and not any(value is e or value == e for e in _EMPTY)
    ]
    malformed = _malformed(raw)
    if problems or malformed:
        raise errors.UserError(
            expected="a LoRA adapter with settings that lora_jax implements",
            found=[*malformed, *problems],
            where=where,
            do="copy the file again, or correct it"
            if malformed
            else "use PEFT to merge this adapter into its base, and load the merged model",
        )
    try:
        return _config(raw)
    except errors.UserError as error:
        raise errors.UserError(
            expected="LoRA settings in their valid range",
            found=error.found,
            where=where,
            do="copy the file again, or correct it",
        ) from None


def _malformed(raw: Mapping[str, Any]) -> list[str]:
    """The settings whose type is not the one PEFT writes."""
    found = []
    for key, (own, of_each) in _TYPES.items():
        value = raw.get(key)
        held = list(value.values()) if isinstance(value, dict) else value
        parts = held if isinstance(held, list) else []
        right = isinstance(value, own) and all(isinstance(part, of_each) for part in parts)
        # Python counts true and false among the integers.
        right = right and not any(isinstance(part, bool) for part in [value, *parts])
        if value is not None and not right:
            found.append(f"{key} = {value!r}")
    tokens = raw.get("trainable_token_indices") or []
    for ids in tokens.values() if isinstance(tokens, dict) else [tokens]:
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            found.append(f"trainable_token_indices = {tokens!r}")
    for key in _SWITCHES:
        if not isinstance(raw.get(key), bool | int | None):
            found.append(f"{key} = {raw[key]!r}")
    return found


def _config(raw: Mapping[str, Any]) -> lora_config.LoRAConfig:
    layers, init = raw.get("layers_to_transform"), raw.get("init_lora_weights")
    return lora_config.LoRAConfig(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout") or 0.0,
        targets=raw.get("target_modules") or (),
        exclude=raw.get("exclude_modules") or (),
        layers=(layers,) if isinstance(layers, int) else layers or None,
        layers_pattern=raw.get("layers_pattern") or None,
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        modules_to_save=raw.get("modules_to_save") or (),
        trainable_token_indices=raw.get("trainable_token_indices") or None,
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        lora_bias=bool(raw.get("lora_bias")),
        ensure_weight_tying=bool(raw.get("ensure_weight_tying")),
        init_lora_weights=init if init in _CHANGING else "default",
    )


def written(adapter: lora_adapter.Adapter, revision: str | None) -> dict[str, Any]:
    """The content of adapter_config.json for an adapter."""
    config = adapter.config

    def as_list(names):
        return names if isinstance(names, str) else sorted(names)

    targets, layers, layers_pattern = config.targets, config.layers, config.layers_pattern
    if isinstance(targets, str) and layers is not None:
        # PEFT does not accept layers_to_transform with a regex.
        targets, layers, layers_pattern = tuple(adapter.factors), None, None
    elif targets == lora_targets.ALL_LINEAR:
        targets = _names(adapter.factors) or targets
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "revision": revision,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": as_list(targets),
        "exclude_modules": as_list(config.exclude) or None,
        "modules_to_save": list(config.modules_to_save) or None,
        "trainable_token_indices": config.trainable_token_indices,
        "init_lora_weights": config.init_lora_weights == "default" or config.init_lora_weights,
        "layers_to_transform": None if layers is None else list(layers),
        "layers_pattern": list(layers_pattern)
        if isinstance(layers_pattern, tuple)
        else layers_pattern,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "ensure_weight_tying": config.ensure_weight_tying,
        "inference_mode": True,
    }


def _names(paths: Iterable[str]) -> set[str]:
    """The adapted layers as PEFT writes them for "all-linear", which servers take for a regex.

    In a LLaMA, all layers of a name are linear, so the names are enough.
    """
    layers = [re.fullmatch(r"model\.(?:\w+\.)?layers\.\d+\.(?:self_attn|mlp)\.(\w+)", path)
              for path in paths]  # fmt: skip
    return {match[1] for match in layers if match} if all(layers) else {*paths}
