"""The rotary embedding's settings in config.json → one checked dataclass. Imports no jax."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.models import config_values


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding settings, as in transformers' `rope_parameters`.

    partial_rotary_factor: the part of each head, from its beginning, that is rotated.
    llama_4_scaling_beta: how queries grow with their position, see rope.query_scale; 0: not at all.
    """

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
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0
    llama_4_scaling_beta: float = 0.0

    def rotary_dim(self, head_dim: int) -> int:
        """How many dimensions of a head are rotated, in pairs; of an odd number, one more."""
        return int(head_dim * self.partial_rotary_factor)


_NEEDED = {  # type → required keys
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_TYPES = {name: name for name in _NEEDED}
# transformers has these for Phi-3, under names of its older files too.
_TYPES_OF_PHI3 = {"default": "default", **dict.fromkeys(("longrope", "su", "yarn"), "longrope")}
_LISTS = ("short_factor", "long_factor")
_FACTORS = ("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow",
            "mscale", "mscale_all_dim")  # fmt: skip
_MROPE = ("mrope_section", "mrope_interleaved")
# In text, all three positions of a token are the same, with which mrope is the default type.
_TYPES_WITH_MROPE = {**_TYPES, "mrope": "default"}
_WITH_MROPE = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
# The types with settings for each type of layers, and the rope_theta of layers with a window where
# config.json has none for them. In OLMo 3, transformers gives its rope_theta to the other layers.
NESTED = {"gemma3_text": 1e4, "olmo3": 5e5}
_PARTIAL = "partial_rotary_factor"
_BETA = "llama_4_scaling_beta"  # which Ministral 3 has to have, and the other types do not read
_PLACES = ("rope_scaling", "rope_parameters")  # the first precedes the second
_KNOWN = {field.name for field in dataclasses.fields(RopeConfig)} | {*_MROPE, "type"}
_KINDS = ("full_attention", "sliding_attention")
_SCALED = ("yarn", "llama3", "longrope")  # which depend on the length before scaling


def read(raw: Mapping[str, Any], context: int) -> tuple[RopeConfig, list[str]]:
    """(settings, problems) from a parsed config.json of transformers 5 or an older version.

    context: max_position_embeddings. As in transformers, `rope_scaling` precedes `rope_parameters`,
    rope_theta inside precedes rope_theta beside them, and a top-level
    original_max_position_embeddings precedes one inside. Where there is none, `context` is the
    length before scaling. A factor of null is context / that length for yarn and longrope. Only the
    layers of Phi-3 rotate a part of each head.
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
    is_phi3 = raw.get("model_type") == "phi3"
    has_mrope = raw.get("model_type") in _WITH_MROPE
    types = _TYPES_OF_PHI3 if is_phi3 else _TYPES_WITH_MROPE if has_mrope else _TYPES
    if not isinstance(rope_type, str) or rope_type not in types:
        return RopeConfig(), [
            f"rope type {rope_type!r} is not implemented ({', '.join(types)} are)"
        ]
    rope_type = types[rope_type]
    given = {_PARTIAL: raw.get(_PARTIAL), **given}
    refused = (*(() if has_mrope else _MROPE), *(() if is_phi3 else (_PARTIAL,)))
    problems = [
        f"rope parameter {key} = {config_values.shown(value)} is not implemented"
        for key, value in given.items()
        if isinstance(value, dict) or (key in refused and value not in (None, False, 1))
    ]
    values = config_values.Values(given, "rope parameter ")
    above = config_values.Values(raw)
    theta = values.positive("rope_theta", above.positive("rope_theta", RopeConfig.rope_theta))
    partial = values.positive(_PARTIAL, 1.0) if is_phi3 else 1.0
    beta = 0.0
    if raw.get("model_type") == "ministral3":
        beta = values.number(_BETA)
        if beta is None:
            problems.append(f"rope parameter {_BETA} is missing")
        elif beta and rope_type not in _SCALED:
            problems.append(f"rope parameter {_BETA} = {beta:g} with the type {rope_type} is not "
                            f"implemented (it is with {', '.join(_SCALED)})")  # fmt: skip
    if rope_type == "default":
        rope = RopeConfig(rope_theta=theta, partial_rotary_factor=partial)
        return rope, problems + values.problems + above.problems
    if "original_max_position_embeddings" in above.given and not _is_nested(raw):
        original = above.count("original_max_position_embeddings", context)
    else:
        original = values.count("original_max_position_embeddings", context)
    problems += [f"rope parameter {key} is missing" for key in _NEEDED[rope_type]
                 if key not in values.given]  # fmt: skip
    factor = values.positive("factor", context / original)
    if rope_type == "yarn" and factor == 1 and "factor" not in values.given and original == context:
        problems.append("rope parameter factor is missing")
    rope = RopeConfig(
        rope_type=rope_type,
        rope_theta=theta,
        factor=factor,
        original_max_position_embeddings=original if rope_type in _SCALED else None,
        truncate=bool(given.get("truncate", True)),  # null is false, as in transformers
        partial_rotary_factor=partial,
        llama_4_scaling_beta=beta or 0.0,
        **{key: values.numbers(key) for key in _LISTS if rope_type == "longrope"},
        **{key: values.number(key) for key in _FACTORS},
    )
    problems += _unscalable(rope)
    return rope, problems + values.problems + above.problems


def _unscalable(rope: RopeConfig) -> list[str]:
    """What the formula of a type cannot be computed with."""
    found = []
    if rope.rope_type == "yarn" and rope.rope_theta == 1:
        found.append("rope_theta 1 rotates all dimensions alike, which yarn cannot scale")
    if rope.rope_type == "llama3" and rope.low_freq_factor == rope.high_freq_factor is not None:
        found.append("rope parameters low_freq_factor and high_freq_factor are equal")
    if rope.rope_type == "longrope" and rope.original_max_position_embeddings == 1:
        found.append("original_max_position_embeddings 1 is no length that longrope can scale")
    return found


def read_local(raw: Mapping[str, Any], context: int) -> tuple[RopeConfig, list[str]]:
    """The same for the layers with a sliding window, of a type in NESTED."""
    theta, given = raw.get("rope_local_base_freq"), _nested(raw).get("sliding_attention")
    own = {"rope_theta": NESTED[raw["model_type"]] if theta is None else theta}
    return read(own | {"rope_parameters": given if isinstance(given, dict) else {}}, context)


def size_problems(rope: RopeConfig, head_dim: int) -> list[str]:
    """What of the settings does not fit the heads, one line each."""
    dim = rope.rotary_dim(head_dim)
    if not 1 <= dim <= head_dim:
        return [f"{_PARTIAL} {rope.partial_rotary_factor:g} rotates {dim} of the {head_dim} "
                "dimensions of a head"]  # fmt: skip
    pairs = -(-dim // 2)
    return [
        f"rope parameter {key} has {len(getattr(rope, key))} numbers for {pairs} pairs of "
        "dimensions"
        for key in _LISTS
        if rope.rope_type == "longrope" and len(getattr(rope, key)) != pairs
    ]


def settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The object with the settings, as it is in config.json; {} for none.

    Of a type in NESTED, those of the layers without a window, to which `rope_scaling` is added.
    """
    if _is_nested(raw):
        return {**(_nested(raw).get("full_attention") or {}), **(raw.get("rope_scaling") or {})}
    return dict(next((raw[key] for key in _PLACES if raw.get(key)), {}))


def _is_nested(raw: Mapping[str, Any]) -> bool:
    return raw.get("model_type") in NESTED


def _nested(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """rope_parameters of a type in NESTED; else {}."""
    found = raw.get("rope_parameters") if _is_nested(raw) else None
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
    is_ministral3 = raw.get("model_type") == "ministral3"  # transformers writes its context, too
    known = _KNOWN | {"max_position_embeddings"} if is_ministral3 else _KNOWN - {_BETA}
    found = [key for key in settings(raw) if key not in known]
    found += [key for key in _nested(raw) if key not in _KINDS]
    return [f"rope_parameters.{key}" for key in found]


def notes(rope: RopeConfig, raw: Mapping[str, Any], context: int) -> list[str]:
    """What of the scaling depends on a choice that config.json leaves open, one line each."""
    if rope.rope_type not in _SCALED or not settings(raw):  # those of its model type, if none
        return []
    key = "original_max_position_embeddings"
    if raw.get(key) is None and settings(raw).get(key) is None:
        default = rope.original_max_position_embeddings
        name = "" if raw["model_type"] == "phi3" else "max_position_embeddings, "
        return [f"rope type {rope.rope_type} without {key}: {name}{default}, is "
                "taken as the length before scaling, as in transformers"]  # fmt: skip
    ratio = context / rope.original_max_position_embeddings
    if rope.rope_type == "yarn" and ratio not in (1, rope.factor):
        return [f"yarn scales by factor, {rope.factor:g}, as in transformers, although "
                f"max_position_embeddings / {key} is {ratio:g}"]  # fmt: skip
    return []
