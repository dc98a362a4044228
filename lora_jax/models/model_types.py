"""The model types of config.json: in what each differs from the others. Imports no jax.

From the modeling code of transformers for each model type. A relative of LLaMA is added here, with
fields of LlamaConfig for what its layers do differently.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class ModelType(NamedTuple):
    """A model_type.

    reads: keys of config.json beside those that all types read. defaults: transformers', for keys
    that config.json leaves out. built_in: keys of other types; this one computes so without them.
    fields: those of LlamaConfig that are the same in all models of the type.
    """

    reads: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = MappingProxyType({})
    built_in: tuple[str, ...] = ()
    fields: Mapping[str, Any] = MappingProxyType({})


_BIASES = ("attention_bias", "mlp_bias")
_WINDOWS = ("use_sliding_window", "sliding_window", "layer_types")
MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
SOFT_CAPS = {  # transformers' defaults, of keys that config.json leaves out; null is none
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
}
_LONG = {"max_position_embeddings": 32768}
_QK_NORM = ("qk_norm", "use_qk_norm")
_OF_OLMO = {"norms": "post", "norm_offset": 0.0, "qk_norm": "projection"}
_OF_GEMMA = ("attention_bias", "hidden_activation", "query_pre_attn_scalar", "sliding_window",
             "layer_types", *SOFT_CAPS["gemma2"])  # fmt: skip
_DEFAULTS_OF_GEMMA = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True,
                      "query_pre_attn_scalar": 256,
                      "hidden_activation": "gelu_pytorch_tanh"}  # fmt: skip
_ROPE_OF_CWM = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
_ROPE_OF_MINISTRAL3 = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0,
                       "original_max_position_embeddings": 16384, "beta_fast": 32.0,
                       "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                       "llama_4_scaling_beta": 0.1}  # fmt: skip

_QWEN2_VL = ModelType(
    (*_WINDOWS, "max_window_layers"),
    _LONG | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    | {"max_window_layers": 80},
    ("qkv_bias", "use_qkv_bias"),
    {"qkv_bias": True},
)  # fmt: skip

MODEL_TYPES: dict[str, ModelType] = {
    "llama": ModelType(_BIASES, {"max_position_embeddings": 2048}),
    "mistral": ModelType(
        ("sliding_window",), {"max_position_embeddings": 131072, "num_key_value_heads": 8}
    ),
    "ministral": ModelType(
        ("sliding_window", "layer_types"),
        {"max_position_embeddings": 131072, "num_key_value_heads": 8},
    ),
    "ministral3": ModelType(
        ("sliding_window",),
        {"max_position_embeddings": 262144, "num_key_value_heads": 8, "head_dim": 128}
        | {"rms_norm_eps": 1e-5, "rope_parameters": _ROPE_OF_MINISTRAL3},
    ),
    "qwen2": ModelType(
        (*_WINDOWS, "max_window_layers"),
        _LONG | {"num_key_value_heads": 32},
        ("qkv_bias", "use_qkv_bias"),
        {"qkv_bias": True},
    ),
    "qwen3": ModelType(
        ("attention_bias", *_WINDOWS, "max_window_layers"),
        _LONG | {"num_key_value_heads": 32, "head_dim": 128},
        _QK_NORM,
        {"qk_norm": "head"},
    ),
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3_vl_text": ModelType(
        ("attention_bias",),
        {"max_position_embeddings": 128000, "num_key_value_heads": 32, "head_dim": 128}
        | {"rope_theta": 5e5},
        _QK_NORM,
        {"qk_norm": "head"},
    ),
    "smollm3": ModelType(
        (*_BIASES, *_WINDOWS, "no_rope_layers", "no_rope_layer_interval"),
        _LONG
        | {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6}
        | {"no_rope_layer_interval": 4},
    ),
    "granite": ModelType(
        (*_BIASES, *MULTIPLIERS), {"max_position_embeddings": 2048, "attention_multiplier": 1.0}
    ),
    "phi3": ModelType(
        ("sliding_window", "resid_pdrop"),
        {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
        | {"rms_norm_eps": 1e-5},
        fields={"fused_projections": True},
    ),
    "olmo2": ModelType(
        ("attention_bias",),
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        _QK_NORM,
        _OF_OLMO,
    ),
    "olmo3": ModelType(
        ("attention_bias", "sliding_window", "layer_types"),
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 5e5},
        _QK_NORM,
        _OF_OLMO,
    ),
    "exaone4": ModelType(
        ("sliding_window", "sliding_window_pattern", "layer_types"),
        {"max_position_embeddings": 2048, "num_key_value_heads": 32, "rms_norm_eps": 1e-5}
        | {"sliding_window_pattern": 4},
        _QK_NORM,
        {"norms": "post", "qk_norm": "head"},
    ),
    "cwm": ModelType(
        ("mlp_bias", "sliding_window", "layer_types"),
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 128}
        | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "rope_parameters": _ROPE_OF_CWM},
    ),
    "internlm3": ModelType(
        _BIASES, _LONG | {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5}
    ),
    "iquestcoder": ModelType(
        _BIASES,
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 128}
        | {"rms_norm_eps": 1e-5},
    ),
    "seed_oss": ModelType(
        (*_BIASES, "attention_out_bias", "residual_dropout"),
        {"max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128}
        | {"attention_bias": True},
    ),
    "gemma": ModelType(
        ("attention_bias",),
        {"max_position_embeddings": 8192, "num_key_value_heads": 16, "head_dim": 256}
        | {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
        fields={"norm_offset": 1.0},
    ),
    "gemma2": ModelType(
        _OF_GEMMA,
        _DEFAULTS_OF_GEMMA | {"max_position_embeddings": 8192},
        fields={"norms": "both", "norm_offset": 1.0},
    ),
    "gemma3_text": ModelType(
        (*_OF_GEMMA, "sliding_window_pattern", "rope_local_base_freq"),
        _DEFAULTS_OF_GEMMA
        | {"max_position_embeddings": 131072, "rope_theta": 1e6, "sliding_window_pattern": 6},
        _QK_NORM,
        {"norms": "both", "norm_offset": 1.0, "qk_norm": "head"},
    ),
}  # fmt: skip
