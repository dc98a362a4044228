"""What config.json says of a checkpoint that is quantized already. Imports no jax."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax import errors

NATIVE = ("int8", "int4", "int4-g64", "int4-g128")  # formats stored in lora_jax's own layout
VERSION = 1  # of that layout


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a checkpoint stores its linear layers, as its `quantization_config` says.

    method: "bitsandbytes", "gptq", "awq" or "lora_jax": whose tensors, by name and layout.
    fmt: the format as --quant calls it. group: rows that share a scale; −1: all of a column.
    zero_points: w = (code − zero) · scale, with zeros other than 8. zero_offset: what is added to
    a zero point as it is stored. act_order: the rows of a group may lie apart.
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
        for name in ("dense", "only"):  # from JSON they come as lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def skips(self, module: str) -> bool:
        """Whether the linear layer at this dotted path is said to be dense."""

        def among(names: tuple[str, ...]) -> bool:
            return any(f".{name}." in f".{module}." for name in names)

        return among(self.dense) or (self.only is not None and not among(self.only))


def choose(asked: str | None, stored: Quantization | None, where: str) -> str:
    """What the weights become in memory, as --quant calls it: what was asked for, if it can be.

    asked: None means as the checkpoint is; "none" makes a quantized one dense. stored: None is a
    dense checkpoint. Raises: UserError for another format than the checkpoint's.
    """
    if stored is None:
        return asked or "none"
    if asked is None or asked == "none":
        return asked or stored.fmt
    if asked not in (stored.fmt, stored.fmt.removesuffix("-dq")):
        raise errors.UserError(
            expected=f"--quant {stored.fmt}, which the checkpoint is in, or none",
            found=f"--quant {asked}",
            where=f"{where}: quantized already ({stored.method})",
            do="leave --quant out to use it as it is; --quant none dequantizes it; for another "
            "format take the model before it was quantized",
        )
    return stored.fmt


def parse(raw: Mapping[str, Any], where: str) -> Quantization:
    """Quantization from config.json's `quantization_config`.

    Read are the keys that say what the codes mean; the others say how they were found, or what to
    compute with. Raises: UserError that names what is not implemented.
    """
    if not isinstance(raw, Mapping):
        raise errors.UserError(
            expected="an object", found=repr(raw), where=f"{where}: quantization_config"
        )
    method = raw.get("quant_method")
    if method is None and (raw.get("load_in_4bit") or raw.get("load_in_8bit")):
        method = "bitsandbytes"  # as before there were others
    if method not in _READERS:
        raise errors.UserError(
            expected=f"a checkpoint that is dense or quantized by {', '.join(_READERS)}",
            found=f"quant_method {method!r}",
            where=where,
            do="take the model before it was quantized: --quant rounds it while it loads",
        )
    found, problems = _READERS[method](raw)
    if problems:
        raise errors.UserError(
            expected=f"a quantized checkpoint as lora_jax reads it ({method})",
            found=problems,
            where=f"{where}: quantization_config",
            do="take the model before it was quantized: --quant rounds it while it loads",
        )
    return found


def _bitsandbytes(raw: Mapping[str, Any]) -> tuple[Quantization, list[str]]:
    kind = raw.get("bnb_4bit_quant_type", "fp4")
    problems = []
    if raw.get("load_in_8bit") or raw.get("_load_in_8bit"):
        problems.append("load_in_8bit, LLM.int8(), is not implemented (load_in_4bit is)")
    elif not (raw.get("load_in_4bit") or raw.get("_load_in_4bit")):
        problems.append("neither load_in_4bit nor load_in_8bit")
    if kind not in ("nf4", "fp4"):
        problems.append(f"bnb_4bit_quant_type {kind!r} is not implemented (nf4, fp4 are)")
    nested = "-dq" if raw.get("bnb_4bit_use_double_quant") else ""
    dense = tuple(raw.get("llm_int8_skip_modules") or ())
    return Quantization("bitsandbytes", f"{kind}{nested}", dense=dense), problems


def _gptq(raw: Mapping[str, Any]) -> tuple[Quantization, list[str]]:
    layout = raw.get("checkpoint_format") or raw.get("format") or "gptq"
    problems = _four_bits(raw.get("bits"), raw.get("group_size"))
    if layout not in ("gptq", "gptq_v2") or raw.get("is_marlin_format"):
        name = "marlin" if raw.get("is_marlin_format") else layout
        problems.append(f"checkpoint_format {name!r} is not implemented (gptq, gptq_v2 are)")
    if raw.get("pack_dtype", "int32") != "int32":
        problems.append(f"pack_dtype {raw['pack_dtype']!r} is not implemented (int32 is)")
    if raw.get("dynamic"):
        problems.append("dynamic, with settings of its own for some modules, is not implemented")
    only = raw.get("modules_in_block_to_quantize")
    return Quantization(
        "gptq",
        "int4",
        group=raw.get("group_size"),
        zero_points=not raw.get("sym", True),
        zero_offset=1 if layout == "gptq" else 0,
        act_order=bool(raw.get("desc_act")),
        only=None if only is None else tuple(name for names in only for name in _as_list(names)),
    ), problems


def _awq(raw: Mapping[str, Any]) -> tuple[Quantization, list[str]]:
    bits, group = (raw.get(key, raw.get(older)) for key, older in
                   (("bits", "w_bit"), ("group_size", "q_group_size")))  # fmt: skip
    version = str(raw.get("version") or raw.get("format") or "gemm").lower()
    problems = _four_bits(bits, group)
    if version != "gemm":
        problems.append(f"version {version!r} is not implemented (gemm is)")
    dense = tuple(raw.get("modules_to_not_convert") or ())
    return Quantization("awq", "int4", group=group, zero_points=True, dense=dense), problems


def _lora_jax(raw: Mapping[str, Any]) -> tuple[Quantization, list[str]]:
    problems = []
    if raw.get("version") != VERSION:
        problems.append(f"version {raw.get('version')!r} (this lora_jax reads {VERSION})")
    if raw.get("format") not in NATIVE:
        problems.append(f"format {raw.get('format')!r} ({', '.join(NATIVE)} are known)")
    return Quantization("lora_jax", str(raw.get("format"))), problems


def _four_bits(bits: Any, group: Any) -> list[str]:
    problems = [] if bits == 4 else [f"{bits} bits are not implemented (4 are)"]
    if not isinstance(group, int) or (group != -1 and (group < 8 or group % 8)):
        problems.append(f"group_size {group!r} is not implemented (multiples of 8 and -1 are)")
    return problems


def _as_list(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


_READERS: dict[str, Callable[[Mapping[str, Any]], tuple[Quantization, list[str]]]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "lora_jax": _lora_jax,
}
