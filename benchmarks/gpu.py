"""Measures the 4-bit kernels, a QLoRA train step and decoding on this machine's GPU.

python benchmarks/gpu.py [matmul] [train] [decode] [--quant int4] [--out FILE]  (none: all three)
python benchmarks/gpu.py --peer  the same for PEFT and bitsandbytes, if PyTorch sees a GPU
python benchmarks/gpu.py --tiny  a test of this script, on any device: its figures mean nothing

Weights are random, in the shapes of a 7B LLaMA. Every kernel's result is checked before it is
timed, and the script fails if one is wrong. It prints Markdown.
"""

import argparse
import datetime
import functools
import importlib.metadata
import pathlib
import sys
import time
from typing import Any, NamedTuple

import decoding
import jax
import jax.numpy as jnp
import memory
import numpy as np
from flax import nnx

from lora_jax import lora
from lora_jax.generation import steps
from lora_jax.generation import weights as decode_weights
from lora_jax.kernels import int4_matmul
from lora_jax.kernels import packed as packing
from lora_jax.kernels.int4_matmul import mosaic_gpu, xla, xla_gpu
from lora_jax.lora import config
from lora_jax.lora.nnx import model_state
from lora_jax.models import llama
from lora_jax.optim import adamw
from lora_jax.optim import config as optim_config
from lora_jax.optim import loss as train_loss
from lora_jax.optim import step as train_step
from lora_jax.planning import chips
from lora_jax.quant import conversion, formats

TOLERANCE = 1e-2  # for ‖error‖ / ‖result‖ of a kernel; one rounding to bfloat16 costs 2e-3
CACHE = 400e6  # bytes of weights to cycle through, so that a GPU's L2 cache does not help
DECODE_ROWS = 64  # the most rows for which reading the weight takes longer than the product
BF16 = jnp.bfloat16
RANK = 16


class Sizes(NamedTuple):
    model: tuple  # as in memory.MODELS
    matmuls: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    train: tuple[int, tuple[int, ...]]  # tokens of a sequence, sequences
    decode: tuple[int, int, tuple[int, ...]]  # prompt, new tokens, sequences
    seconds: float  # the least duration of a timing


FULL = Sizes(
    model=memory.MODELS["Llama-2-7B"],
    matmuls=((4096, 4096), (4096, 11008), (11008, 4096), (4096, 12288)),
    rows=(1, 4, 16, 64, 2048, 8192),
    train=(2048, (1, 2, 4, 8, 16, 32, 64)),
    decode=(128, 128, (1, 4, 16, 64)),
    seconds=0.3,
)
TINY = Sizes(
    model=(256, 128, 256, 2, 4, 4, False),
    matmuls=((256, 192),),
    rows=(1, 4, 16, 64),
    train=(16, (1, 2)),
    decode=(16, 4, (1, 4)),
    seconds=1e-3,
)


class Report:
    """The Markdown lines, printed at once, and the wrong results."""

    def __init__(self):
        self.lines: list[str] = []
        self.wrong: list[str] = []

    def table(self, title: str, *columns: str) -> None:
        self.text(f"\n### {title}\n")
        self.row(*columns)
        self.text("|---" * len(columns) + "|")

    def row(self, *cells: Any) -> None:
        self.text("| " + " | ".join(map(str, cells)) + " |")

    def text(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)


def seconds(call, wait, at_least: float) -> float:
    """Seconds of one call: the best of three timings, each of enough calls to take `at_least`."""
    wait(call())
    times, repeat = [], 1
    while len(times) < 3:
        start = time.perf_counter()
        for _ in range(repeat):
            result = call()
        wait(result)
        taken = time.perf_counter() - start
        if taken >= at_least:
            times.append(taken / repeat)
        else:
            repeat = max(repeat + 1, int(repeat * min(10, 1.2 * at_least / taken)))
    return min(times)


def jax_seconds(at_least: float, function, *arguments) -> float:
    return seconds(lambda: function(*arguments), jax.block_until_ready, at_least)


def is_out_of_memory(error: Exception) -> bool:
    return any(text in str(error) for text in ("RESOURCE_EXHAUSTED", "out of memory"))


def versions(*names: str) -> str:
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    return ", ".join(f"{name} {installed[name]}" for name in names if name in installed)


def random_arrays(tree: Any) -> Any:
    """Arrays of the shapes in `tree`, filled on the device according to their names."""

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def fill(key, name, shape, dtype):
        if jnp.issubdtype(dtype, jnp.unsignedinteger):  # codes, and scales of nested scales
            return jax.random.bits(key, shape, dtype)
        if dtype == jnp.int8:
            return jax.random.randint(key, shape, -127, 128, dtype)
        if name == "layer":
            return jnp.arange(shape[0], dtype=dtype)
        if name in ("weight", "scaling"):
            return jnp.ones(shape, dtype)
        if name == "column_scale":  # codes of ±8 times scales of ±127: weights of about 0.02
            return jnp.full(shape, 6e-5, dtype)
        return 0.02 * jax.random.normal(key, shape, dtype)

    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = []
    for index, (path, leaf) in enumerate(flat):
        name = str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
        leaves.append(fill(jax.random.key(index), name, leaf.shape, leaf.dtype))
    return jax.tree.unflatten(structure, leaves)


def random_stack(fmt: str, layers: int, k: int, n: int) -> packing.Packed:
    each = functools.partial(formats.quantize, fmt=fmt)
    dense = jax.ShapeDtypeStruct((layers, k, n), BF16)
    return random_arrays(jax.eval_shape(lambda weights: jax.lax.map(each, weights), dense))


def random_model(architecture: tuple, fmt: str):
    """(graphdef, lora, frozen) with adapters on all linear layers; the weights are made packed."""
    graphdefs = []

    def build():
        model = llama.LlamaForCausalLM(
            memory.architecture(*architecture), dtype="bfloat16", rngs=nnx.Rngs(0)
        )
        conversion.quantize_model(model, fmt)
        lora.inject(model, config.LoRAConfig(rank=RANK, targets="all-linear"), rngs=nnx.Rngs(0))
        graphdef, trained, frozen = model_state.split(model)
        graphdefs.append(graphdef)
        return trained, frozen

    trained, frozen = random_arrays(jax.eval_shape(build))
    return graphdefs[0], trained, frozen


def matmul_forms(fmt: str, packed: packing.Packed, rows: int, is_hopper: bool) -> dict:
    """{name: (x, packed, words with K minor, layer) → y} of the implementations that take it."""
    codes = formats.codes(fmt)
    _, groups, n = packed.scale.shape
    k = 8 * packed.q.shape[1]
    forms = {
        "public": lambda x, p, _, i: int4_matmul.int4_matmul(x, p, codes=codes, layer=i),
        "dequantize, dot": lambda x, p, _, i: xla.matmul(x, packing.layer(p, i), codes=codes),
    }
    if rows <= xla_gpu.MOST_ROWS[codes]:
        forms["sums"] = lambda x, p, _, i: xla_gpu.matvec(x, packing.layer(p, i), codes)
    refused = mosaic_gpu.refusal(rows, k, n, k // groups, BF16, packed.scale.dtype)
    if is_hopper and codes == "int4" and not refused:
        forms["mosaic"] = lambda x, p, words, i: mosaic_gpu.matmul(
            x, words, p.scale, p.column_scale, i
        )
    return forms


def measure_matmuls(report: Report, sizes: Sizes, fmt: str) -> None:
    """Each program multiplies with all its weights, to time the device and not the dispatch."""
    is_hopper = decode_weights.best(jax.devices()[0]) == "k_minor"
    timed = functools.partial(jax_seconds, sizes.seconds)
    report.table(
        f"Matmuls, {fmt}",
        *("K × N", "rows", "form", "µs", "× dense", "TB/s of weight", "TFLOP/s", "error"),
    )
    for (k, n), rows in ((shape, rows) for shape in sizes.matmuls for rows in sizes.rows):
        count = int(CACHE / (k * n / 2)) if rows <= DECODE_ROWS and sizes is FULL else 2
        packed = random_stack(fmt, count, k, n)
        words = jax.jit(mosaic_gpu.k_minor)(packed.q) if is_hopper else None
        layers = list(jnp.arange(count))
        x = jax.random.normal(jax.random.key(0), (rows, k), BF16)
        tflop = 2 * rows * k * n / 1e12
        num_bytes = sum(array.nbytes for array in jax.tree.leaves(packed)) / count

        dense = list(0.02 * jax.random.normal(jax.random.key(1), (2 + count // 4, k, n), BF16))
        taken = timed(jax.jit(lambda x, weights: [x @ w for w in weights]), x, dense)
        dense_time = taken / len(dense)
        report.row(f"{k} × {n}", rows, "dense bf16", f"{dense_time * 1e6:.1f}", 1,
                   f"{2 * k * n / dense_time / 1e12:.2f}", f"{tflop / dense_time:.1f}",
                   "–")  # fmt: skip
        checked = min(rows, DECODE_ROWS)
        weight = packing.dequantize(packing.layer(packed, 1), formats.codes(fmt))
        expected = np.asarray(x[:checked], np.float64) @ np.asarray(weight, np.float64)
        for name, form in matmul_forms(fmt, packed, rows, is_hopper).items():
            once = jax.jit(form)  # lowered once for all layers
            program = jax.jit(lambda *a, once=once: [once(*a[:-1], i) for i in a[-1]])
            where = f"{name} {k} × {n}, {rows} rows"
            try:
                found = program(x, packed, words, layers)[1][:checked]
                error = np.linalg.norm(np.asarray(found, np.float64) - expected)
                error /= np.linalg.norm(expected)
                taken = timed(program, x, packed, words, layers) / count
            except Exception as failure:  # other implementations may still work
                report.wrong.append(f"{where}: {failure}")
                continue
            if not error < TOLERANCE:
                report.wrong.append(f"{where}: error {error:.1e}")
            report.row("", rows, name, f"{taken * 1e6:.1f}", f"{dense_time / taken:.2f}",
                       f"{num_bytes / taken / 1e12:.2f}", f"{tflop / taken:.1f}",
                       f"{error:.1e}")  # fmt: skip


def measure_train(report: Report, sizes: Sizes, fmt: str, peak: float | None) -> None:
    tokens, batches = sizes.train
    settings = optim_config.OptimConfig()
    optimizer = adamw.make(settings, 100)
    graphdef, trained, frozen = random_model(sizes.model, fmt)
    report.table(
        f"QLoRA step, {fmt}, rank {RANK} on all linear layers, sequences of {tokens} tokens",
        *("remat", "sequences", "tokens/s", "TFLOP/s", "of peak", "memory, GB"),
    )
    for remat, flops_per_weight in (("none", 4), ("full", 6)):
        schedule = adamw.schedule(settings, 100)
        step = train_step.make_step(graphdef, optimizer, schedule, seed=0, remat=remat)
        for rows in batches:
            ids = jax.random.randint(jax.random.key(2), (1, rows, tokens), 0, sizes.model[0])
            batch = train_loss.Batch(ids, ids, jnp.ones_like(ids))
            # A copy, because the step reuses the memory of its state.
            state = train_step.start(jax.tree.map(jnp.copy, trained), optimizer)
            times = []
            try:
                compiled = step.lower(state, frozen, batch).compile()
                for _ in range(6):
                    start = time.perf_counter()
                    state, metrics = compiled(state, frozen, batch)
                    metrics["loss"].item()
                    times.append(time.perf_counter() - start)
            except Exception as failure:
                if not is_out_of_memory(failure):
                    raise
                report.row(remat, rows, "out of memory", "–", "–", "–")
                break
            rate = rows * tokens / min(times)
            flops = rate * flops_per_weight * num_weights(sizes.model)
            held = compiled.memory_analysis().peak_memory_in_bytes
            report.row(remat, rows, f"{rate:.0f}", f"{flops / 1e12:.1f}",
                       f"{flops / peak:.0%}" if peak else "–", f"{held / 1e9:.1f}")  # fmt: skip


def num_weights(architecture: tuple) -> int:
    """The number of weights that a token is multiplied by: all except the embedding."""
    vocab, hidden, ffn, layers, heads, kv_heads, _ = architecture
    attention = 2 * hidden * hidden * (1 + kv_heads / heads)
    return int(layers * (attention + 3 * hidden * ffn) + vocab * hidden)


def measure_decode(report: Report, sizes: Sizes, fmt: str, bandwidth: float) -> None:
    prompt, new_tokens, batches = sizes.decode
    _, hidden, _, layers, heads, kv_heads, _ = sizes.model
    graphdef, trained, frozen = random_model(sizes.model, fmt)
    read = {name: part for name, part in frozen.base["model"].items() if name != "embed_tokens"}
    read = trained, read, frozen.base["lm_head"]
    arrays = steps.Weights(frozen.base, trained, frozen.dropout_keys, {})
    weights = sum(array.nbytes for array in jax.tree.leaves(read))
    kv = 2 * 2 * layers * kv_heads * (hidden // heads) * (prompt + new_tokens / 2)  # bytes per row
    device = jax.devices()[0]
    second_form = "dense" if device.platform == "cpu" else "k_minor"
    report.table(
        f"Greedy decode, {fmt}, prompt of {prompt} tokens",
        *("sequences", "form", "ms/token", "tokens/s", "GB/token", "of a copy's bandwidth"),
    )
    for rows, form in ((rows, form) for rows in batches for form in (None, second_form)):
        if form == "k_minor" and decode_weights.best(device) != form:
            continue
        step = decoding.Steps(graphdef, arrays, form, slots=rows, prompt=prompt, room=new_tokens)
        run = functools.partial(step.run, new_tokens)
        taken = seconds(run, lambda _: None, sizes.seconds) / new_tokens
        num_bytes = weights + rows * kv
        report.row(rows, form or "as stored", f"{taken * 1e3:.2f}", f"{rows / taken:.0f}",
                   f"{num_bytes / 1e9:.2f}", f"{num_bytes / taken / bandwidth:.0%}")  # fmt: skip


def measure(report: Report, sizes: Sizes, fmt: str, parts: list[str]) -> None:
    device = jax.devices()[0]
    kind = device.device_kind
    known = (p.flops for chip, p in chips.PEAKS.items() if chip.split(":")[1] in kind.lower())
    peak = next(known, None)
    array = jnp.zeros(2**28 if sizes is FULL else 2**20)
    bandwidth = 2 * array.nbytes / jax_seconds(sizes.seconds, jax.jit(lambda a: a + 1), array)
    report.text(
        f"{datetime.date.today()}: {kind}, "
        + versions("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax")
        + f". A copy moves {bandwidth / 1e12:.2f} TB/s"
        + (f"; peak {peak / 1e12:.0f} TFLOP/s (data sheet)." if peak else ".")
    )
    if "matmul" in parts:
        measure_matmuls(report, sizes, fmt)
    if "train" in parts:
        measure_train(report, sizes, fmt, peak)
    if "decode" in parts:
        measure_decode(report, sizes, fmt, bandwidth)


def measure_peer(report: Report, sizes: Sizes, parts: list[str]) -> None:
    """The same for PyTorch: dense and bitsandbytes' NF4 matmuls, PEFT's step and generation."""
    import torch

    cuda = torch.cuda.is_available()
    if not cuda and sizes is FULL:
        sys.exit("expected a GPU that PyTorch sees, found none; --tiny runs on a CPU")
    device = "cuda" if cuda else "cpu"
    wait = (lambda _: torch.cuda.synchronize()) if cuda else (lambda _: None)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    report.text(
        f"{datetime.date.today()}: {name}, "
        + versions("torch", "transformers", "peft", "bitsandbytes")
    )
    if "matmul" in parts:
        report.table("Matmuls", "K × N", "rows", "dense bf16, µs", "bitsandbytes nf4, µs")
        for k, n in sizes.matmuls:
            count = int(CACHE / (k * n / 2)) if sizes is FULL else 2
            nf4 = [_linear4bit(torch, k, n).to(device) for _ in range(count)]
            dense = [
                torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=device)
                for _ in range(2 + count // 4)
            ]
            for rows in sizes.rows:
                x = torch.randn(rows, k, dtype=torch.bfloat16, device=device)
                with torch.inference_mode():
                    times = [
                        seconds(functools.partial(_each, layers, x), wait, sizes.seconds)
                        / len(layers)
                        for layers in (dense, nf4)
                    ]
                report.row(f"{k} × {n}", rows, *(f"{taken * 1e6:.1f}" for taken in times))
    if not {"train", "decode"} & set(parts):
        return
    model = _peft_model(torch, sizes.model, device)
    if "train" in parts:
        _measure_peft_train(report, sizes, torch, model, wait)
    if "decode" in parts:
        prompt, new_tokens, batches = sizes.decode
        report.table(f"Greedy decode, PEFT, prompt of {prompt} tokens", "sequences", "ms/token")
        model.eval()
        for rows in batches:
            ids = torch.randint(sizes.model[0], (rows, prompt), device=device)
            run = functools.partial(
                model.generate, input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False
            )
            short, long = (
                seconds(
                    functools.partial(run, min_new_tokens=n, max_new_tokens=n), wait, sizes.seconds
                )
                for n in (1, 1 + new_tokens)
            )
            report.row(rows, f"{(long - short) / new_tokens * 1e3:.2f}")


def _measure_peft_train(report, sizes, torch, model, wait) -> None:
    tokens, batches = sizes.train
    cuda = model.device.type == "cuda"
    report.table(
        f"QLoRA step, PEFT, rank {RANK} on all linear layers, sequences of {tokens} tokens",
        *("gradient checkpointing", "sequences", "tokens/s", "memory, GB"),
    )
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for rows in batches:
            ids = torch.randint(sizes.model[0], (rows, tokens), device=model.device)

            def step(ids=ids):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            try:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                taken = seconds(step, wait, sizes.seconds)
            except torch.OutOfMemoryError:
                report.row(checkpointing, rows, "out of memory", "–")
                optimizer.zero_grad()
                torch.cuda.empty_cache()
                break
            held = torch.cuda.max_memory_allocated() if cuda else 0
            report.row(checkpointing, rows, f"{rows * tokens / taken:.0f}", f"{held / 1e9:.1f}")
    model.gradient_checkpointing_disable()


def _each(layers, x) -> None:
    for layer in layers:
        layer(x)


def _linear4bit(torch, k: int, n: int):
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False
    )
    torch.nn.init.normal_(layer.weight.data, std=0.02)
    return layer.to(torch.bfloat16)


def _peft_model(torch, architecture: tuple, device: str):
    """A random model, built layer by layer on the device, so that it is never dense as a whole."""
    import peft
    import transformers

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")  # fmt: skip
    settings = transformers.LlamaConfig(
        **dict(zip(names, architecture, strict=True)), eos_token_id=None, pad_token_id=0
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(settings).to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            new = _linear4bit(torch, module.in_features, module.out_features).to(device)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value.is_meta:
                value = torch.empty_like(value, device=device).normal_(std=0.02)
                setattr(module, name, torch.nn.Parameter(value if value.ndim > 1 else value + 1))
    model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(device)
    adapters = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    return peft.get_peft_model(model, adapters)


def main() -> None:
    choices = ("matmul", "train", "decode")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(choices)} (all)")
    parser.add_argument("--quant", default="int4", help="a 4-bit format (default: %(default)s)")
    parser.add_argument("--peer", action="store_true", help="PEFT and bitsandbytes instead")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="write the tables there")
    given = parser.parse_args()
    parts = given.parts or list(choices)
    if not set(parts) <= set(choices):
        parser.error(f"expected parts among {', '.join(choices)}, found {' '.join(parts)}")
    sizes, report = TINY if given.tiny else FULL, Report()
    if given.peer:
        measure_peer(report, sizes, parts)
    else:
        measure(report, sizes, given.quant, parts)
    if given.out:
        given.out.write_text("\n".join([*report.lines, *report.wrong]) + "\n")
    if report.wrong:
        sys.exit("\nwrong:\n" + "\n".join(report.wrong))


if __name__ == "__main__":
    main()
