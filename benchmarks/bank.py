"""What adapters in a batch cost: a decoding step with 8 adapters in 8 rows, and without a bank.

python benchmarks/bank.py [--size 125m] [--quant int4] [--dtype bfloat16] [--rounds 15]

The cases take turns, so that the ratio of their medians holds on a machine that others use.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import decoding
import end_to_end
import numpy as np

from lora_jax.checkpoints import loader
from lora_jax.generation import pool as pools
from lora_jax.generation import weights as decode_weights
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config
from lora_jax.lora.nnx import bank
from lora_jax.parallel import mesh as sharding

ROWS, PROMPT, STEPS = 8, 16, 32
CASES = {  # rank and targets of the adapters
    "no bank": None,
    "rank 8 on q, v": (8, ("q_proj", "v_proj")),
    "rank 16 on all linear layers": (16, "all-linear"),
}


def adapters(model, rank, targets, **kind):
    """8 adapters with random A and B on the layers of the bank."""
    settings, rng = (
        lora_config.LoRAConfig(rank=rank, targets=targets, **kind),
        np.random.default_rng(0),
    )

    def draw(*shape):
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    for _ in range(ROWS):
        factors = {
            name: lora_adapter.Factors(
                draw(site.in_features, rank),
                draw(rank, site.out_features),
                1 + draw(site.out_features) if settings.use_dora else None,
            )
            for site in bank.find(model)
            for name in site.names
        }
        yield lora_adapter.Adapter(settings, factors)


def make_steps(folder, how, case):
    """The step of a model whose rows have an adapter each."""
    one = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
    model = loader.load(folder, mesh=one, **how)
    mixture = None
    if case:
        rank, targets = case
        bank.add(model, slots=ROWS, rank=rank, targets=targets)
        pool = pools.Pool(model)
        for number, own in enumerate(adapters(model, rank, targets)):
            pool.load(str(number), own)
        mixture = np.stack([pool.acquire({str(number): 1}).row for number in range(ROWS)])
    graphdef, weights = decoding.split(model)
    form = decode_weights.choose(model, one)
    return decoding.Steps(
        graphdef, weights, form, slots=ROWS, prompt=PROMPT, room=STEPS, mixture=mixture
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="125m", choices=end_to_end.ARCHITECTURES)
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    flags = parser.parse_args()
    how = {"dtype": flags.dtype, "quantization": flags.quant}
    with tempfile.TemporaryDirectory() as folder:
        end_to_end.write_model(pathlib.Path(folder), flags.size, flags.dtype)
        each = {name: make_steps(folder, how, case) for name, case in CASES.items()}
    times = {name: [] for name in CASES}
    for _ in range(flags.rounds):
        for name, steps in each.items():
            start = time.perf_counter()
            steps.run(STEPS)
            times[name].append((time.perf_counter() - start) / STEPS)
    medians = {name: statistics.median(own) for name, own in times.items()}
    print("| 8 rows | ms a step | share of the speed without a bank |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {1000 * median:.1f} | {medians['no bank'] / median:.2f} |")


if __name__ == "__main__":
    main()
