"""config.json of LLaMA and its relatives → one checked, frozen dataclass. Imports no jax."""

import dataclasses
import json
import pathlib
from typing import Any

from lora_jax import errors
from lora_jax.models import quantization_config as model_quantization

REMAT = ("full", "dots", "none")  # the backward pass recomputes all, all but dots, nothing


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


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The architecture of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM.

    Field names are Hugging Face's. The model types differ in `qkv_bias`, `o_bias`, `qk_norm` and
    `sliding_windows` (one entry a layer; None: full attention). `dtype` is the checkpoint's, with
    float16 read as bfloat16 (same size, but no overflow in training). `quantization` says how the
    checkpoint stores its linear layers (None: dense).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    rope: RopeConfig = RopeConfig()
    initializer_range: float = 0.02
    dtype: str = "float32"
    quantization: model_quantization.Quantization | None = None

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise errors.UserError(
                expected="num_attention_heads divisible by num_key_value_heads",
                found=f"{self.num_attention_heads} and {self.num_key_value_heads}",
                where="config.json",
            )


_ROPE_TYPES = {  # type → required keys
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_READ = {
    *_REQUIRED,
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "layer_types"),
    *("use_sliding_window", "max_window_layers", "rope_parameters", "rope_scaling", "rope_theta"),
    *("initializer_range", "dtype", "torch_dtype", "hidden_act", "model_type"),
    "quantization_config",
}
# Keys that do not change the forward pass.
_INERT = {
    *("architectures", "transformers_version", "_name_or_path", "_commit_hash", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp"),
    *("id2label", "label2id", "problem_type", "return_dict", "output_attentions"),
    *("output_hidden_states", "chunk_size_feed_forward", "is_decoder", "task_specific_params"),
    *("tokenizer_class", "num_labels", "max_length", "auto_map", "unsloth_version"),
    *("unsloth_fixed", "max_sequence_length", "tie_encoder_decoder", "torchscript"),
    *("_attn_implementation_autoset", "attn_implementation", "_flash_attn_2_enabled"),
    # text-generation settings that old versions of transformers wrote into config.json
    *("temperature", "top_p", "top_k", "typical_p", "do_sample", "num_beams", "min_length"),
    *("repetition_penalty", "length_penalty", "diversity_penalty", "num_return_sequences"),
    *("num_beam_groups", "encoder_no_repeat_ngram_size", "no_repeat_ngram_size"),
}  # fmt: skip
_INERT_VALUES = (None, False, 0, 0.0, "", [], {})


_DEFAULTS = {  # what transformers assumes for keys that config.json leaves out
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}


def _get(raw: dict[str, Any], key: str, model_type: str) -> Any:
    return raw.get(key, _DEFAULTS[model_type].get(key))


def load(folder: pathlib.Path) -> LlamaConfig:
    """The architecture in `folder/config.json`. Raises: UserError with every key that is wrong."""
    path = pathlib.Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise errors.UserError(
            expected="a Hugging Face model folder with config.json",
            found="no config.json",
            where=str(folder),
            do="pass the folder that holds config.json and *.safetensors, or a hub id",
        ) from None
    except json.JSONDecodeError as error:
        raise errors.UserError(
            expected="JSON", found=str(error), where=str(path), do="download the file again"
        ) from None
    return from_dict(raw, where=str(path))


def from_dict(raw: dict[str, Any], where: str = "config.json") -> LlamaConfig:
    """LlamaConfig from a parsed config.json, as transformers 5 or older versions write it.

    Raises: UserError with every key that changes the computation and is not implemented.
    """
    model_type = raw.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise errors.UserError(
            expected=f"model_type among {', '.join(_MODEL_TYPES)}",
            found=repr(model_type),
            where=where,
            do="use a LLaMA-like model, or inject LoRA into a Flax model of your own",
        )
    problems = [f"{key} is missing" for key in _REQUIRED if raw.get(key) is None]
    problems += [
        f"{key} = {value!r} is not implemented"
        for key, value in raw.items()
        if key not in _READ | _INERT and not any(value is v or value == v for v in _INERT_VALUES)
    ]
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act = {raw['hidden_act']!r} is not implemented (silu is)")
    foreign = {"llama": ("use_sliding_window", "sliding_window"),
               "mistral": ("attention_bias", "mlp_bias", "use_sliding_window"),
               "qwen2": ("attention_bias", "mlp_bias"),
               "qwen3": ("mlp_bias",)}[model_type]  # fmt: skip
    problems += [f"{key} = {raw[key]!r} is not a key of model_type {model_type}"
                 for key in foreign if raw.get(key)]  # fmt: skip
    problems += [
        f"layer type {kind!r} is not implemented"
        for kind in sorted(set(raw.get("layer_types") or ()))
        if kind not in ("full_attention", "sliding_attention")
    ]
    rope, rope_problems = _rope(raw)
    problems += rope_problems
    if problems:
        raise errors.UserError(
            expected="only settings that lora_jax implements",
            found=problems,
            where=where,
            do="use another checkpoint, or open an issue that names the key",
        )
    heads = raw["num_attention_heads"]
    head_dim = _get(raw, "head_dim", model_type) or raw["hidden_size"] // heads
    bias = bool(raw.get("attention_bias", False))
    return LlamaConfig(
        **{key: raw[key] for key in _REQUIRED},
        num_key_value_heads=_get(raw, "num_key_value_heads", model_type) or heads,
        head_dim=head_dim,
        max_position_embeddings=_get(raw, "max_position_embeddings", model_type),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        qkv_bias=bias or model_type == "qwen2",
        o_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=model_type == "qwen3",
        sliding_windows=_sliding_windows(raw, model_type),
        rope=rope,
        initializer_range=raw.get("initializer_range", 0.02),
        dtype=_dtype(raw, where),
        quantization=model_quantization.parse(stored, where)
        if (stored := raw.get("quantization_config"))
        else None,
    )


def _rope(raw: dict[str, Any]) -> tuple[RopeConfig, list[str]]:
    given = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope_type = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    given.setdefault("rope_theta", raw.get("rope_theta") or 10000.0)
    given = {key: value for key, value in given.items() if value is not None}
    if rope_type not in _ROPE_TYPES:
        return RopeConfig(), [
            f"rope type {rope_type!r} is not implemented ({', '.join(_ROPE_TYPES)} are)"
        ]
    if given.get("partial_rotary_factor") == 1.0:
        del given["partial_rotary_factor"]
    known = {field.name for field in dataclasses.fields(RopeConfig)}
    problems = [
        f"rope parameter {key} = {value!r} is not implemented"
        for key, value in given.items()
        if key not in known
    ]
    problems += [f"rope parameter {key} is missing" for key in _ROPE_TYPES[rope_type]
                 if key not in given]  # fmt: skip
    if problems:
        return RopeConfig(), problems
    context = _get(raw, "max_position_embeddings", raw["model_type"])
    if rope_type in ("llama3", "yarn"):
        given.setdefault("original_max_position_embeddings", context)
    if rope_type == "yarn":
        given.setdefault("factor", context / given["original_max_position_embeddings"])
    return RopeConfig(rope_type=rope_type, **given), []


def _sliding_windows(raw: dict[str, Any], model_type: str) -> tuple[int | None, ...]:
    layers = raw["num_hidden_layers"]
    if model_type == "mistral":
        return (raw.get("sliding_window", 4096),) * layers
    if not raw.get("use_sliding_window"):
        return (None,) * layers
    window, first = raw.get("sliding_window", 4096), raw.get("max_window_layers", 28)
    types = raw.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def stored_dtype(raw: dict[str, Any]) -> str:
    """The dtype in a config.json, such as "float16"."""
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")


def _dtype(raw: dict[str, Any], where: str) -> str:
    name = stored_dtype(raw)
    dtypes = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}
    if name not in dtypes:
        raise errors.UserError(
            expected=f"dtype among {', '.join(dtypes)}", found=repr(name), where=where
        )
    return dtypes[name]
