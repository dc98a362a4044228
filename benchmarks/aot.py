"""Compiles the kernels, the train step and the decode step for devices that this machine lacks.

python benchmarks/aot.py              all RUNS, each in its own process → benchmarks/aot.md
python benchmarks/aot.py CASE TARGET  one run → one line of JSON
AOT_HLO=FILE in the environment       writes the text of the compiled program to FILE

Needs pip install "lora-jax[train,aot]".
Nothing runs; the results come from the compiled program: its
memory, its kernels and collectives, the weights that it writes to memory, spilled registers, and
the cycles of a TPU kernel's loop.
"""

import collections
import concurrent.futures
import contextlib
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import architectures
import jax
import jax.numpy as jnp
import memory
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.kernels import choice, int4_matmul, low_rank
from lora_jax.kernels import packed as packing
from lora_jax.kernels.attention import cached
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips, hlo, programs, serving
from lora_jax.planning import job as jobs

TIME_LIMIT = 900  # seconds for one run
LAYERS = 2  # of the stack from which a kernel reads one layer
GROUP = 32


class Case(NamedTuple):
    """A program, the mesh to compile it for (as --mesh), and the [K, N] of its packed weights."""

    program: Callable[[Mesh], programs.Program]
    weights: Sequence[tuple[int, int]]
    mesh: str | None = None


def train_step(name: str, rows: int, tokens: int, remat: str, mesh: Mesh) -> programs.Program:
    """The train step of an int4 model with adapters of rank 8 on q and v."""
    architecture = memory.architecture(*architectures.MODELS[name])
    job = jobs.Job(architecture, remat=remat, batch_size=rows, seq_len=tokens)
    return programs.train_step(job, mesh)


def decode_step(name: str, slots: int, mesh: Mesh) -> programs.Program:
    """The engine's step that gives each slot a new token; 256 tokens of each in the cache."""
    architecture = memory.architecture(*architectures.MODELS[name])
    job = serving.Serving(architecture, slots=slots, context=256)
    with jax.set_mesh(mesh):
        return programs.decode(job, mesh)


def kernel(rows: int, d_in: int, d_out: int, form: str, mesh: Mesh) -> programs.Program:
    """A product with one layer of a stack: "forward", "both" (with its derivative) or "k_minor"."""
    where = NamedSharding(mesh, PartitionSpec())
    array = functools.partial(jax.ShapeDtypeStruct, sharding=where)
    packed = _stack(d_in, d_out, form, array)
    product = int4_matmul.from_k_minor if form == "k_minor" else int4_matmul.int4_matmul

    def multiply(x, packed, layer):
        return product(x, packed, layer=layer)

    def both(x, packed, layer, dy):
        y, pull_back = jax.vjp(lambda x: multiply(x, packed, layer), x)
        return y, pull_back(dy)

    arguments = array((rows, d_in), jnp.bfloat16), packed, array((), jnp.int32)
    if form == "both":
        return programs.Program(jax.jit(both), (*arguments, array((rows, d_out), jnp.bfloat16)))
    return programs.Program(jax.jit(multiply), arguments)


def joined(rows: int, d_in: int, widths: Sequence[int], form: str, mesh: Mesh) -> programs.Program:
    """Products with one layer of each of several stacks: "forward" or "k_minor"."""
    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    arguments = array((rows, d_in), jnp.bfloat16), array((), jnp.int32)
    if form == "k_minor":
        whole = _stack(d_in, sum(widths), form, array)

        def of_one(x, layer, packed):
            return int4_matmul.from_k_minor(x, packed, layer=layer, widths=widths)

        return programs.Program(jax.jit(of_one), (*arguments, whole))

    def multiply(x, layer, *weights):
        return int4_matmul.joined(x, weights, layer=layer)

    stacks = (_stack(d_in, width, form, array) for width in widths)
    return programs.Program(jax.jit(multiply), (*arguments, *stacks))


def _stack(d_in: int, d_out: int, form: str, array: Callable) -> packing.Packed:
    k_minor = array((LAYERS, d_out, d_in), jnp.int4)
    return packing.Packed(
        k_minor if form == "k_minor" else array((LAYERS, d_in // 8, d_out), jnp.uint32),
        array((LAYERS, d_in // GROUP, d_out), jnp.int8),
        array((LAYERS, 1, d_out), jnp.float32),
    )


def attention(groups: int, kv_dtype: jax.typing.DTypeLike, mesh: Mesh) -> programs.Program:
    """Of a token of 8 sequences, to keys and values read in place from a stack of layers."""
    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    stack = array((LAYERS, 8, groups, 1024, 128), kv_dtype)
    scales = array(stack.shape[:-1], jnp.float32) if kv_dtype == jnp.int8 else None
    each, one = array((8,), jnp.int32), array((), jnp.int32)

    def attend(q, k, v, k_scale, v_scale, layer, start, num_real, window):
        assert cached.kernel_of(q, k) == choice.ATTENTION_CACHED
        how = {"layer": layer, "start": start, "num_real": num_real, "window": window}
        return cached.attend(q, k, v, k_scale, v_scale, **how)

    q = array((8, 1, 32, 128), jnp.bfloat16)
    arguments = q, stack, stack, scales, scales, one, each, each, one
    return programs.Program(jax.jit(attend), arguments)


def bank(rows: int, d_in: int, d_out: int, mesh: Mesh) -> programs.Program:
    """The products with A and B of 8 adapters of rank 16, read in place from a stack of layers."""
    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    x, y, A, B = (
        array(shape, jnp.bfloat16)
        for shape in ((rows, d_in), (rows, d_out), (LAYERS, d_in, 128), (LAYERS, 128, d_out))
    )

    def multiply(x, y, A, B, weights, stretch, layer):
        assert low_rank.kernel_of(x, A, B) == choice.LOW_RANK
        mixed = low_rank.shrink(x, A, layer).astype(x.dtype)
        return low_rank.expand(y, mixed, B, weights, stretch, None, layer)

    weights, stretch = array((rows, 8), jnp.float32), array((LAYERS, 8, d_out), jnp.float32)
    arguments = x, y, A, B, weights, stretch, array((), jnp.int32)
    return programs.Program(jax.jit(multiply), arguments)


ATTENTION, UP, DOWN = (4096, 4096), (4096, 11008), (11008, 4096)  # of a 7B LLaMA
LLAMA_7B = (ATTENTION, UP, DOWN)
SIDE_BY_SIDE = ((4096, 3 * 4096), (4096, 2 * 11008))  # q, k and v; gate and up
V5E, V6E, H100, H200, A100 = "tpu:v5e", "tpu:v6e", "gpu:h100", "gpu:h200", "gpu:a100"
L4 = "gpu:l4"
TPUS, HOPPER, GPUS = (V5E, V6E), (H100, H200), (H100, H200, A100)

CASES: dict[str, Case] = {}
RUNS: list[tuple[str, str]] = []


def _add(name, on, program, *arguments, weights=LLAMA_7B, mesh=None):
    CASES[name] = Case(functools.partial(program, *arguments), weights, mesh)
    RUNS.extend((name, target) for target in on)


for _weight in LLAMA_7B:
    _shape = "x".join(map(str, _weight))
    # Not 4096 rows, or an activation would have the shape of a weight.
    _name = f"kernel-train-{_shape}"
    _add(_name, TPUS + GPUS, kernel, 8192, *_weight, "both", weights=(_weight,))
    for _rows in (1, 16):
        _name = f"kernel-decode{_rows}-{_shape}"
        _add(_name, (*TPUS, A100, L4), kernel, _rows, *_weight, "forward", weights=(_weight,))
        _name = f"kernel-decode{_rows}-{_shape}-k_minor"
        _add(_name, HOPPER, kernel, _rows, *_weight, "k_minor", weights=(_weight,))
    _name = f"kernel-decode64-{_shape}"
    _add(_name, (H100, A100, L4), kernel, 64, *_weight, "forward", weights=(_weight,))
for _name, _widths in (("qkv", (4096, 1024, 1024)), ("gate_up", (14336, 14336))):  # of an 8B LLaMA
    for _rows in (1, 64):
        _weights = [(4096, _width) for _width in _widths]
        _case = f"kernel-decode{_rows}-{_name}"
        _add(_case, (A100, L4), joined, _rows, 4096, _widths, "forward", weights=_weights)
        _case = f"kernel-decode{_rows}-{_name}-k_minor"
        _add(_case, HOPPER, joined, _rows, 4096, _widths, "k_minor", weights=_weights)
for _name, *_how in (("gqa", 8, jnp.bfloat16), ("mha", 32, jnp.bfloat16), ("int8", 8, jnp.int8)):
    _add(f"kernel-attention-{_name}", (*GPUS, L4), attention, *_how, weights=())
for _rows in (1, 64):
    _add(f"kernel-bank{_rows}-4096x11008", (*GPUS, L4), bank, _rows, *UP, weights=())
_7B = "Llama-2-7B"
_add("train-1x2048-full", (*TPUS, H100, A100), train_step, _7B, 1, 2048, "full")
_add("train-4x2048-full", (V5E, *GPUS), train_step, _7B, 4, 2048, "full")
_add("train-1x2048-none", (V5E, V6E, H100, A100), train_step, _7B, 1, 2048, "none")
_add("train-1x32768-full", (V5E, V6E, H100), train_step, _7B, 1, 32768, "full")
_add("train-data4", ("tpu:v5e-4",), train_step, _7B, 4, 2048, "full", mesh="data=4")
_add("train-tensor4", ("tpu:v5e-4",), train_step, _7B, 1, 2048, "full", mesh="tensor=4")
_add("train-fsdp16", ("tpu:v5e-16",), train_step, _7B, 16, 2048, "full", mesh="fsdp=16")
_add("train-data8", ("gpu:h100-8",), train_step, _7B, 8, 2048, "full", mesh="data=8")
_add("train-fsdp8", ("gpu:h100-8",), train_step, _7B, 8, 2048, "full", mesh="fsdp=8")
_mixed = "data=2,fsdp=2,tensor=2"
# Not 2048 tokens, or an activation would have the shape of a part of a weight.
_add("train-mixed8", ("tpu:v5e-8", "gpu:h100-8"), train_step, _7B, 4, 1536, "full", mesh=_mixed)
_decode_weights = LLAMA_7B + SIDE_BY_SIDE
_add("decode-1", TPUS + GPUS, decode_step, _7B, 1, weights=_decode_weights)
_add("decode-8", (V5E, H100), decode_step, _7B, 8, weights=_decode_weights)
_add("decode-16", (V5E, H100, A100), decode_step, _7B, 16, weights=_decode_weights)
_add("decode-64", (V6E, H100), decode_step, _7B, 64, weights=_decode_weights)


def compile_here(case: str, target: str) -> dict[str, Any]:
    """Compiles one case in this process, which the compiler may abort."""
    spec = CASES[case]
    cycles = target.startswith("tpu") and case.startswith("kernel")
    with tempfile.TemporaryDirectory() as folder:
        if cycles:
            os.environ["LIBTPU_INIT_ARGS"] = (
                f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
                "--xla_jf_dump_llo_pass_label_regex=final_bundles"
            )
        devices = chips.devices(target)
        sizes = sharding.parse(spec.mesh or "data=-1", len(devices))
        mesh = sharding.make_mesh(sizes, devices)
        start = time.monotonic()
        program = spec.program(mesh)
        with jax.set_mesh(mesh):
            traced = program.trace(mesh)
            lowered = traced.lower()
            lowering = time.monotonic() - start
            with _log() as log:
                compiled = lowered.compile()
                printed = log()
            seconds = time.monotonic() - start
            shares = roofline(traced, folder, target) if cycles else None
        uses = compiled.memory_analysis()
        program = hlo.parse(compiled.as_text())
        if path := os.environ.get("AOT_HLO"):
            pathlib.Path(path).write_text(compiled.as_text())
        parts = {1, sizes["tensor"]}
        local = {(k // a, n // b) for k, n in spec.weights for a in parts for b in parts}
        return {
            "case": case,
            "target": target,
            "seconds": round(seconds, 1),
            "lowering_seconds": round(lowering, 1),
            "peak_bytes": uses.peak_memory_in_bytes,
            "argument_bytes": uses.argument_size_in_bytes,
            "temp_bytes": uses.temp_size_in_bytes,
            "collectives": hlo.collective_bytes(program),
            "kernels": kernel_calls(program),
            "dense": written(program, local, dense=True),
            "packed": written(program, local, dense=False),
            "spilled_bytes": spilled_bytes(printed) if target.startswith("gpu") else None,
            "roofline": shares,
        }


@contextlib.contextmanager
def _log() -> Iterator[Callable[[], str]]:
    """Yields a function that returns what has been printed since, also by compilers."""
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)

        def printed() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield printed
        finally:
            for stream, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, stream)
            sys.stderr.write("" if sys.exc_info()[0] is None else printed())


KERNELS = ("tpu_custom_call", "mosaic_gpu", "triton", "cublas")


def kernel_calls(program: Sequence[hlo.Step]) -> dict[str, int]:
    """{name: number of calls} of the kernels that are not XLA's own."""
    found: collections.Counter[str] = collections.Counter()
    for (_, opcode, text, *_), times, _ in program:
        if opcode == "custom-call":
            name = re.search(r'custom_call_target="([^"]*)"', text)[1]
            found.update({kernel: times for kernel in KERNELS if kernel in name})
    return dict(found)


NO_RESULT = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call")


def written(
    program: Sequence[hlo.Step], weights: set[tuple[int, int]], *, dense: bool
) -> dict[str, int]:
    """{array: number of writes} of weights [K, N], dense or packed, to the device's memory."""
    forms = set()
    for k, n in weights:
        if dense:
            forms |= {(k, n), (n, k), (k // 8, 8, n), (k // GROUP, GROUP, n)}
        else:
            forms |= {(k // 8, n)}
    four_bit = {(k, n) for k, n in weights} | {(n, k) for k, n in weights}
    found: collections.Counter[str] = collections.Counter()
    for (shape, opcode, *_), times, fused in program:
        if fused or opcode in NO_RESULT or opcode.endswith("-start"):
            continue
        for dtype, dims, layout in hlo.arrays(shape):
            dims = tuple(size for size in dims if size != 1)
            is_4_bit = dtype in ("s4", "u4")
            wanted = (four_bit if not dense else ()) if is_4_bit else forms
            # S(1) is a TPU's scratch memory.
            if dims in wanted and "S(1)" not in layout and (dense or is_4_bit or dtype == "u32"):
                found[f"{dtype}[{','.join(map(str, dims))}]"] += times
    return dict(found)


def spilled_bytes(log: str) -> int:
    """Bytes that ptxas spills to local memory, in total over the kernels."""
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", log)))


OPS_PER_CYCLE = {"tpu:v5e": 2**17, "tpu:v6e": 2**19}  # bfloat16, of all matrix units


def roofline(traced: Any, folder: str, target: str) -> list[float]:
    """The least time over the modelled time of each TPU kernel, forward then backward.

    The least time is that with all matrix units busy, or that to move the weight, x and y once,
    whichever is longer. The modelled time is a cycle for each instruction word of each step of the
    grid, or the least time if that is longer.
    """
    chip, _ = chips.parse(target)
    flops, bandwidth, _ = chips.PEAKS[chip]
    hertz = flops / OPS_PER_CYCLE[chip]
    shares = []
    for (steps, x, y), (inside, words) in zip(
        tpu_kernels(traced.jaxpr), instruction_words(folder), strict=True
    ):
        size = x.shape[1] * y.shape[1]
        moved = size * (1 / 2 + 1 / GROUP) + (x.size + y.size) * x.dtype.itemsize
        least = max(2 * x.shape[0] * size / flops, moved / bandwidth)
        # A short grid is unrolled, without a loop.
        shares.append(round(least / max((inside * steps or words) / hertz, least), 3))
    return shares


def tpu_kernels(jaxpr: Any) -> Iterator[tuple[int, Any, Any]]:
    """(grid steps, x, y) of each Pallas kernel for a TPU, in the order of the program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            if not equation.params["interpret"]:
                x = next(v.aval for v in equation.invars if v.aval.ndim == 2)
                grid = equation.params["grid_mapping"].grid
                yield math.prod(grid), x, equation.outvars[0].aval
            continue
        if equation.primitive.name == "linear":  # its function is traced when it is lowered
            types = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
            yield from tpu_kernels(jax.make_jaxpr(equation.params["function"])(*types).jaxpr)
            continue
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from tpu_kernels(inner)


def instruction_words(folder: str) -> list[tuple[int, int]]:
    """(in the loop over the grid, in total) of each TPU kernel, in the order of the program."""
    found = {}
    for path in pathlib.Path(folder).glob("*final_bundles.txt"):
        name = re.fullmatch(r"\d+-([\w.]*?\.?(\d*))-\d+-final_bundles.txt", path.name)
        if name and name[1] != "TLP":
            listing = path.read_text(errors="replace")
            depths = re.findall(r"^\s*(?:0x[0-9a-f]+|0)\s+\w*\s*:\s*(>?)", listing, re.MULTILINE)
            found[int(name[2] or 0), name[1]] = depths.count(">"), len(depths)
    # A derivative may have the number of its function: transpose_jvp_f.2 is the one of jvp_f.2.
    return [found[key] for key in sorted(found)]


def run(case: str, target: str) -> dict[str, Any]:
    """The result of compile_here in a separate process, or {"error": …}."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "0",  # XLA logs spilled registers
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path]),
    }
    code = f"import aot, json; print(json.dumps(aot.compile_here({case!r}, {target!r})))"
    try:
        child = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return {"case": case, "target": target, "error": f"no result in {TIME_LIMIT} s"}
    lines = child.stdout.splitlines()
    if child.returncode or not lines:
        # The last exception is the cause; JAX's advice about its stack frames follows it.
        tail = child.stderr.split("-" * 20 + "\nFor simplicity, JAX")[0].strip()[-600:]
        return {"case": case, "target": target, "error": f"exit {child.returncode}: … {tail}"}
    return json.loads(lines[-1])


def cost() -> float:
    """CPU seconds of the processes that `run` has started so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(argv: Sequence[str]) -> int:
    if argv:
        print(json.dumps(run(*argv)))
        return 0
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda each: run(*each), RUNS))
    lines = report(results, time.monotonic() - start, cost())
    pathlib.Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")
    return any("error" in result for result in results)


INTRODUCTION = """\
# Compiled without the devices

`python benchmarks/aot.py` compiles {number} programs in {minutes:.0f} minutes ({cpu:.0f} of CPU),
with {versions}. Nothing ran: memory is what the compiler plans for one device.

## Kernels

One product with an int4 weight (groups of 32, int8 scales), read in place from a stack of layers.
k_minor is the copy that decoding on Hopper makes first. triton: the kernel for up to 128 rows of
words as they are stored. qkv, gate_up: weights of an 8B LLaMA in one kernel. temp: memory in
addition to arguments and results. roofline: on a TPU, the least time (of the matrix units, or to
move weight, x and y) over that of the kernel's instructions, forward and backward. spilled bytes:
of registers that the GPU kernels write to memory. attention: of a token of 8 sequences to their
keys and values, 32 heads with 8 (gqa) or 32 (mha) heads of keys, or 8 in int8. bank: the products
with A and B of 8 adapters of rank 16.
"""
MODEL = """
## The train step and the decode step of a 7B LLaMA

int4. train, with adapters of rank 8 on q and v: B×T-remat for B sequences of T tokens, or a mesh
with a sequence of 2048 tokens for each data shard. decode: the engine's step for so many slots of
256 tokens; on Hopper it reads only the k_minor copy of the weights, made before. written: dense or
packed weights that reach memory, and how often, in one step.
"""


def report(results: Sequence[dict[str, Any]], seconds: float, cpu: float) -> Iterator[str]:
    """The lines of aot.md."""
    packages = ("jax", "flax", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    how = {"number": len(results), "minutes": seconds / 60, "cpu": cpu / 60, "versions": versions}
    yield INTRODUCTION.format(**how)
    columns = ("kernels", "temp_bytes", "dense", "roofline", "spilled_bytes")
    yield from _table(results, "kernel", ("calls", "temp", "dense weights written"), columns)
    yield MODEL
    titles = ("peak", "arguments", "kernel calls", "dense written", "packed written")
    columns = ("peak_bytes", "argument_bytes", "kernels", "dense", "packed", "collectives")
    yield from _table(results, "train", (*titles, "collectives"), columns)
    yield ""
    yield from _table(results, "decode", titles, columns[:-1])


def _table(results, kind: str, titles: Sequence[str], columns: Sequence[str]) -> Iterator[str]:
    titles = (kind, "target", *titles, *columns[len(titles) :])
    yield "| " + " | ".join(title.replace("_", " ") for title in titles) + " |"
    yield "|" + "---|" * len(titles)
    for result in results:
        if result["case"].startswith(kind):
            if "error" in result:
                cells = [" ".join(result["error"].split()).replace("|", "/")[-160:]]
            else:
                cells = [_cell(column, result[column]) for column in columns]
            name = result["case"].removeprefix(f"{kind}-")
            yield "| " + " | ".join([name, result["target"], *cells]) + " |"


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "roofline":
        return ", ".join(f"{share:.2f}" for share in value)
    if column == "collectives":
        each = (f"{v['count']} {k} {v['bytes'] / 1e6:.0f} MB" for k, v in value.items())
        return ", ".join(each) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{times} × {name}" for name, times in value.items()) or "none"
    if column == "spilled_bytes":
        return str(value)
    return f"{value / 1e6:.1f} MB" if column == "temp_bytes" else f"{value / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
