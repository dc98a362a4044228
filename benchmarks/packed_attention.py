"""Compiles attention of packed sequences for GPUs that this machine lacks, form by form.

python benchmarks/packed_attention.py                     all RUNS → benchmarks/packed_attention.md
python benchmarks/packed_attention.py CASE FORM TARGET    one run → one line of JSON

Needs Python 3.12, pip install "lora-jax[train,gpu-kernels]", and jax-cuda13-plugin and
jax-cuda13-pjrt (with --no-deps) of jax's version. Nothing runs: memory, kernels and spilled
registers are those of the compiled program, and the pairs are counted.
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import aot
import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.kernels import attention, platform
from lora_jax.kernels.attention import cudnn, tokamax_gpu
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips, hlo, programs

TIME_LIMIT = 900  # seconds for one run
HEADS, GROUPS, WIDTH = 32, 8, 128  # of Llama-3.1-8B
CAPABILITY = {aot.H100: 9.0, aot.A100: 8.0}
FORMS = {  # name: the module whose kernels are used
    "blocks": None,
    "cuDNN, or blocks if packed": cudnn,
    "tokamax": tokamax_gpu,
}
LAYERS = {f"attention {num}x{length}": (num, length)
          for num, length in ((4, 2048), (1, 8192), (1, 32768))}  # fmt: skip
STEPS = {f"step {name} {num}x{length} {remat}": (name, num, length, remat)
         for name, num, length, remat in (
             ("Llama-2-7B", 4, 2048, "full"), ("Llama-2-7B", 4, 2048, "none"),
             ("Llama-3.1-8B", 4, 2048, "full"), ("Llama-3.1-8B", 1, 32768, "full"))}  # fmt: skip
RUNS = [(case, form, target) for case in (*LAYERS, *STEPS) for target in (aot.H100, aot.A100)
        for form in FORMS if target == aot.H100 or form != "tokamax"]  # fmt: skip


def layer(num: int, length: int, mesh: Mesh) -> programs.Program:
    """Attention and its derivative, without the projections."""
    where = NamedSharding(mesh, PartitionSpec())
    array = functools.partial(jax.ShapeDtypeStruct, sharding=where)
    q = array((num, length, HEADS, WIDTH), jnp.bfloat16)
    k = array((num, length, GROUPS, WIDTH), jnp.bfloat16)

    def both(q, k, v, examples, d_out):
        attend = functools.partial(attention.self_attention, examples=examples)
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(d_out)

    return programs.Program(jax.jit(both), (q, k, k, array((num, length), jnp.int32), q))


def program(case: str, mesh: Mesh) -> programs.Program:
    return layer(*LAYERS[case], mesh) if case in LAYERS else aot.train_step(*STEPS[case], mesh)


@contextlib.contextmanager
def _pretended(form: str, target: str) -> Iterator[None]:
    """Inside, the libraries believe that the target's GPU is there, and `form` is what is used."""
    from tokamax import config
    from tokamax._src import gpu_utils

    capability = CAPABILITY[target]
    platform.compute_capability = lambda: capability
    gpu_utils._compute_capability = lambda device=None: capability
    fused_attention_stablehlo.check_cudnn_version = lambda: 91100
    fused_attention_stablehlo.check_compute_capability = lambda least: capability >= float(least)
    for module in (cudnn, tokamax_gpu):
        if module is not FORMS[form]:
            module.refusal = lambda *_: "not asked for"
    with config.cross_compile(True):
        yield


def compile_here(case: str, form: str, target: str) -> dict[str, Any]:
    """Compiles one case in this process, which the compiler may abort."""
    devices = chips.devices(target)
    mesh = sharding.make_mesh(sharding.parse("data=-1", len(devices)), devices)
    start = time.monotonic()
    with _pretended(form, target), jax.set_mesh(mesh):
        compiled = program(case, mesh).lower(mesh).compile()
    uses = compiled.memory_analysis()
    return {
        "seconds": round(time.monotonic() - start, 1),
        "temp_bytes": uses.temp_size_in_bytes,
        "peak_bytes": uses.peak_memory_in_bytes,
        "kernels": kernels(hlo.parse(compiled.as_text())),
    }


NO_KERNEL = (*aot.NO_RESULT, "constant", "iota", "partition-id", "after-all")


def kernels(steps: Sequence[hlo.Step]) -> int:
    """How many are launched; a loop without a fixed number of iterations counts once, and of a
    choice all branches."""
    return sum(n for (_, opcode, *_), n, fused in steps if not fused and opcode not in NO_KERNEL)


def run(case: str, form: str, target: str) -> dict[str, Any]:
    """The result of compile_here in a separate process, or {"error": …}."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path]),
    }
    code = (
        "import json, packed_attention as p; "
        f"print(json.dumps(p.compile_here({case!r}, {form!r}, {target!r})))"
    )
    try:
        child = subprocess.run(
            [sys.executable, "-c", code],
            env=environment, capture_output=True, text=True, timeout=TIME_LIMIT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"no result in {TIME_LIMIT} s"}
    lines = child.stdout.splitlines()
    if child.returncode or not lines:
        return {"error": f"exit {child.returncode}: … {child.stderr.strip()[-600:]}"}
    return json.loads(lines[-1]) | {"spilled_bytes": aot.spilled_bytes(child.stdout + child.stderr)}


def pairs(length: int, example: int) -> tuple[float, float, float]:
    """(query, key) pairs that blocks, tokamax's kernel and its derivative compute, each over the
    pairs that are visible, in a sequence of examples of equal length."""
    examples = jnp.asarray(np.arange(length)[None] // example + 1)
    first = np.asarray(tokamax_gpu.first_keys(examples, None))[0]
    visible = np.sum(np.arange(length) - first + 1)

    def tiles(size: int, lowest: Callable[[np.ndarray], np.ndarray]) -> float:
        start = np.arange(0, length, size)
        begin = lowest(first[start]) // size * size
        return float(np.sum((start + size - begin) * size) / visible)

    return tiles(512, np.asarray), tiles(128, np.asarray), tiles(128, np.zeros_like)


INTRODUCTION = """\
# Attention of packed sequences on GPUs, compiled without the devices

`python benchmarks/packed_attention.py` makes this page, here with
{versions}.
Nothing ran: memory is what the compiler plans for one device, without the workspace of cuDNN.

attention B×T: attention and its derivative for B packed sequences of T tokens, {heads} heads over
{groups} of width {width}. step: the train step of a model in int4 with adapters of rank 8 on q and
v. kernels: those that are launched; a loop without a fixed number of iterations counts once, and
of cuDNN and blocks both count. spilled bytes: of registers. For the A100, tokamax has no
derivative without a mask of the squared length.

| program | target | attention | temp | peak | kernels | spilled bytes | compiled in |
|---|---|---|---|---|---|---|---|"""
PAIRS = """
Pairs of a query and a key that are computed, over those that are visible, by blocks of 512 and by
tokamax's tiles of 128. The derivative of tokamax visits all earlier keys of a sequence.

| sequence | examples of | blocks | tokamax, forward | tokamax, derivative |
|---|---|---|---|---|"""


def report(results: dict[tuple[str, str, str], dict[str, Any]]) -> Iterator[str]:
    """The lines of packed_attention.md."""
    names = ("jax", "flax", "tokamax", "jax-cuda13-plugin")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    yield INTRODUCTION.format(versions=versions, heads=HEADS, groups=GROUPS, width=WIDTH)
    for (case, form, target), found in results.items():
        if "error" in found:
            cells = [" ".join(found["error"].split()).replace("|", "/")[-160:]]
        else:
            temp, peak = found["temp_bytes"] / 1e6, found["peak_bytes"] / 1e9
            cells = [f"{temp:.0f} MB", f"{peak:.2f} GB", str(found["kernels"])]
            cells += [str(found["spilled_bytes"]), f"{found['seconds']:.0f} s"]
        yield f"| {' | '.join([case, target, form, *cells])} |"
    yield PAIRS
    for length in (2048, 8192, 32768):
        for example in (256, 1024, length):
            cells = [f"{share:.2f}" for share in pairs(length, example)]
            yield f"| {length} | {example} | {' | '.join(cells)} |"


def main(argv: Sequence[str]) -> int:
    if argv:
        print(json.dumps(run(*argv)))
        return 0
    results = {each: run(*each) for each in RUNS}
    path = pathlib.Path(__file__).with_suffix(".md")
    path.write_text("\n".join(report(results)) + "\n")
    return any("error" in result for result in results.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
