"""What differs from layer to layer: the sliding window, the rotary embedding. Imports no jax."""

from collections.abc import Mapping
from typing import Any

from lora_jax.models import config_values, model_types, rope_config

_SLIDING = "sliding_attention"
_KNOWN = ("full_attention", "attention", _SLIDING)
_DEFAULT_WINDOWS = {"smollm3": None, "phi3": None, "ministral3": None, "cwm": 8192}
_SWITCHED = ("qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text")  # by use_sliding_window


def sliding_windows(
    values: config_values.Values, raw: Mapping[str, Any], layers: int
) -> tuple[int | None, ...]:
    """The window of each layer; None for full attention. Problems are added to those of `values`.

    raw: the keys of config.json that its model type reads.
    """
    model_type = raw["model_type"]
    if "sliding_window" not in model_types.MODEL_TYPES[model_type].reads:
        return (None,) * layers
    window, default = None, _DEFAULT_WINDOWS.get(model_type, 4096)
    if raw.get("sliding_window", default) is not None:  # null is none, an absent key the default
        window = values.count("sliding_window", default)
    if model_type in ("mistral", "ministral3", "phi3"):
        return (window,) * layers
    kinds = _kinds(values, raw, layers)
    if model_type in _SWITCHED and not values.flag("use_sliding_window"):
        return (None,) * layers
    return tuple(window if kind == _SLIDING else None for kind in kinds)


def ropes(
    values: config_values.Values,
    raw: Mapping[str, Any],
    rope: rope_config.RopeConfig,
    layers: int,
    context: int,
) -> tuple[rope_config.RopeConfig | None, ...]:
    """The rotary embedding of each layer, None for a layer without; () if all have `rope`."""
    if raw["model_type"] == "smollm3":
        rotated = _rotated(values, raw, layers)
        return () if all(rotated) else tuple(rope if each else None for each in rotated)
    if raw["model_type"] == "exaone4":  # with a window, layers without it are not rotated
        if raw.get("sliding_window", 4096) is None:
            return ()
        windows = sliding_windows(values, raw, layers)
        return tuple(rope if window else None for window in windows)
    if raw["model_type"] in rope_config.NESTED:
        local, problems = rope_config.read_local(raw, context)
        values.problems += problems
        kinds = _kinds(values, raw, layers)
        return tuple(local if kind == _SLIDING else rope for kind in kinds)
    return ()


def _kinds(values: config_values.Values, raw: Mapping[str, Any], layers: int) -> list[str]:
    """The layer type of each layer."""
    kinds = values.given.get("layer_types") or _usual_kinds(values, raw, layers)
    if not isinstance(kinds, list) or len(kinds) != layers:
        shown = config_values.shown(kinds)
        problems = [f"layer_types = {shown} is not a list with one entry a layer"]
    else:
        problems = [
            f"layer type {config_values.shown(kind)} is not implemented"
            for kind in kinds
            if kind not in _KNOWN
        ]
    values.problems += [each for each in problems if each not in values.problems]
    return [] if problems else kinds


def _usual_kinds(values: config_values.Values, raw: Mapping[str, Any], layers: int) -> list[str]:
    """Those of a config.json that does not list them."""
    match raw["model_type"]:
        case "ministral":
            sliding = [True] * layers
        case "smollm3":
            slides = values.flag("use_sliding_window")
            sliding = [slides and not each for each in _rotated(values, raw, layers)]
        case "cwm":
            sliding = [i % 4 != 0 for i in range(layers)]
        case "exaone4" if isinstance(pattern := raw["sliding_window_pattern"], str) and pattern:
            sliding = [pattern[i % len(pattern)] == "L" for i in range(layers - 1)] + [False]
        case "gemma3_text" | "exaone4":
            pattern = _count(values, raw, "sliding_window_pattern")
            sliding = [(i + 1) % pattern != 0 for i in range(layers)]
        case "gemma2" | "olmo3":
            pattern = 2 if raw["model_type"] == "gemma2" else 4
            sliding = [(i + 1) % pattern != 0 for i in range(layers)]
        case _:
            first = values.number("max_window_layers", 28)
            sliding = [i >= first for i in range(layers)]
    return [_SLIDING if each else "full_attention" for each in sliding]


def _rotated(values: config_values.Values, raw: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers of a SmolLM3 have a rotary embedding."""
    given = values.given.get("no_rope_layers")
    if given is None:
        interval = _count(values, raw, "no_rope_layer_interval")
        return [(i + 1) % interval != 0 for i in range(layers)]
    if isinstance(given, list) and len(given) >= layers and all(each in (0, 1) for each in given):
        return [bool(each) for each in given[:layers]]
    problem = f"no_rope_layers = {config_values.shown(given)} is not a list of 0 or 1 a layer"
    if problem not in values.problems:
        values.problems.append(problem)
    return [True] * layers


def _count(values: config_values.Values, raw: Mapping[str, Any], key: str) -> int:
    return values.count(key, model_types.MODEL_TYPES[raw["model_type"]].defaults[key])
