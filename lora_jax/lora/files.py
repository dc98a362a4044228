"""The safetensors file of an adapter: tensors in, tensors out. Imports no jax."""

import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from lora_jax import errors, hub

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_WIDENED = ("F64", "F8_E4M3", "F8_E5M2")


def read(folder: pathlib.Path, file: str) -> dict[str, np.ndarray]:
    """{name: array}; float8 and float64 are read as float32.

    Raises: UserError if the file is missing or damaged, or has tensors that are not finite or of
    another dtype, with a list of them.
    """
    path = folder / file
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise errors.UserError(
            expected=file,
            found="only adapter_model.bin, a pickle, which can run code and is not read"
            if pickled
            else "no weights",
            where=str(folder),
            do="save the adapter with PEFT's save_pretrained(…, safe_serialization=True)",
        )
    hub.refuse_lfs_pointer(path)
    try:
        stored = safetensors.deserialize(path.read_bytes())
    except (safetensors.SafetensorError, OSError) as error:
        raise errors.UserError(
            expected="a complete safetensors file",
            found=str(error),
            where=str(path),
            do="copy or download it again",
        ) from None
    problems = [f"{name} has dtype {each['dtype']}" for name, each in stored
                if each["dtype"] not in _DTYPES]  # fmt: skip
    found = {name: _array(each) for name, each in stored if each["dtype"] in _DTYPES}
    problems += [f"{name} has NaN or infinity" for name, array in found.items()
                 if not np.isfinite(array).all()]  # fmt: skip
    if problems:
        raise errors.UserError(
            expected=f"finite tensors in {', '.join(_DTYPES)}",
            found=problems,
            where=str(path),
            do="take an earlier checkpoint of the adapter",
        )
    return found


def write(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the tensors in their own dtypes, with the mode that the umask gives a new file."""
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors replaces it by a temporary file, which only its owner reads


def _array(stored: Mapping) -> np.ndarray:
    array = np.frombuffer(stored["data"], _DTYPES[stored["dtype"]]).reshape(stored["shape"])
    return array.astype(np.float32) if stored["dtype"] in _WIDENED else array
