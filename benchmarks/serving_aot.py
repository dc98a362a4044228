"""The decode step of the engine, compiled for devices that this machine lacks: what it moves.

python benchmarks/serving_aot.py                 all RUNS and MESHES → benchmarks/serving_aot.md
python benchmarks/serving_aot.py TARGET SLOTS    one run → one line of JSON

Needs pip install "lora-jax[train,aot]". Llama-3.1-8B in int4 with a bank of 8 adapters of rank 16
on all linear layers; requests of 512 tokens. Nothing runs.
"""

import functools
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import aot
import architectures
import jax
import memory
import traffic

from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips, hlo, programs, serving, serving_memory

LIVE = 512
KEPT = 0.5  # of the L2 cache: the rest holds what kernels stream through it
TARGETS = (aot.H100, aot.A100, aot.L4, aot.V5E, aot.V6E)
RUNS = [(target, slots) for target in TARGETS for slots in (1, 8, 64)]
ONE = dict.fromkeys(sharding.AXES, 1)
EIGHT = "gpu:h100-8"
MESHES = [  # of EIGHT, with slots
    ({"data": 1, "fsdp": 1, "tensor": 8}, 8),
    ({"data": 1, "fsdp": 1, "tensor": 8}, 64),
    ({"data": 1, "fsdp": 8, "tensor": 1}, 8),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 8),
]


def job_of(target: str, slots: int) -> serving.Serving:
    """The cache has twice the places that are read, where that fits."""
    architecture = memory.architecture(*architectures.MODELS["Llama-3.1-8B"])
    context = LIVE if (target, slots) == (aot.V5E, 64) else 2 * LIVE
    return serving.Serving(architecture, slots=slots, context=context, adapters=8, span=LIVE)


def needed(job: serving.Serving, target: str) -> int:
    """Bytes that a step must read: weights, head, bank, and the live keys and values."""
    known = serving_memory.known(job, ONE, target)
    return known.streamed + 2 * job.architecture.num_hidden_layers * live_keys(job)


def live_keys(job: serving.Serving) -> int:
    """Bytes of a layer's keys in the sequences, and of its values."""
    c = job.architecture
    return 2 * job.slots * job.span * c.num_key_value_heads * c.head_dim


def compile_here(target: str, slots: int, sizes: Mapping[str, int] = ONE) -> dict[str, Any]:
    """Compiles one run in this process, which the compiler may abort. Bytes are those of a device.

    needed and dense are right for one device.
    """
    job = job_of(target, slots)
    c = job.architecture
    mesh = sharding.make_mesh(dict(sizes), chips.devices(target))
    with jax.set_mesh(mesh):
        program = programs.decode(job, mesh)
    compiled = program.lower(mesh).compile()
    uses, text = compiled.memory_analysis(), compiled.as_text()
    steps = hlo.parse(text)
    keys = program.arguments[1].cache.k
    shape = keys.sharding.shard_shape(keys.shape)
    live = live_keys(job) * math.prod(shape) // math.prod(keys.shape)
    moved = functools.partial(
        traffic.bytes_moved, text, aot.KERNELS, c.num_hidden_layers, {tuple(shape): live}
    )
    entries = c.num_key_value_heads * c.head_dim
    d, f = c.hidden_size, c.intermediate_size
    weights = {(d, d), (d, entries), (d, f), (f, d), (d, d + 2 * entries), (d, 2 * f)}
    return {
        "target": target,
        "slots": slots,
        "needed": needed(job, target),
        "moved": moved(),
        "by_memory": moved(int(KEPT * chips.l2_bytes(target))),
        "exchanged": sum(total["bytes"] for total in hlo.collective_bytes(steps).values()),
        "cache_bytes": 2 * 2 * job.slots * c.num_hidden_layers * job.context * entries,
        "alias_bytes": uses.alias_size_in_bytes,
        "temp_bytes": uses.temp_size_in_bytes,
        "cache_copies": copies(steps, shape),
        "dense": aot.written(steps, weights, dense=True),
    }


def copies(program: Sequence[hlo.Step], shape: Sequence[int]) -> int:
    """How often the program writes an array of these axes, in any order, and not in place."""
    found = 0
    for (result, opcode, text, *_), times, fused in program:
        if fused or opcode not in ("copy", "transpose", "fusion", "convert", "broadcast"):
            continue
        name = text.split("=")[0].replace("_", "-")  # XLA names a fusion after its root
        in_place = "scatter" in name or "dynamic-update-slice" in name
        for _, dims, _ in hlo.arrays(result):
            if sorted(dims) == sorted(shape) and not in_place:
                found += times
    return found


def run(target: str, slots: int, sizes: Mapping[str, int] = ONE) -> dict[str, Any]:
    """The result of compile_here in a separate process, or {"error": …}."""
    here = str(pathlib.Path(__file__).parent)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join([here, *filter(None, sys.path)]),
    }
    call = f"serving_aot.compile_here({target!r}, {slots}, {dict(sizes)!r})"
    code = f"import serving_aot, json; print(json.dumps({call}))"
    try:
        child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                               text=True, timeout=aot.TIME_LIMIT)  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"target": target, "slots": slots, "error": f"no result in {aot.TIME_LIMIT} s"}
    if child.returncode:
        return {"target": target, "slots": slots, "error": child.stderr.strip()[-600:]}
    return json.loads(child.stdout.splitlines()[-1])


INTRODUCTION = """\
# A decode step of the engine, compiled without the devices

`python benchmarks/serving_aot.py`: Llama-3.1-8B in int4, a bank of 8 adapters of rank 16 on all
linear layers, requests of 512 tokens, greedy. needed: weights, scales, head, bank, and the live
keys and values, each read once. moved: what the instructions of the compiled program read and
write, each instruction for itself. by memory: the part of it that main memory moves, if half of a
GPU's L2 cache keeps what was moved last: an array that was written or read within the last 25 MB
(H100), 20 MB (A100) or 24 MB (L4) is not read from main memory again. All that is written counts. A
TPU has no such cache. Of the cache of keys and values, the attention kernel of GPUs counts the live
ones: the lengths, by which its loops end, are no part of the program. Registers that a GPU kernel
spills do not count. temp: memory beside arguments. dense: dense weights that are written. Nothing
ran. Without a device, XLA cannot time its matrix products and compiles all of them with Triton; on
a GPU it may choose other ones, which move other amounts.

The goal is that 85% of what main memory moves is needed. All of them reach it. What a GPU with 64
slots moves beside what is needed is, first, float32 partial sums of int4 products: to keep all
processors busy, the kernels split K where a layer has few columns. An H100 writes 0.6 GB of them in
a step, an A100 0.3 GB and an L4 0.1 GB, at most 8.4 MB at a time, and the next instruction reads
them. The rest is activations that one kernel writes and the next one reads.

| target | slots | needed | moved | by memory | needed / by memory | cache copies | temp | dense |
|---|---|---|---|---|---|---|---|---|
"""
OF_MESHES = """
## Eight H100

exchanged: what a device receives from the others in a step. moved, temp: of one device.

| mesh | slots | exchanged | moved | temp |
|---|---|---|---|---|
"""


def main(argv: Sequence[str]) -> int:
    if argv:
        print(json.dumps(run(argv[0], int(argv[1]))))
        return 0
    lines, failed = [], False
    for each in RUNS:
        result = run(*each)
        if "error" in result:
            failed = True
            cells = [" ".join(result["error"].split())[-160:].replace("|", "/")]
        else:
            dense = ", ".join(f"{n} × {name}" for name, n in result["dense"].items()) or "none"
            gb = [f"{result[name] / 1e9:.2f} GB" for name in ("needed", "moved", "by_memory")]
            cells = [*gb, f"{result['needed'] / result['by_memory']:.0%}",
                     str(result["cache_copies"]),
                     f"{result['temp_bytes'] / 1e6:.0f} MB", dense]  # fmt: skip
        lines.append("| " + " | ".join([each[0], str(each[1]), *cells]) + " |")
    of_meshes = []
    for sizes, slots in MESHES:
        result = run(EIGHT, slots, sizes)
        failed |= "error" in result
        own = [result.get("error", "").strip()[-160:]] if "error" in result else [
            f"{result['exchanged'] / 1e6:.0f} MB", f"{result['moved'] / 1e9:.2f} GB",
            f"{result['temp_bytes'] / 1e6:.0f} MB",
        ]  # fmt: skip
        mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        of_meshes.append("| " + " | ".join([f"`{mesh}`", str(slots), *own]) + " |")
    path = pathlib.Path(__file__).with_suffix(".md")
    text = INTRODUCTION + "\n".join(lines) + "\n" + OF_MESHES + "\n".join(of_meshes) + "\n"
    path.write_text(text, encoding="utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
