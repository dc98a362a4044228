"""How long the check of a job's kernels takes to compile, without the devices.

python benchmarks/proof.py              all TARGETS, each in its own process → benchmarks/proof.md
python benchmarks/proof.py TARGET       one → lines of JSON

Needs pip install "lora-jax[train,aot]".
"""

import functools
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import architectures
import jax
import memory
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips, programs
from lora_jax.planning import job as jobs
from lora_jax.selftest import case, of_model

TARGETS = ("tpu:v5e", "tpu:v6e", "gpu:a100", "gpu:h100")
MODEL, ROWS, TOKENS = "Llama-2-7B", 4, 2048
STEP = "the step of training"

INTRODUCTION = f"""\
# Compiling the check of a job's kernels

`python benchmarks/proof.py`: a job that trains {MODEL} in int4, rank 8 on q and v, micro-batches
of {ROWS} × {TOKENS} packed tokens, full remat. At its start on an accelerator, it compiles its
cases at the same time, on as many cores as the host has, and runs each twice. Passes are
remembered. Seconds are those that cores compute for a case, compiled alone, here without the
devices; a core of another machine may be twice as fast. With enough cores, the longest is what a
user waits for. The last column is the job's own step, which is compiled after the check.

| target | cases | all | the longest | {STEP} |
|---|---|---|---|---|
"""


class Compiled(NamedTuple):
    target: str
    what: str
    seconds: float


def measure(target: str) -> Iterator[Compiled]:
    """What each case takes to compile, and the job's own step."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, chips.devices(target))
    architecture = memory.architecture(*architectures.MODELS[MODEL])
    job = jobs.Job(architecture, remat="full", batch_size=ROWS, seq_len=TOKENS)
    with jax.set_mesh(mesh):
        for one in cases(job, mesh):
            program = case.start(one)
            taken = seconds(functools.partial(case.compiled, program))
            yield Compiled(target, f"{one.operation}: {one.shapes}", taken)
    yield Compiled(target, STEP, seconds(programs.train_step(job, mesh).lower(mesh).compile))


def cases(job: jobs.Job, mesh: Mesh) -> Sequence[case.Case]:
    """Those of the job, with the shapes of its weights in place of weights."""
    graphdef, trained, frozen, _ = jobs.model_parts(job, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    found = {}

    def shape(array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=whole)

    def collect(trained, frozen):
        model = nnx.merge(graphdef, trained, frozen.base, frozen.dropout_keys)
        for one in of_model.training(model, batch=ROWS, length=TOKENS, packed=True):
            found[one.name] = one._replace(weights=jax.tree.map(shape, one.weights))

    jax.eval_shape(collect, trained, frozen)
    return [*found.values()]


def seconds(compiling: Callable[[], Any]) -> float:
    begun = time.process_time()
    compiling()
    return time.process_time() - begun


def main(argv: Sequence[str]) -> None:
    if argv:
        for each in measure(argv[0]):
            print(json.dumps(each), flush=True)
        return
    rows, longest = [], []
    for target in TARGETS:
        child = subprocess.run(
            [sys.executable, __file__, target], stdout=subprocess.PIPE, text=True, check=True
        )
        found = [Compiled(*json.loads(line)) for line in child.stdout.splitlines()]
        step = next(each.seconds for each in found if each.what == STEP)
        found = [each for each in found if each.what != STEP]
        slow = max(found, key=lambda each: each.seconds)
        rows.append(f"| {target} | {len(found)} | {sum(each.seconds for each in found):.0f} s | "
                    f"{slow.seconds:.0f} s | {step:.0f} s |")  # fmt: skip
        longest.append(f"- {target}: {slow.what}")
    path = pathlib.Path(__file__).with_suffix(".md")
    text = "\n".join([*rows, "", "The longest:", "", *longest])
    path.write_text(INTRODUCTION + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
