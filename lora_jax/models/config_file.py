"""config.json of a model folder, and the files that may stand in for a part of it, as they are."""

import json
import pathlib
from typing import Any

from lora_jax import errors

_QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def read(folder: pathlib.Path) -> dict[str, Any]:
    """config.json as it is. Raises: UserError if it is no JSON object."""
    folder = pathlib.Path(folder)
    if not (folder / "config.json").is_file():
        is_adapter = (folder / "adapter_config.json").exists()
        raise errors.UserError(
            expected="a Hugging Face model folder with config.json",
            found="an adapter's folder" if is_adapter else "no config.json",
            where=str(folder),
            do="pass its base, and the adapter with --adapter, to train it with --init-adapter; or "
            "merge them with lora-jax merge"
            if is_adapter
            else "pass the folder that holds config.json and *.safetensors, or a hub id",
        )
    return _json_object(folder / "config.json")


def read_quantization(folder: pathlib.Path) -> dict[str, Any] | None:
    """`quantization_config` in the file beside config.json that AutoGPTQ and AutoAWQ wrote."""
    for name, method in _QUANTIZATION_FILES.items():
        if (folder / name).is_file():
            return {"quant_method": method, **_json_object(folder / name)}
    return None


def _json_object(path: pathlib.Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, …
        raise errors.UserError(
            expected="JSON", found=str(error), where=str(path), do="download the file again"
        ) from None
    if not isinstance(raw, dict):
        raise errors.UserError(
            expected="a JSON object", found=f"a {type(raw).__name__}", where=str(path),
            do="download the file again",
        )  # fmt: skip
    return raw
