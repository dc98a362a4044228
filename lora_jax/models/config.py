"""config.json of LLaMA and its relatives → one checked, frozen dataclass. Imports no jax."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from lora_jax import errors
from lora_jax.models import (
    composite,
    config_file,
    config_keys,
    config_values,
    layer_types,
    model_types,
    rope_config,
)
from lora_jax.models import quantization_config as model_quantization

REMAT = ("full", "dots", "none")  # the backward pass recomputes all, all but dots, nothing


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The architecture of LlamaForCausalLM and of its relatives, see model_types.MODEL_TYPES.

    Field names are Hugging Face's where it has one. `sliding_windows` has one entry a layer (None:
    full attention), and so has `ropes` (None: no rotary embedding), unless all layers have `rope`.
    `attention_multiplier` scales q · k; None: head_dim^-1/2. `norm_offset`: see modules.RMSNorm.
    `norms`: attention and MLP are normalized on their input (pre), on their output (post), or on
    both. `qk_norm`: q and k are normalized, each head by itself (head) or all heads together
    (projection); "": they are not.
    `fused_projections`: q, k and v are one linear layer, qkv_proj, and gate and up are another,
    gate_up_proj. `dtype` is the checkpoint's, with float16 read as bfloat16 (same size, but no
    overflow in training). `quantization` says how the checkpoint stores its linear layers (None:
    dense). `composite` is the model type around a language model inside of another model, see
    composite.COMPOSITES.
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
    qk_norm: str = ""
    hidden_act: str = "silu"
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    norm_offset: float | None = None
    norms: str = "pre"
    fused_projections: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    rope: rope_config.RopeConfig = dataclasses.field(default_factory=rope_config.RopeConfig)
    ropes: tuple[rope_config.RopeConfig | None, ...] = ()
    initializer_range: float = 0.02
    dtype: str = "float32"
    quantization: model_quantization.Quantization | None = None
    composite: str = ""

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise errors.UserError(
                expected="num_attention_heads divisible by num_key_value_heads",
                found=f"{self.num_attention_heads} and {self.num_key_value_heads}",
                where="config.json",
            )

    @property
    def context(self) -> int:
        """The longest sequence that the model is made for.

        Linear, dynamic and yarn rope stretch the length before scaling by a factor, and
        max_position_embeddings may be either of the two: Qwen tells its users to add yarn to a
        config.json that keeps the shorter length. It is the stretched one in models that stretch
        some of their layers only, such as Gemma 3.
        """
        of_some = len({*self.ropes} - {None}) > 1
        if of_some or self.rope.rope_type not in ("linear", "dynamic", "yarn"):
            return self.max_position_embeddings
        before = self.rope.original_max_position_embeddings or self.max_position_embeddings
        return max(self.max_position_embeddings, int(before * (self.rope.factor or 1)))


_CONTEXT = "max_position_embeddings"
_MOST_LAYERS = 10_000
_SHOWN = 8  # keys in one line
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}
_GEMMA = ("gemma2", "gemma3_text")
_DTYPES = {
    **dict.fromkeys(("float32", "float", "fp32", "float64", "double"), "float32"),
    **dict.fromkeys(("float16", "half", "fp16"), "float16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
}


def load(folder: pathlib.Path) -> LlamaConfig:
    """The architecture in `folder/config.json`. Raises: UserError with everything that is wrong."""
    return from_dict(config_file.read(folder), where=str(pathlib.Path(folder) / "config.json"))


def from_dict(raw: dict[str, Any], where: str = "config.json") -> LlamaConfig:
    """LlamaConfig from a parsed config.json, as transformers 5 or older versions write it.

    Raises: UserError with every key that changes the computation and is not implemented, and every
    value that cannot be right.
    """
    around, raw, where = _language_model(raw, where)
    model_type = raw["model_type"]
    problems = config_keys.not_implemented(raw)
    defaults = model_types.MODEL_TYPES[model_type].defaults
    raw = config_keys.read(raw)
    # null is a default, too, but for num_key_value_heads: it means as many as there are heads.
    raw |= {key: value for key, value in defaults.items()
            if key not in raw or (raw[key] is None and key != "num_key_value_heads")}  # fmt: skip
    values = config_values.Values(raw)
    problems += [f"{key} is missing" for key in config_keys.REQUIRED if key not in values.given]
    sizes = {key: values.count(key, 1) for key in config_keys.REQUIRED}
    sizes["num_hidden_layers"] = values.count("num_hidden_layers", 1, most=_MOST_LAYERS)
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    kv_heads = values.count("num_key_value_heads", heads)
    head_dim = values.count("head_dim", hidden // heads or 1)
    context = values.count(_CONTEXT, defaults[_CONTEXT])
    if not problems and not values.problems:
        problems += _size_problems(hidden, heads, kv_heads, values.given.get("head_dim"))
    layers = sizes["num_hidden_layers"]
    rope, rope_problems = rope_config.read(raw, context)
    of_layers = dict(
        sliding_windows=layer_types.sliding_windows(values, raw, layers),
        ropes=layer_types.ropes(values, raw, rope, layers, context),
    )
    dtype = _DTYPES.get(stored_dtype(raw))
    if dtype is None:
        problems.append(f"dtype {config_values.shown(_stated_dtype(raw))} is not implemented")
    bias = values.flag("attention_bias")
    fields = dict(
        rms_norm_eps=values.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=values.flag("tie_word_embeddings"),
        qkv_bias=bias,
        o_bias=values.flag("attention_out_bias") if model_type == "seed_oss" else bias,
        mlp_bias=values.flag("mlp_bias"),
        initializer_range=values.number("initializer_range", 0.02),
        hidden_act=_activation(values, raw),
        **_factors(values, raw, defaults, hidden, head_dim),
    ) | dict(model_types.MODEL_TYPES[model_type].fields)
    if not (rope_problems or values.problems):
        for each in dict.fromkeys([rope, *filter(None, of_layers["ropes"])]):
            problems += rope_config.size_problems(each, head_dim)
    problems += values.problems + rope_problems
    if problems:
        raise errors.UserError(
            expected="only settings that lora_jax implements",
            found=list(dict.fromkeys(problems)),
            where=where,
            do="use another checkpoint, or open an issue that names the key",
        )
    return LlamaConfig(
        **sizes,
        **fields,
        **of_layers,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rope=rope,
        dtype="bfloat16" if dtype == "float16" else dtype,
        quantization=model_quantization.parse(stored, where)
        if (stored := model_quantization.declared(raw))
        else None,
        composite=around,
    )


def _language_model(raw: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any], str]:
    """(the model type around it or "", what config.json says of the language model, and where).

    Raises: UserError if it is none that this package implements.
    """
    around = raw["model_type"] if composite.of(raw) else ""
    is_flat = composite.is_flat(raw)
    if around and not is_flat and not isinstance(raw.get("text_config"), Mapping):
        raise errors.UserError(
            expected=f"text_config, the language model inside of {around}",
            found=config_values.shown(raw.get("text_config")),
            where=where,
            do="download the file again",
        )
    raw = composite.language_model(raw)
    where += ": text_config" if around and not is_flat else ""
    model_type = raw.get("model_type")
    known = composite.TEXTS if around else tuple(model_types.MODEL_TYPES)
    if not isinstance(model_type, str) or model_type not in known:
        nested = [key for key, value in raw.items() if isinstance(value, dict)
                  and value.get("model_type") in [*model_types.MODEL_TYPES]]  # fmt: skip
        raise errors.UserError(
            expected=f"model_type among {', '.join(known)}"
            + ("" if around else
               f"; or, with one of these inside, {', '.join(composite.COMPOSITES)}"),
            found=config_values.shown(model_type)
            + (f", a model with a language model inside, in {nested[0]}" if nested else ""),
            where=where,
            do="use a LLaMA-like model, or inject LoRA into a Flax model of your own",
        )  # fmt: skip
    return around, raw, where


def _activation(values: config_values.Values, raw: dict[str, Any]) -> str:
    key = "hidden_activation" if raw["model_type"] in _GEMMA else "hidden_act"
    name = values.given.get(key, "silu")
    if raw["model_type"] == "gemma" and name == "gelu":  # in older files, which means the other
        return "gelu_pytorch_tanh"
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        values.problems.append(f"{key} = {config_values.shown(name)} is not implemented "
                               f"({', '.join(_ACTIVATIONS)} are)")  # fmt: skip
        return "silu"
    return _ACTIVATIONS[name]


def _factors(
    values: config_values.Values,
    raw: dict[str, Any],
    defaults: Mapping[str, Any],
    hidden: int,
    head_dim: int,
) -> dict[str, Any]:
    """The multipliers of Granite, those that Gemma makes of its sizes, and Gemma's soft caps."""
    if raw["model_type"] == "granite":
        found = {key: values.number(key, 1.0) for key in model_types.MULTIPLIERS}
        return found | {"logits_scaling": values.positive("logits_scaling", 1.0)}
    if raw["model_type"] == "gemma":
        return {"embedding_multiplier": hidden**0.5}
    if raw["model_type"] in _GEMMA:
        scalar = values.positive("query_pre_attn_scalar", defaults["query_pre_attn_scalar"])
        scale = None if scalar == head_dim else scalar**-0.5
        found = {"embedding_multiplier": hidden**0.5, "attention_multiplier": scale}
        return found | _soft_caps(values, raw)
    return {}


def _soft_caps(values: config_values.Values, raw: dict[str, Any]) -> dict[str, float | None]:
    """Those of the logits; None where config.json has null or 0, which turn a cap off."""
    return {
        key: values.number(key, None if key in raw else default) or None
        for key, default in model_types.SOFT_CAPS[raw["model_type"]].items()
    }


def notes(raw: dict[str, Any]) -> list[str]:
    """What a reader of a config.json that `from_dict` takes should know, one line each."""
    found = []
    config = from_dict(raw)
    where = "text_config" if config.composite and not composite.is_flat(raw) else "config.json"
    raw = composite.language_model(raw)
    unread = [*map(config_values.shown_key, config_keys.unread(raw) + rope_config.unread(raw))]
    if unread:
        more = f" and {len(unread) - _SHOWN} more" if len(unread) > _SHOWN else ""
        found.append(f"{where} has keys that {raw['model_type']} does not read: "
                     f"{', '.join(unread[:_SHOWN])}{more}")  # fmt: skip
    if _stated_dtype(raw) in ("float64", "double"):
        found.append("the weights are float64, and are read as float32")
    for key in ("attention_dropout", "resid_pdrop", "residual_dropout"):
        if value := config_keys.read(raw).get(key):
            found.append(f"{key} {config_values.shown(value)} of config.json is not applied in "
                         "training")  # fmt: skip
    return found + rope_config.notes(config.rope, raw, config.max_position_embeddings)


def _size_problems(hidden: int, heads: int, kv_heads: int, head_dim: int | None) -> list[str]:
    problems = []
    if head_dim is None and hidden % heads:
        problems.append(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    elif (head_dim or hidden // heads) % 2:
        odd = head_dim or hidden // heads
        problems.append(f"head_dim {odd:g} is odd, and rotary embedding pairs dimensions")
    if heads % kv_heads:
        problems.append(f"num_attention_heads {heads} is no multiple of "
                        f"num_key_value_heads {kv_heads}")  # fmt: skip
    return problems


def states_dtype(raw: dict[str, Any]) -> bool:
    """Whether a config.json says which dtype the weights have."""
    return _stated_dtype(raw) not in (None, "", "auto")


def stored_dtype(raw: dict[str, Any]) -> str:
    """The dtype in a config.json, as numpy and torch name it; float32 where there is none."""
    name = str(_stated_dtype(raw)).removeprefix("torch.") if states_dtype(raw) else "float32"
    return _DTYPES.get(name, name)


def _stated_dtype(raw: dict[str, Any]) -> Any:
    return raw.get("torch_dtype") if raw.get("dtype") is None else raw["dtype"]
