"""Times the implementations of the 4-bit product on this machine's first device.

Every result is compared with that of the dequantized weight before it is timed.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import device_cases
import device_record
import jax
import jax.numpy as jnp
import numpy as np
import random_model

from lora_jax.generation import weights as decode_weights
from lora_jax.kernels import int4_matmul
from lora_jax.kernels import packed as packing
from lora_jax.kernels.int4_matmul import mosaic_gpu, triton_gpu, xla, xla_gpu
from lora_jax.quant import formats

TOLERANCE = 1e-2  # for ‖error‖ / ‖result‖; one rounding to bfloat16 costs 2e-3
DECODE_ROWS = 64  # the most rows for which reading the weight takes longer than the product
BF16 = jnp.bfloat16


def times(call: Callable[[], Any]) -> list[float]:
    """Seconds of one call in each of three timings, which are long enough to be exact.

    call returns when the device has finished.
    """
    least = 0.01 if jax.devices()[0].platform == "cpu" else 0.3
    found, repeat = [], 1
    while len(found) < 3:
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        taken = time.perf_counter() - start
        if taken >= least:
            found.append(taken / repeat)
        else:
            repeat = max(repeat + 1, int(repeat * min(10, 1.2 * least / taken)))
    return found


def seconds(function: Callable, *arguments: Any) -> float:
    """The least seconds of a jitted function's call."""
    call = functools.partial(function, *arguments)
    jax.block_until_ready(call())  # compiles
    return min(times(lambda: jax.block_until_ready(call())))


def forms(quant: str, packed: packing.Packed, rows: int, is_hopper: bool) -> dict[str, Callable]:
    """{name: (x, packed, words with K minor, layer) → y} of the implementations that take it."""
    codes = formats.codes(quant)
    _, groups, n = packed.scale.shape
    k = 8 * packed.q.shape[1]
    found = {
        "public": lambda x, p, _, i: int4_matmul.int4_matmul(x, p, codes=codes, layer=i),
        "dequantize, dot": lambda x, p, _, i: xla.matmul(x, packing.layer(p, i), codes=codes),
    }
    if rows <= xla_gpu.MOST_ROWS[codes]:
        found["sums"] = lambda x, p, _, i: xla_gpu.matvec(x, packing.layer(p, i), codes)
    shape = rows, k, n, k // groups, BF16, packed.scale.dtype
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and codes == "int4" and not triton_gpu.refusal(*shape):
        found["triton"] = lambda x, p, _, i: triton_gpu.matmul(x, p, i)
    if is_hopper and codes == "int4" and not mosaic_gpu.refusal(*shape):
        found["mosaic"] = lambda x, p, words, i: mosaic_gpu.matmul(
            x, words, p.scale, p.column_scale, i
        )
    return found


def measure(case: device_cases.Matmul) -> dict[str, Any]:
    """Each program multiplies with all its weights, to time the device and not the dispatch."""
    is_hopper = decode_weights.best(jax.devices()[0]) == "k_minor"
    found, wrong = [], []
    for rows in case.rows:
        # For many rows the product takes longer than reading any weight.
        count = max(2, int(case.weights / (case.k * case.n / 2))) if rows <= DECODE_ROWS else 2
        packed = random_model.stack(case.quant, count, case.k, case.n)
        words = jax.jit(mosaic_gpu.k_minor)(packed.q) if is_hopper else None
        layers = list(jnp.arange(count))
        x = jax.random.normal(jax.random.key(0), (rows, case.k), BF16)
        shape = 2 + count // 4, case.k, case.n
        dense = list(0.02 * jax.random.normal(jax.random.key(1), shape, BF16))
        taken = seconds(jax.jit(lambda x, weights: [x @ w for w in weights]), x, dense)
        found.append({"rows": rows, "form": "dense bfloat16", "seconds": taken / len(dense)})
        checked = min(rows, DECODE_ROWS)
        weight = packing.dequantize(packing.layer(packed, 1), formats.codes(case.quant))
        expected = np.asarray(x[:checked], np.float64) @ np.asarray(weight, np.float64)
        for name, form in forms(case.quant, packed, rows, is_hopper).items():
            once = jax.jit(form)  # lowered once for all layers
            program = jax.jit(lambda *a, once=once: [once(*a[:-1], i) for i in a[-1]])
            try:
                y = np.asarray(program(x, packed, words, layers)[1][:checked], np.float64)
                error = float(np.linalg.norm(y - expected) / np.linalg.norm(expected))
                taken = seconds(program, x, packed, words, layers) / count
            except Exception as failure:  # other implementations may still work
                wrong.append(f"{name}, {rows} rows: {' '.join(str(failure).split())[:200]}")
                continue
            if not error < TOLERANCE:
                wrong.append(f"{name}, {rows} rows: error {error:.1e}")
            found.append({"rows": rows, "form": name, "seconds": taken, "error": error})
    if wrong:
        return {"status": device_record.FAILED, "reason": "; ".join(wrong), "products": found}
    return {"status": device_record.MEASURED, "products": found}
