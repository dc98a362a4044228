"""The cost of a sweep: a step with 1, 2 and 4 adapters on one base, against separate runs.

python benchmarks/sweep.py [--rounds 9] [--cases demo:16x80,125m:1x64]
JAX_PLATFORMS=cpu python benchmarks/sweep.py --target gpu:h100 --cases Llama-2-7B:1x64

On this machine: medians of steps that take turns. "wide" is a step of one adapter on as many
sequences. Ratios are of seconds and, in parentheses, of this process's CPU seconds, which other
programs disturb less. With --target, nothing runs: the table has the memory that XLA plans for that
device (needs the extra `aot`), and from lora_jax.planning the bytes moved, the operations, and the
least time for them.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time

import architectures
import end_to_end
import jax
import memory
import numpy as np
from flax import nnx

from lora_jax import assets, lora
from lora_jax.checkpoints import loader
from lora_jax.lora import config
from lora_jax.lora.nnx import model_state
from lora_jax.optim import adamw, sweep
from lora_jax.optim import config as optim_config
from lora_jax.optim import loss as train_loss
from lora_jax.optim import step as train_step
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips, operations, programs, resident
from lora_jax.planning import job as jobs

COUNTS = (1, 2, 4)
STEPS = 100  # of the runs that are compared
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def members(count: int) -> list[sweep.Member]:
    rates = (f"{1e-4 * 2**index:g}" for index in range(count))
    settings = config.LoRAConfig()
    return [
        sweep.Member(rate, settings, optim_config.OptimConfig(lr=float(rate))) for rate in rates
    ]


def alone(graphdef: nnx.GraphDef, remat: str):
    """(optimizer, step) of one adapter."""
    how = optim_config.OptimConfig(), STEPS
    optimizer, schedule = adamw.make(*how), adamw.schedule(*how)
    return optimizer, train_step.make_step(graphdef, optimizer, schedule, seed=0, remat=remat)


def beside(graphdef: nnx.GraphDef, count: int, remat: str):
    return sweep.make_step(graphdef, members(count), STEPS, seed=0, remat=remat)


class Timed:
    """A step that can be repeated, and the seconds of its first call, which compiles it."""

    def __init__(
        self, step, state: train_step.State, frozen: model_state.Frozen, rows: int, length: int
    ):
        vocabulary = frozen.base["model"]["embed_tokens"]["embedding"].shape[0]
        ids = np.random.default_rng(0).integers(3, vocabulary, (1, rows, length), np.int32)
        self.step, self.state, self.frozen = step, state, frozen
        self.batch = jax.device_put(train_loss.Batch(ids, ids, np.ones_like(ids)))
        self.seconds: list[tuple[float, float]] = []
        self.run()
        self.first, _ = self.seconds.pop()

    def run(self) -> None:
        start, own = time.perf_counter(), time.process_time()
        self.state, _ = jax.block_until_ready(self.step(self.state, self.frozen, self.batch))
        self.seconds.append((time.perf_counter() - start, time.process_time() - own))

    @property
    def median(self) -> float:
        return statistics.median(wall for wall, _ in self.seconds)

    def over(self, one: "Timed") -> str:
        """The ratio of the steps' times and, in parentheses, of their CPU times."""
        own = [statistics.median(cpu for _, cpu in timed.seconds) for timed in (self, one)]
        return f"{self.median / one.median:.2f} ({own[0] / own[1]:.2f})"


def measure(folder: pathlib.Path, rows: int, length: int, remat: str, rounds: int) -> list[str]:
    """The cells of a row of the table."""
    mesh = sharding.make_mesh(ONE)
    start = time.perf_counter()
    model = loader.load(folder, dtype="bfloat16", quantization="int4", mesh=mesh)
    lora.inject(model, config.LoRAConfig(), rngs=nnx.Rngs(0))
    graphdef, *parts = model_state.split(model)
    trained, frozen = jax.block_until_ready(sharding.place(parts, mesh))
    load = time.perf_counter() - start
    swept, wide = {}, {}
    for count in COUNTS:
        optimizer, step = alone(graphdef, remat)
        state = train_step.start(jax.tree.map(jax.numpy.copy, trained), optimizer)
        wide[count] = Timed(step, state, frozen, count * rows, length)
        if count > 1:
            joined, all_frozen = sweep.join([(trained, frozen)] * count)
            state = sweep.start(members(count), joined, STEPS)
            swept[count] = Timed(beside(graphdef, count, remat), state, all_frozen, rows, length)
    for _ in range(rounds):
        for timed in (*wide.values(), *swept.values()):
            timed.run()
    one = wide[1]
    cells = [f"{1000 * one.median:.0f}", f"{load:.1f} + {one.first:.1f}"]
    for count, timed in swept.items():
        runs = count * (load + one.first + STEPS * one.median)
        together = load + timed.first + STEPS * timed.median
        cells += [f"{1000 * timed.median:.0f}", timed.over(one), wide[count].over(one)]
        cells.append(f"{together / runs:.2f}")
    return cells


def planned(name: str, rows: int, length: int, remat: str, target: str) -> list[str]:
    """The cells of a row of the table of a target."""
    mesh = sharding.make_mesh(ONE, chips.devices(target))
    job = jobs.Job(memory.architecture(*architectures.MODELS[name]), remat=remat, batch_size=rows,
                    seq_len=length)  # fmt: skip
    cells, device = [], chips.parse(target)
    with jax.set_mesh(mesh):
        graphdef, *parts, _ = jobs.model_parts(job, mesh)
    row = jax.ShapeDtypeStruct((1, rows, length), np.int32, sharding=sharding.batch(mesh))
    for count in COUNTS:
        together = members(count)

        def begin(trained, frozen, together=together):
            joined, frozen = sweep.join([(trained, frozen)] * len(together))
            return sweep.start(together, joined, STEPS), frozen

        with jax.set_mesh(mesh):
            given = jobs.shapes(jax.eval_shape(begin, *parts), mesh)
        batch = train_loss.Batch(row, row, row)
        program = programs.Program(beside(graphdef, count, remat), (*given, batch))
        memory_of = program.lower(mesh).compile().memory_analysis()
        wide = dataclasses.replace(job, batch_size=count * rows)
        there = resident.resident(wide, ONE, device.chip)
        moved = operations.bytes_moved(wide, ONE, there, device.platform)
        flops = operations.operations(wide).total
        floor = operations.floor(flops, moved, {}, device).seconds
        cells += [f"{memory_of.peak_memory_in_bytes / 1e9:.2f}", f"{moved / 1e9:.1f}",
                  f"{flops / 1e12:.2f}", f"{1000 * floor:.0f}"]  # fmt: skip
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", default="demo:16x80,demo:4x80,125m:1x64,125m:4x128")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--target")
    asked = parser.parse_args()
    heads = ["case", "one run, ms", "load + first step, s"]
    for count in COUNTS[1:]:
        heads += [f"{count}: ms", "× one", "wide, × one", f"/ {count} runs of {STEPS} steps"]
    if asked.target:
        heads = ["case"]
        for count in COUNTS:
            heads += [f"{count}: GB", "moved, GB", "TFLOP", "at least, ms"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for case in asked.cases.split(","):
        name, shape = case.split(":")
        rows, length = map(int, shape.split("x"))
        if asked.target:
            cells = planned(name, rows, length, asked.remat, asked.target)
        elif name == "demo":
            cells = measure(assets.FOLDER, rows, length, asked.remat, asked.rounds)
        else:
            with tempfile.TemporaryDirectory() as folder:
                end_to_end.write_model(pathlib.Path(folder), name, "bfloat16")
                cells = measure(pathlib.Path(folder), rows, length, asked.remat, asked.rounds)
        print("| " + " | ".join([case, *cells]) + " |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
