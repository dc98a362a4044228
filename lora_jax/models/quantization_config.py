"""`quantization_config` in the config.json of a quantized checkpoint. Imports no jax."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax import errors
from lora_jax.models import config_values

NATIVE = ("int8", "int4", "int4-g64", "int4-g128")  # formats stored in lora_jax's own layout
VERSION = 1  # of lora_jax's layout
KEYS = ("quantization_config", "quantization")  # in config.json; mlx-lm writes both, or the second


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a checkpoint stores its linear layers.

    fmt: the format in memory, as a value of --quant; "none" if no layer can be packed.
    method: "bitsandbytes", "gptq", "awq", "compressed-tensors", "mlx" or "lora_jax", which
    determines tensor names and layout.
    group: how many rows share a scale; −1: all rows.
    zero_points: w = (code − zero) · scale with zeros other than 8. zero_offset: what is added to a
    stored zero point. act_order: the rows of a group may be anywhere in the weight.
    dense: names of modules that are not quantized. only: names of those that are (None: all).
    """

    method: str
    fmt: str
    group: int = 64
    zero_points: bool = False
    zero_offset: int = 0
    act_order: bool = False
    dense: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None

    def __post_init__(self):
        for name in ("dense", "only"):  # JSON has lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def stays_packed(self) -> bool:
        """Whether a format in memory holds the weights; otherwise they become dense."""
        return self.fmt != "none"

    def __str__(self) -> str:
        return f"{self.fmt} ({self.method})" if self.stays_packed else self.method

    def skips(self, module: str) -> bool:
        """Whether the linear layer at this dotted path is dense according to the config."""

        def among(names: tuple[str, ...]) -> bool:
            patterns = [name[3:] for name in names if name.startswith("re:")]
            return any(f".{name}." in f".{module}." for name in names) or any(
                re.match(pattern, module) for pattern in patterns
            )

        return among(self.dense) or (self.only is not None and not among(self.only))


def choose(asked: str | None, stored: Quantization | None, where: str) -> str:
    """The format of the weights in memory, as a value of --quant.

    asked: None keeps the checkpoint's format; "none" makes a quantized checkpoint dense. stored:
    None means a dense checkpoint; one that does not stay packed is like it.
    Raises: UserError if a quantized checkpoint is in another format than the one asked for.
    """
    if stored is None or not stored.stays_packed:
        return asked or "none"
    if asked is None or asked == "none":
        return asked or stored.fmt
    if asked not in (stored.fmt, stored.fmt.removesuffix("-dq")):
        raise errors.UserError(
            expected=f"--quant {stored.fmt}, the checkpoint's format, or none",
            found=f"--quant {asked}",
            where=f"{where}: already quantized ({stored.method})",
            do="omit --quant to keep the checkpoint's format; --quant none dequantizes it; for "
            "another format, pass the model before quantization",
        )
    return stored.fmt


def declared(config: Mapping[str, Any]) -> Any:
    """What a config.json says about quantization; nothing for a dense model.

    Older versions of mlx-lm wrote it under a name of their own.
    """
    of_mlx = config.get(KEYS[1])
    is_there = isinstance(of_mlx, Mapping) and "bits" in of_mlx
    return config.get(KEYS[0]) or (of_mlx if is_there else None)


def parse(raw: Any, where: str) -> Quantization | None:
    """Quantization from config.json's `quantization_config`.

    None for weights of 8 bits with scales, which are read as dense ones (checkpoints/scaled.py).
    Reads only the keys that say what the codes mean; the others say how the codes were computed or
    which dtype to compute in. Raises: UserError with everything that is not implemented.
    """
    if not isinstance(raw, Mapping):
        raise errors.UserError(
            expected="an object",
            found=config_values.shown(raw),
            where=f"{where}: quantization_config",
        )
    method = raw.get("quant_method")
    if method is None and (raw.get("load_in_4bit") or raw.get("load_in_8bit")):
        method = "bitsandbytes"  # old files do not name it
    if method is None and {"bits", "group_size"} <= raw.keys():
        method = "mlx"  # which never names itself
    if not isinstance(method, str) or method not in _READERS:
        raise errors.UserError(
            expected=f"a checkpoint that is dense or quantized by {', '.join(_READERS)}",
            found=f"quant_method {config_values.shown(method)}",
            where=where,
            do="pass the model before quantization: --quant rounds it while it loads",
        )
    found, problems = _READERS[method](raw)
    if problems:
        raise errors.UserError(
            expected=f"a quantized checkpoint as lora_jax reads it ({method})",
            found=problems,
            where=f"{where}: quantization_config",
            do="pass the model before quantization: --quant rounds it while it loads",
        )
    return found


def _bitsandbytes(raw: Mapping[str, Any]) -> tuple[Quantization | None, list[str]]:
    kind = raw.get("bnb_4bit_quant_type", "fp4")
    problems = []
    if raw.get("load_in_8bit") or raw.get("_load_in_8bit"):
        return None, []  # LLM.int8()
    if not (raw.get("load_in_4bit") or raw.get("_load_in_4bit")):
        problems.append("neither load_in_4bit nor load_in_8bit")
    if kind not in ("nf4", "fp4"):
        problems.append(f"bnb_4bit_quant_type {kind!r} is not implemented (nf4, fp4 are)")
    nested = "-dq" if raw.get("bnb_4bit_use_double_quant") else ""
    dense = _names(raw, "llm_int8_skip_modules", problems)
    return Quantization("bitsandbytes", f"{kind}{nested}", dense=dense), problems


def _gptq(raw: Mapping[str, Any]) -> tuple[Quantization, list[str]]:
    layout = raw.get("checkpoint_format") or raw.get("format") or "gptq"
    group, problems = _four_bits(raw.get("bits"), raw.get("group_size"))
    if layout not in ("gptq", "gptq_v2") or raw.get("is_marlin_format"):
        name = "marlin" if raw.get("is_marlin_format") else layout
        problems.append(f"checkpoint_format {name!r} is not implemented (gptq, gptq_v2 are)")
    if raw.get("pack_dtype", "int32") != "int32":
        problems.append(f"pack_dtype {raw['pack_dtype']!r} is not implemented (int32 is)")
    if raw.get("dynamic"):
        problems.append("dynamic, different settings for some modules, is not implemented")
    key = "modules_in_block_to_quantize"
    only = None if raw.get(key) is None else _names(raw, key, problems)
    return Quantization(
        "gptq",
        "int4",
        group=group,
        zero_points=not raw.get("sym", True),
        zero_offset=1 if layout == "gptq" else 0,
        act_order=bool(raw.get("desc_act")),
        only=only,
    ), problems


def _awq(raw: Mapping[str, Any]) -> tuple[Quantization, list[str]]:
    bits, group = (raw.get(key, raw.get(older)) for key, older in
                   (("bits", "w_bit"), ("group_size", "q_group_size")))  # fmt: skip
    version = str(raw.get("version") or raw.get("format") or "gemm").lower()
    group, problems = _four_bits(bits, group)
    if version != "gemm":
        problems.append(f"version {version!r} is not implemented (gemm is)")
    dense = _names(raw, "modules_to_not_convert", problems)
    return Quantization("awq", "int4", group=group, zero_points=True, dense=dense), problems


def _of_8_bits(raw: Mapping[str, Any]) -> tuple[None, list[str]]:
    """FineGrainedFP8Config and FbgemmFp8Config of transformers. Their tensors say the rest."""
    return None, []


_SCALED = ("float-quantized", "int-quantized", "naive-quantized")


def _compressed_tensors(raw: Mapping[str, Any]) -> tuple[Quantization | None, list[str]]:
    """Layouts of compressed-tensors: codes of 8 bits, or of 4 or 8 bits packed into words."""
    schemes = raw.get("config_groups")
    schemes = [*schemes.values()] if isinstance(schemes, Mapping) else []
    schemes = [each for each in schemes if isinstance(each, Mapping)]
    layouts = {each.get("format") or raw.get("format") for each in schemes}
    weights = [each.get("weights") for each in schemes]
    problems = [
        f"{key}, which changes what is computed, is not implemented"
        for key in ("transform_config", "sparsity_config")
        if raw.get(key) and raw[key] != {"format": "dense"}
    ]
    if raw.get("format") == "dense" or (layouts and layouts <= {*_SCALED}):
        return None, problems
    if layouts != {"pack-quantized"} or not all(isinstance(each, Mapping) for each in weights):
        shown = ", ".join(sorted(map(str, layouts))) or config_values.shown(raw.get("format"))
        problems.append(
            f"format {shown} is not implemented ({', '.join((*_SCALED, 'pack-quantized'))} are)"
        )
        return None, problems
    keys = ("num_bits", "type", "strategy", "group_size", "symmetric", "actorder")
    settings = {tuple(each.get(key) for key in keys) for each in weights}
    if len(settings) > 1:
        problems.append("config_groups with different settings are not implemented")
    num_bits, kind, strategy, group, symmetric, act_order = settings.pop()
    if kind not in ("int", None):
        problems.append(f"type {kind!r} is not implemented (int is)")
    if strategy not in ("group", "channel"):
        problems.append(f"strategy {strategy!r} is not implemented (group, channel are)")
    group, others = _group(group if strategy == "group" else -1)
    if num_bits not in (4, 8):
        problems.append(f"{config_values.shown(num_bits)} bits are not implemented (4 and 8 are)")
    dense = _names(raw, "ignore", problems)
    for pattern in (name[3:] for name in dense if name.startswith("re:")):
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"ignore has {pattern!r}, no regular expression: {error}")
    return Quantization(
        "compressed-tensors",
        "int4" if num_bits == 4 else "none",
        group=group,
        zero_points=not symmetric,
        act_order=act_order in ("group", "dynamic", True),
        dense=dense,
    ), problems + others


def _mlx(raw: Mapping[str, Any]) -> tuple[Quantization, list[str]]:
    """The shapes of the tensors say the bits of a layer; here are those of most layers.

    A module's name may have settings of its own, or false.
    """
    problems = []
    if raw.get("mode", "affine") != "affine":
        problems.append(f"mode {config_values.shown(raw['mode'])} is not implemented (affine is)")
    group = raw["group_size"]
    if not isinstance(group, int) or group < 8 or group % 8:
        problems.append(f"group_size {config_values.shown(group)} is no multiple of 8")
    fmt = "int4" if raw["bits"] == 4 else "none"
    dense = tuple(
        name
        for name, own in raw.items()
        if own is False or (isinstance(own, Mapping) and own.get("bits") != raw["bits"])
    )
    return Quantization("mlx", fmt, group=group, zero_points=True, dense=dense), problems


def _lora_jax(raw: Mapping[str, Any]) -> tuple[Quantization, list[str]]:
    problems = []
    if raw.get("version") != VERSION:
        problems.append(f"version {raw.get('version')!r} (this lora_jax reads {VERSION})")
    if raw.get("format") not in NATIVE:
        problems.append(f"format {raw.get('format')!r} ({', '.join(NATIVE)} are known)")
    return Quantization("lora_jax", str(raw.get("format"))), problems


def _four_bits(bits: Any, group: Any) -> tuple[int, list[str]]:
    """(group_size, problems)"""
    group, problems = _group(group)
    if bits != 4:
        problems.insert(0, f"{config_values.shown(bits)} bits are not implemented (4 are)")
    return group, problems


def _group(group: Any) -> tuple[int, list[str]]:
    """(group_size, problems)"""
    problems = []
    if not isinstance(group, int) or (group != -1 and (group < 8 or group % 8)):
        shown = config_values.shown(group)
        problems.append(f"group_size {shown} is not implemented (multiples of 8 and -1 are)")
        group = -1
    return group, problems


def _names(raw: Mapping[str, Any], key: str, problems: list[str]) -> tuple[str, ...]:
    """The names in a list of names, or of lists of names."""
    given = raw.get(key) or []
    names: list[Any] = []
    for each in given if isinstance(given, list) else [given]:
        names += each if isinstance(each, list) else [each]
    if all(isinstance(name, str) for name in names):
        return tuple(names)
    problems.append(f"{key} {config_values.shown(given)} is not a list of names")
    return ()


_READERS: dict[str, Callable[[Mapping[str, Any]], tuple[Quantization | None, list[str]]]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "mlx": _mlx,
    "fp8": _of_8_bits,
    "fbgemm_fp8": _of_8_bits,
    "lora_jax": _lora_jax,
}
