"""Weights that are NaN or infinite: found as their bytes pass, and named."""

import math
import typing

import jax.numpy as jnp
import numpy as np

from lora_jax import errors

if typing.TYPE_CHECKING:
    from lora_jax.checkpoints.safetensors_files import StoredTensor

_CHUNK = 2**18  # values that are looked at together, within a core's cache


def check(array: np.ndarray, stored: "StoredTensor") -> np.ndarray:
    """The array, which is a stored tensor or a part of it.

    Raises: UserError if a value is NaN or infinite. It says how many are in the whole tensor.
    """
    if not count(array):
        return array
    number, size = count(stored.value()), math.prod(stored.shape)
    are = "is" if number == 1 else "are"
    raise errors.UserError(
        expected="finite weights",
        found=f"{number} of {size} values in {stored.key or stored.name} {are} NaN or infinite",
        where=str(stored.path),
        do="copy the file again; if it is as published, take another revision or an earlier "
        "checkpoint",
    )


def count(array: np.ndarray) -> int:
    """How many values of an array are NaN or infinite; 0 for integers.

    In numpy's isfinite, dtypes that are not its own take ten times as long.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return 0
    word = np.dtype(f"u{array.dtype.itemsize}")
    infinity = np.full((), np.inf, array.dtype).view(word)
    magnitude = word.type((1 << (8 * word.itemsize - 1)) - 1)  # all bits but the sign's
    bits = np.ascontiguousarray(array).reshape(-1).view(word)
    chunks = (bits[start : start + _CHUNK] for start in range(0, bits.size, _CHUNK))
    return sum(int(np.count_nonzero((chunk & magnitude) >= infinity)) for chunk in chunks)
