"""The tensors of PEFT's adapter_model.safetensors: their names, dtypes and layouts."""

import collections
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax import errors
from lora_jax.lora import adapter as lora_adapter
from lora_jax.models import names

PREFIX = "base_model.model."
_NAME = r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"  # the adapter's name in a key
_FACTOR = re.compile(
    rf"(?P<path>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector){_NAME}(?:\.weight)?"
)
_BIAS_OF_B = re.compile(rf"(?P<path>.+)\.lora_B{_NAME}\.bias")
_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save(?:\.(?P<adapter>[^.]+))?\.(?P<leaf>.+)")
_ROWS = re.compile(
    r"(?P<path>.+\.token_adapter)\.(?P<leaf>trainable_tokens_delta)(?:\.(?P<adapter>[^.]+))?"
)
# The base weight of an embedding with an adapter, and of one with trained tokens.
_BASE, _OF_TOKENS = ".base_layer.weight", ".token_adapter.base_layer.weight"
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
_KEPT = ("float32", "float16", "bfloat16")  # dtypes that a model has; others become float32


def decode(stored: list[tuple[str, Mapping[str, Any]]], where: str) -> dict[str, np.ndarray]:
    """{name: array} of what safetensors.deserialize returns, in float32, float16 or bfloat16.

    Raises: UserError that names the tensors that are no floats, and those that hold NaN or
    infinity.
    """
    arrays, problems = {}, []
    for name, each in stored:
        if each["dtype"] not in _DTYPES:
            problems.append(f"{name} has dtype {each['dtype']}")
            continue
        array = np.frombuffer(each["data"], _DTYPES[each["dtype"]]).reshape(each["shape"])
        array = array if array.dtype.name in _KEPT else array.astype(np.float32)
        if not np.isfinite(array).all():
            problems.append(f"{name} has NaN or infinity")
        arrays[name] = array
    if problems:
        raise errors.UserError(
            expected="tensors of finite floats",
            found=problems,
            where=where,
            do="take an earlier checkpoint of the adapter, from before its training diverged",
        )
    return arrays


def parse(
    arrays: Mapping[str, np.ndarray], where: str
) -> tuple[dict[str, lora_adapter.Factors], dict[str, np.ndarray]]:
    """(factors by layer, saved) of the tensors of a file; see Adapter.

    Names may have any adapter's name in them. Raises: UserError that lists the tensors that are of
    an unknown kind, of another shape than any layer's, of several adapters, or twice there
    with different values.
    """
    parts: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    saved: dict[str, np.ndarray] = {}
    first: dict[tuple[str, str], str] = {}  # the name in the file of each tensor
    of_adapters, problems = set(), []
    for name, array in arrays.items():
        own = names.of_adapter(name)
        if ".original_module." in own:  # the base's own values, beside the trained copy
            continue
        own = own.replace(_OF_TOKENS, _BASE)
        if match := _FACTOR.fullmatch(own) or _BIAS_OF_B.fullmatch(own):
            of_adapters.add(match["adapter"])
            path, into = match["path"], parts[match["path"]]
            key = "lora_B.bias" if match.re is _BIAS_OF_B else match["part"]
        elif "lora_" in own:
            problems.append(f"{own}, of an unknown kind")
            continue
        else:
            match = _SAVED.fullmatch(own) or _ROWS.fullmatch(own)
            of_adapters |= {match["adapter"]} if match else set()
            path, into, key = "", saved, f"{match['path']}.{match['leaf']}" if match else own
        earlier = first.setdefault((path, key), name)
        if earlier != name and not np.array_equal(into[key], array):  # PEFT saves some twice
            problems.append(" and ".join(sorted((earlier, name))) + " differ")
        into[key] = array
    if len(several := sorted(of_adapters - {None})) > 1:
        problems.append(f"{len(several)} adapters: {', '.join(several)}")
    for path, found in parts.items():
        problems += _misshapen(path, found)
    if problems:
        raise errors.UserError(
            expected="tensors lora_A, lora_B, lora_B.bias, lora_embedding_A, lora_embedding_B, "
            "lora_magnitude_vector, or of fully trained modules, of one adapter",
            found=problems,
            where=where,
            do="use PEFT to merge this adapter into its base, and load the merged model",
        )
    return {path: _factors(found) for path, found in parts.items()}, saved


def _misshapen(path: str, parts: Mapping[str, np.ndarray]) -> Iterator[str]:
    for name, array in parts.items():
        axes = range(1, 6) if "magnitude" in name else (2,) if "embedding" in name else range(2, 6)
        axes = (1,) if name == "lora_B.bias" else axes
        wide = name == "lora_B" and any(size != 1 for size in array.shape[2:])
        if array.ndim not in axes or wide or not array.size:
            yield f"{path}.{name} has shape {array.shape}"
    if len({"embedding" in name for name in parts if "magnitude" not in name}) > 1:
        yield f"{path} has A or B of an embedding and of another layer"


def _factors(parts: Mapping[str, np.ndarray]) -> lora_adapter.Factors:
    """The inverse of `tensors`."""
    kind = "embedding" if any("embedding" in name for name in parts) else "linear"
    A, B = (parts.get(f"lora_embedding_{x}", parts.get(f"lora_{x}")) for x in "AB")
    magnitude, window = parts.get("lora_magnitude_vector"), ()
    if A is not None and A.ndim > 2:
        kind, window = "conv", A.shape[2:]
        A = np.moveaxis(A, 1, -1).reshape(len(A), -1)
    if B is not None:
        B = B.reshape(B.shape[:2])
    A, B = (None if part is None else part.astype(np.float32).T for part in (A, B))
    if magnitude is not None:
        magnitude = magnitude.astype(np.float32).reshape(-1)
    if (bias := parts.get("lora_B.bias")) is not None:
        bias = bias.astype(np.float32)
    return lora_adapter.Factors(A, B, magnitude, kind, window, bias)


def tensors(adapter: lora_adapter.Adapter) -> dict[str, np.ndarray]:
    """{name in the file: array} of an adapter."""
    found = {}
    for name, array in adapter.saved.items():
        path = name.removesuffix(_BASE)
        if path != name and path not in adapter.factors:  # it is in an embedding's token_adapter
            name = f"{path}{_OF_TOKENS}"
        found[f"{PREFIX}{name}"] = array
    for path, own in adapter.factors.items():
        found |= {f"{PREFIX}{path}.{end}": array for end, array in _of_layer(own).items()}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def _of_layer(own: lora_adapter.Factors) -> dict[str, np.ndarray]:
    """{end of the name in the file: array} of a layer's tensors."""
    A, B, magnitude = own.A.T, own.B.T, own.magnitude
    if own.kind == "conv":
        ones = (1,) * len(own.window)
        A = np.moveaxis(A.reshape(len(A), *own.window, -1), -1, 1)
        B = B.reshape(*B.shape, *ones)
        magnitude = None if magnitude is None else magnitude.reshape(1, -1, *ones)
    if own.kind == "embedding":
        found = {"lora_embedding_A": A, "lora_embedding_B": B}
    else:
        found = {"lora_A.weight": A, "lora_B.weight": B}
    more = {"lora_B.bias": own.bias, "lora_magnitude_vector": magnitude}
    return found | {name: array for name, array in more.items() if array is not None}
