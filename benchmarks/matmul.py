"""Times x · W with a quantized W, in each of the platform's implementations, and dense products.

python benchmarks/matmul.py [--models 125M,1B,7B] [--rows 1,8,32,1024] [--patience 30]

W has the shape of the model's up projection. From 256 rows on, the time includes the derivative,
dy · Wᵀ, as in training. Implementations take turns, so that noise affects all of them.
"""

import argparse
import functools
import statistics

import jax
import jax.numpy as jnp
import quiet

from lora_jax.kernels import int4_matmul, int8_matmul, matmul
from lora_jax.quant import formats

SHAPES = {"tiny": (64, 128), "125M": (768, 2048), "1B": (2048, 8192), "7B": (4096, 11008)}
TRAIN_ROWS = 256
FORMS = {  # implementations by platform; None: the one that the package chooses
    "cpu": (None, "xla", "int8_activations"),
    "tpu": (None, "xla", "pallas_tpu"),
    "gpu": (None, "xla", "triton_gpu", "mosaic_gpu"),
}
LEAST_SECONDS = 0.02  # of a timing, which repeats calls that take less


def products(shape: tuple[int, int], rows: int) -> dict:
    """{form: (function of x and the weight, x, weight)}"""
    keys = jax.random.split(jax.random.key(0))
    weight = 0.02 * jax.random.normal(keys[0], shape)
    x = jax.random.normal(keys[1], (rows, shape[0]))
    half = x.astype(jnp.bfloat16)
    found = {
        "dense bfloat16": (matmul.matmul, half, weight.astype(jnp.bfloat16)),
        "dense float32": (matmul.matmul, x, weight),
    }
    for fmt in ("int4", "nf4", "nf4-dq"):
        codes = formats.codes(fmt)
        for implementation in FORMS[jax.default_backend()] if codes == "int4" else (None,):
            how = {"codes": codes, "implementation": implementation}
            function = functools.partial(int4_matmul.int4_matmul, **how)
            name = f"{fmt} {implementation or 'default'}"
            found[name] = function, half, formats.quantize(weight, fmt)

    def int8(x, packed):
        return int8_matmul.int8_matmul(x, packed.q, packed.column_scale)

    return found | {"int8": (int8, half, formats.quantize(weight, "int8"))}


def timed_call(function, x, weight):
    """(a call that takes about LEAST_SECONDS, the number of products in it).

    None if the implementation does not take these shapes.
    """

    def both(x, weight):
        y, vjp = jax.vjp(lambda x: function(x, weight), x)
        return vjp(y)

    compiled = jax.jit(both if len(x) >= TRAIN_ROWS else function)
    try:
        jax.block_until_ready(compiled(x, weight))
    except ValueError:  # the named implementation refuses them
        return None
    once = quiet.Timer(0).time(lambda: jax.block_until_ready(compiled(x, weight)), 1)["s"]
    count = max(1, int(LEAST_SECONDS / once))

    def call():
        jax.block_until_ready([compiled(x, weight) for _ in range(count)])

    return call, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="125M,1B,7B")
    parser.add_argument("--rows", default="1,8,32,1024")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--patience", type=float, default=30, help="seconds to wait for quiet")
    args = parser.parse_args()
    timer = quiet.Timer(args.patience)
    print("| model | rows | form | ms | × dense bfloat16 |\n|---|---|---|---|---|")
    for model in args.models.split(","):
        for rows in map(int, args.rows.split(",")):
            calls = {
                name: timed
                for name, product in products(SHAPES[model], rows).items()
                if (timed := timed_call(*product))
            }
            seconds = {name: [] for name in calls}
            for _ in range(args.rounds):
                for name, (call, count) in calls.items():
                    seconds[name].append(timer.time(call, 1)["s"] / count)
            dense = statistics.median(seconds["dense bfloat16"])
            for name, values in seconds.items():
                value = statistics.median(values)
                cells = (model, rows, name, f"{value * 1e3:.2f}", f"{value / dense:.2f}")
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
