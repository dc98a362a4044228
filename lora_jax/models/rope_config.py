"""The rotary embedding's settings in config.json → one checked dataclass. Imports no jax."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.models import config_values


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding settings, as in transformers' `rope_parameters`."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


_NEEDED = {  # type → required keys
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_FACTORS = ("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow",
            "mscale", "mscale_all_dim")  # fmt: skip
_REFUSED = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
_PLACES = ("rope_scaling", "rope_parameters")  # the first precedes the second
_KNOWN = {field.name for field in dataclasses.fields(RopeConfig)} | {*_REFUSED, "type"}
_KINDS = ("full_attention", "sliding_attention")
_SCALED = ("yarn", "llama3")  # which depend on the length before scaling


def read(raw: Mapping[str, Any], context: int) -> tuple[RopeConfig, list[str]]:
    """(settings, problems) from a parsed config.json of transformers 5 or an older version.

    context: max_position_embeddings. As in transformers, `rope_scaling` precedes `rope_parameters`,
    rope_theta inside precedes rope_theta beside them, and a top-level
    original_max_position_embeddings precedes one inside. Where there is none, `context` is the
    length before scaling. A yarn factor of null is context / that length.
    """
    misplaced = [
        f"{key} = {config_values.shown(raw[key])} is not an object"
        for key in _PLACES
        if raw.get(key) and not isinstance(raw[key], dict)
    ] + _nested_problems(raw)
    if misplaced:
        return RopeConfig(), misplaced
    given = settings(raw)
    rope_type = given.get("rope_type") or given.get("type") or "default"
    if not isinstance(rope_type, str) or rope_type not in _NEEDED:
        return RopeConfig(), [
            f"rope type {rope_type!r} is not implemented ({', '.join(_NEEDED)} are)"
        ]
    partial = raw.get("partial_rotary_factor")
    given = {"partial_rotary_factor": partial, **given}
    problems = [
        f"rope parameter {key} = {config_values.shown(value)} is not implemented"
        for key, value in given.items()
        if isinstance(value, dict) or (key in _REFUSED and value not in (None, False, 1))
    ]
    values = config_values.Values(given, "rope parameter ")
    above = config_values.Values(raw)
    theta = values.positive("rope_theta", above.positive("rope_theta", RopeConfig.rope_theta))
    if rope_type == "default":
        return RopeConfig(rope_theta=theta), problems + values.problems + above.problems
    if "original_max_position_embeddings" in above.given:
        original = above.count("original_max_position_embeddings", context)
    else:
        original = values.count("original_max_position_embeddings", context)
    problems += [f"rope parameter {key} is missing" for key in _NEEDED[rope_type]
                 if key not in values.given]  # fmt: skip
    factor = values.positive("factor", context / original)
    if rope_type == "yarn" and factor == 1 and "factor" not in values.given and original == context:
        problems.append("rope parameter factor is missing")
    others = {key: values.number(key) for key in _FACTORS}
    if rope_type == "yarn" and theta == 1:
        problems.append("rope_theta 1 rotates all dimensions alike, which yarn cannot scale")
    if (
        rope_type == "llama3"
        and others["low_freq_factor"] == others["high_freq_factor"] is not None
    ):
        problems.append("rope parameters low_freq_factor and high_freq_factor are equal")
    rope = RopeConfig(
        rope_type=rope_type,
        rope_theta=theta,
        factor=factor,
        original_max_position_embeddings=original if rope_type in _SCALED else None,
        truncate=bool(given.get("truncate", True)),  # null is false, as in transformers
        **others,
    )
    return rope, problems + values.problems + above.problems


def read_local(raw: Mapping[str, Any], context: int) -> tuple[RopeConfig, list[str]]:
    """The same for the layers of Gemma 3 that have a sliding window."""
    theta, given = raw.get("rope_local_base_freq"), _nested(raw).get("sliding_attention")
    own = {"rope_theta": 1e4 if theta is None else theta}
    return read(own | {"rope_parameters": given if isinstance(given, dict) else {}}, context)


def settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The object with the settings, as it is in config.json; {} for none.

    Of Gemma 3, those of the layers without a window, to which `rope_scaling` is added.
    """
    if raw.get("model_type") == "gemma3_text":
        return {**(_nested(raw).get("full_attention") or {}), **(raw.get("rope_scaling") or {})}
    return dict(next((raw[key] for key in _PLACES if raw.get(key)), {}))


def _nested(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """rope_parameters of Gemma 3, which has settings for each type of layers; else {}."""
    found = raw.get("rope_parameters") if raw.get("model_type") == "gemma3_text" else None
    return found if isinstance(found, dict) else {}


def _nested_problems(raw: Mapping[str, Any]) -> list[str]:
    found = _nested(raw)
    return [
        f"rope_parameters.{kind} = {config_values.shown(found[kind])} is not an object"
        for kind in _KINDS
        if found.get(kind) and not isinstance(found[kind], dict)
    ]


def unread(raw: Mapping[str, Any]) -> list[str]:
    """The keys among the settings that no type of rotary embedding reads."""
    found = [key for key in settings(raw) if key not in _KNOWN]
    found += [key for key in _nested(raw) if key not in _KINDS]
    return [f"rope_parameters.{key}" for key in found]


def notes(rope: RopeConfig, raw: Mapping[str, Any], context: int) -> list[str]:
    """What of the scaling depends on a choice that config.json leaves open, one line each."""
    if rope.rope_type not in _SCALED:
        return []
    key = "original_max_position_embeddings"
    if raw.get(key) is None and settings(raw).get(key) is None:
        return [f"rope type {rope.rope_type} without {key}: max_position_embeddings, {context}, is "
                "taken as the length before scaling, as in transformers"]  # fmt: skip
    ratio = context / rope.original_max_position_embeddings
    if rope.rope_type == "yarn" and ratio not in (1, rope.factor):
        return [f"yarn scales by factor, {rope.factor:g}, as in transformers, although "
                f"max_position_embeddings / {key} is {ratio:g}"]  # fmt: skip
    return []
