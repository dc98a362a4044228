"""Models with a language model inside, such as Gemma 3 with its vision tower. Imports no jax.

Here are the model types whose logits of text alone are exactly those of a language model that
`model_types` has: its embedding, decoder and head, with its own mask and positions. From the
configuration and modeling code of transformers.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from lora_jax.models import config_keys, model_types


class Composite(NamedTuple):
    """A model_type with a language model inside.

    text: the model_type of a text_config that names none. inside: the name of the language model in
    `model`. beside: the names of what lies beside it. is_tied: the default of tie_word_embeddings,
    None for a type that does not read it; reads_tied_text: text_config may say it, too.
    defaults: those that precede the ones of the text's type. was_plain: before transformers 4.52,
    config.json had the keys of text_config itself, and tensors of the language model were named as
    in a LLaMA.
    """

    text: str = "llama"
    inside: str = "language_model"
    beside: tuple[str, ...] = ("vision_tower", "multi_modal_projector")
    is_tied: bool | None = False
    reads_tied_text: bool = False
    defaults: Mapping[str, Any] = MappingProxyType({})
    was_plain: bool = False


_WITH_NEWLINE = (*Composite().beside, "image_newline")
_OF_IDEFICS = Composite(inside="text_model", beside=("vision_model", "connector"))
_OF_VOXTRAL = {"vocab_size": 131072, "hidden_size": 3072, "intermediate_size": 8192,
               "num_hidden_layers": 30, "num_key_value_heads": 8, "head_dim": 128,
               "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
               "rope_theta": 1e8}  # fmt: skip

COMPOSITES: dict[str, Composite] = {
    "gemma3": Composite("gemma3_text", is_tied=True),
    "mistral3": Composite("mistral", is_tied=True),
    "llava": Composite(reads_tied_text=True),
    "vipllava": Composite(),
    "llava_next": Composite(beside=_WITH_NEWLINE),
    "llava_next_video": Composite(
        beside=(*_WITH_NEWLINE, "vision_resampler"), reads_tied_text=True
    ),
    "llava_onevision": Composite("qwen2", beside=_WITH_NEWLINE, reads_tied_text=True),
    "internvl": Composite("qwen2", is_tied=True),
    "qwen2_vl": Composite(
        "qwen2_vl_text", beside=("visual",), reads_tied_text=True, was_plain=True
    ),
    "qwen2_5_vl": Composite(
        "qwen2_5_vl_text", beside=("visual",), reads_tied_text=True, was_plain=True
    ),
    "qwen3_vl": Composite("qwen3_vl_text", beside=("visual",)),
    "idefics3": _OF_IDEFICS,
    "smolvlm": _OF_IDEFICS,
    "voxtral": Composite(
        beside=("audio_tower", "multi_modal_projector"), is_tied=None, defaults=_OF_VOXTRAL
    ),
}

# The sizes that a text_config may leave out, as published ones do; config.json of a language model
# has them all.
_SIZES = {
    "llama": (32000, 4096, 11008, 32, 32),
    "mistral": (32000, 4096, 14336, 32, 32),
    "ministral": (32000, 4096, 14336, 32, 32),
    "ministral3": (131072, 4096, 14336, 34, 32),
    "qwen2": (151936, 4096, 22016, 32, 32),
    "qwen3": (151936, 4096, 22016, 32, 32),
    "qwen2_vl_text": (152064, 8192, 29568, 80, 64),
    "qwen2_5_vl_text": (152064, 8192, 29568, 80, 64),
    "qwen3_vl_text": (151936, 4096, 22016, 32, 32),
    "smollm3": (128256, 2048, 11008, 36, 16),
    "granite": (32000, 4096, 11008, 32, 32),
    "phi3": (32064, 3072, 8192, 32, 32),
    "olmo2": (50304, 4096, 11008, 32, 32),
    "olmo3": (50304, 4096, 11008, 32, 32),
    "seed_oss": (155136, 4096, 27648, 64, 80),
    "gemma": (256000, 3072, 24576, 28, 16),
    "gemma2": (256000, 2304, 9216, 26, 8),
    "gemma3_text": (262208, 2304, 9216, 26, 8),
}
TEXTS = tuple(_SIZES)
# Keys of the whole model, which transformers 4.52 to 4.57 wrote into text_config of Qwen-VL, too.
_OF_IMAGES = ("text_config", "vision_", "image_", "video_")
_TIED = "tie_word_embeddings"
_DTYPES = ("dtype", "torch_dtype")
_QUANTIZATION = ("quantization_config", "quantization")


def of(raw: Mapping[str, Any]) -> Composite | None:
    """What is known of a config.json's model type; None if it has no language model inside."""
    model_type = raw.get("model_type")
    return COMPOSITES.get(model_type) if isinstance(model_type, str) else None


def is_flat(raw: Mapping[str, Any]) -> bool:
    """Whether the keys of the language model inside are beside those of the whole model."""
    own = of(raw)
    return own is not None and own.was_plain and raw.get("text_config") is None


def language_model(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the language model inside; that of a language model itself as it is.

    The head's tie is that of the whole model, and so are dtype and quantization if it has them.
    What text_config leaves out has the defaults of its own model type.
    """
    own = of(raw)
    if own is None:
        return dict(raw)
    given = raw.get("text_config")
    given = dict(given) if isinstance(given, Mapping) else {}
    if is_flat(raw):
        given = {key: value for key, value in raw.items() if key != "model_type"}
    given = {key: value for key, value in given.items() if not key.startswith(_OF_IMAGES)}
    text = {"model_type": own.text, **own.defaults, **given}
    sizes = _SIZES.get(str(text["model_type"]), ())
    for key, size in zip(config_keys.REQUIRED, sizes, strict=False):
        text[key] = size if text.get(key) is None else text[key]
    text[_TIED] = bool(own.is_tied)
    if own.is_tied is not None:
        text[_TIED] = own.is_tied if raw.get(_TIED) is None else raw[_TIED]
    if own.reads_tied_text and not text[_TIED]:
        known = model_types.MODEL_TYPES.get(str(text["model_type"]), model_types.ModelType())
        default = known.defaults.get(_TIED, False)
        text[_TIED] = default if given.get(_TIED) is None else given[_TIED]
    replaced = {key for keys in (_DTYPES, _QUANTIZATION) if any(raw.get(key) for key in keys)
                for key in keys}  # fmt: skip
    text = {key: value for key, value in text.items() if key not in replaced}
    return text | {key: raw[key] for key in replaced if key in raw}


def changed(raw: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """config.json with other values for the keys that `language_model` has."""
    if of(raw) is None or is_flat(raw):
        return {**raw, **changes}
    text, whole = raw.get("text_config"), {_TIED, *_DTYPES, *_QUANTIZATION}
    found = {**raw, **{key: value for key, value in changes.items() if key in whole}}
    own = {key: value for key, value in changes.items() if key not in whole or key == _TIED}
    return {**found, "text_config": {**(text if isinstance(text, Mapping) else {}), **own}}


def without(raw: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """config.json without these keys, which `language_model` may take from text_config."""
    found = {key: value for key, value in raw.items() if key not in keys}
    if of(raw) is not None and isinstance(text := raw.get("text_config"), Mapping):
        found["text_config"] = {key: value for key, value in text.items() if key not in keys}
    return found
