"""Measures one case of device.py on this machine's first device: JSON in, a line of JSON out.

A process of its own for each case: its peak memory is that of the case, and what ends it does not
end the others.
"""

import bisect
import functools
import importlib.metadata
import json
import os
import statistics
import sys
import threading
import time
from typing import Any

import decoding
import device_cases
import device_matmul
import device_record
import jax
import jax.numpy as jnp
import memory
import numpy as np
import random_model
from flax import nnx

from lora_jax.generation import steps as generation
from lora_jax.generation import weights as decode_weights
from lora_jax.lora import config
from lora_jax.optim import adamw
from lora_jax.optim import loss as train_loss
from lora_jax.optim import step as train_step
from lora_jax.parallel import devices
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips, resident, serving, serving_memory
from lora_jax.planning import job as jobs
from lora_jax.planning import memory as device_memory

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
LEAST_STEPS, LEAST_SECONDS, MOST_STEPS = 3, 8.0, 20  # of a timing, after two steps that warm up
HELD = 60.0  # seconds that a step of the longest sequence runs: its memory is taken at the start
PLAN_ERROR = 0.05  # a plan that is larger than the memory by more than this is not tried
PACKAGES = ("lora-jax", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu",
            "flax", "optax", "numpy")  # fmt: skip


def facts() -> dict[str, Any]:
    """The device, and what a copy within it moves."""
    device = jax.devices()[0]
    peaks = target().peaks
    on_cpu = device.platform == "cpu"
    array = jnp.zeros(2**20 if on_cpu else 2**28)
    seconds = device_matmul.seconds(jax.jit(lambda a: a + 1), array)
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "count": jax.device_count(),
        "memory": devices.memory_bytes(device),
        "peak_flops": peaks.flops if peaks else None,
        "copied_bytes_per_second": 2 * array.nbytes / seconds,
        "runtime": device.client.platform_version.split("\n")[0],
        "python": sys.version.split()[0],
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
    }


def target() -> chips.Target:
    device = jax.devices()[0]
    return chips.of_kind(device.platform, device.device_kind, 1)


def limit() -> int:
    """Bytes that JAX may use."""
    return devices.memory_bytes(jax.devices()[0]) or 1 << 62


def job_of(case: device_cases.Train) -> jobs.Job:
    adapter = config.LoRAConfig(rank=case.rank, targets=case.targets)
    return jobs.Job(architecture(case.model), quant=case.quant, lora=adapter, remat=case.remat,
                    batch_size=case.rows, seq_len=case.length)  # fmt: skip


def architecture(name: str):
    return memory.architecture(*device_cases.MODELS[name])


def too_large(planned: int) -> dict[str, Any] | None:
    """The outcome of a case that the plan says does not fit; None if it may."""
    if planned <= (1 + PLAN_ERROR) * limit():
        return None
    reason = f"planned {planned / 1e9:.1f} GB of {limit() / 1e9:.1f} GB"
    return {"status": device_record.TOO_LARGE, "reason": reason, "planned_bytes": planned}


class Step:
    """The compiled training step of a case, with its state."""

    def __init__(self, case: device_cases.Train, mesh):
        job = job_of(case)
        graphdef, trained, self.frozen = random_model.model(job, mesh)
        how = job.optim, jobs.NUM_STEPS
        optimizer = adamw.make(*how)
        step = train_step.make_step(
            graphdef, optimizer, adamw.schedule(*how), seed=0, remat=case.remat
        )
        self.state = train_step.start(trained, optimizer)
        self.batch = jax.device_put(batch(case), sharding.batch(mesh))
        start = time.perf_counter()
        self.run = step.lower(self.state, self.frozen, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start
        uses = self.run.memory_analysis()
        # Beside what the allocator measures: that has also what drawing the weights took.
        self.xla_bytes = uses.peak_memory_in_bytes
        if jax.devices()[0].platform == "cpu":  # on which XLA leaves the temporaries out of it
            self.xla_bytes = uses.argument_size_in_bytes + uses.temp_size_in_bytes

    def __call__(self) -> float:
        """Seconds of a step. Raises: ValueError for a loss that is not finite."""
        start = time.perf_counter()
        self.state, metrics = self.run(self.state, self.frozen, self.batch)
        loss = metrics["loss"].item()
        taken = time.perf_counter() - start
        if not np.isfinite(loss):
            raise ValueError(f"expected a finite loss, found {loss}")
        return taken


def batch(case: device_cases.Train) -> train_loss.Batch:
    """Random tokens, all of which are trained."""
    vocab = device_cases.MODELS[case.model][0]
    shape = 1, case.rows, case.length
    ids = np.random.default_rng(0).integers(3, vocab, shape, np.int32)
    examples = np.arange(case.length) * (device_cases.EXAMPLES if case.packed else 1)
    mask = np.broadcast_to(1 + examples // case.length, shape).astype(np.int32)
    return train_loss.Batch(ids, ids, mask)


def train(case: device_cases.Train, mesh) -> dict[str, Any]:
    planned = device_memory.memory(job_of(case), ONE, target().chip).total
    if outcome := too_large(planned):
        return outcome
    step = Step(case, mesh)
    built = devices.device_peak_bytes()
    for _ in range(2):
        step()
    times: list[float] = []
    while len(times) < LEAST_STEPS or (sum(times) < LEAST_SECONDS and len(times) < MOST_STEPS):
        times.append(step())
    median = statistics.median(times)
    return {
        "status": device_record.MEASURED,
        "seconds": median,
        "number": len(times),
        "tokens_per_second": case.tokens / median,
        "planned_bytes": planned,
        "peak_bytes": devices.device_peak_bytes(),
        "peak_bytes_before_steps": built,
        "xla_bytes": step.xla_bytes,
        "compile_seconds": step.compile_seconds,
    }


def decode(case: device_cases.Decode, mesh) -> dict[str, Any]:
    context = case.prompt + case.new
    job = serving.Serving(architecture(case.model), quant=case.quant, slots=case.rows,
                          context=context)  # fmt: skip
    chip = target().chip
    planned = serving_memory.of(job, ONE, chip, serving_memory.known(job, ONE, chip)).total
    if outcome := too_large(planned):
        return outcome
    of_model = jobs.Job(job.architecture, quant=case.quant)
    graphdef, trained, frozen = random_model.model(of_model, mesh)
    arrays = generation.Weights(frozen.base, trained, frozen.dropout_keys, {})
    form = None
    if case.form == "best":
        own = nnx.merge(graphdef, {}, trained, frozen.dropout_keys, frozen.base)
        form = decode_weights.choose(own, mesh)
    step = decoding.Steps(
        graphdef, arrays, form, slots=case.rows, prompt=case.prompt, room=case.new
    )
    run = functools.partial(step.run, case.new)
    run()
    times = device_matmul.times(run)
    median = statistics.median(times) / case.new
    read = {name: part for name, part in frozen.base["model"].items() if name != "embed_tokens"}
    read = trained, read, frozen.base["lm_head"]
    c = job.architecture
    kv = 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    return {
        "status": device_record.MEASURED,
        "seconds": median,
        "number": len(times) * case.new,
        "tokens_per_second": case.rows / median,
        "bytes_per_step": memory.num_bytes(read) + case.rows * kv * (case.prompt + case.new // 2),
        "form": form or "as stored",
        "planned_bytes": planned,
        "peak_bytes": devices.device_peak_bytes(),
        "compile_seconds": step.compiling["compile_s"],
    }


def planned_length(case: device_cases.Longest) -> dict[str, Any]:
    """The longest sequence that fits as planned."""
    step = case.step(case.unit)
    job, chip = job_of(step), target().chip
    known = resident.resident(job, ONE, chip)

    def fits(units: int) -> bool:
        longer = job.of_length(units * case.unit)
        return device_memory.memory(longer, ONE, chip, known).total <= limit()

    most = 1
    while fits(most) and (case.most is None or most * case.unit < case.most):
        most *= 2
    found = bisect.bisect_left(range(most + 1), True, lo=1, key=lambda units: not fits(units)) - 1
    return {"status": device_record.MEASURED, "planned_length": found * case.unit}


def attempt(case: device_cases.Train, mesh) -> dict[str, Any]:
    """Whether a step fits. A step that still runs after HELD seconds has all its memory."""
    step = Step(case, mesh)
    found = {"status": device_record.MEASURED, "xla_bytes": step.xla_bytes}

    def held() -> None:
        peak = devices.device_peak_bytes()
        print(json.dumps(found | {"peak_bytes": peak, "seconds": None}), flush=True)
        os._exit(0)

    timer = threading.Timer(HELD, held)
    timer.daemon = True
    timer.start()
    seconds = step()
    timer.cancel()
    return found | {"peak_bytes": devices.device_peak_bytes(), "seconds": seconds}


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """asked: {"what": "facts", "case" or "attempt", "case": its fields}."""
    if asked["what"] == "facts":
        return facts()
    case, mesh = device_cases.read(asked["case"]), sharding.make_mesh(ONE)
    try:
        with jax.set_mesh(mesh):
            if asked["what"] == "attempt":
                return attempt(case, mesh)
            if isinstance(case, device_cases.Longest):
                return planned_length(case)
            if isinstance(case, device_cases.Matmul):
                return device_matmul.measure(case)
            return (decode if isinstance(case, device_cases.Decode) else train)(case, mesh)
    except jax.errors.JaxRuntimeError as error:
        if not device_record.is_out_of_memory(str(error)):
            raise
        reason = "out of memory: " + " ".join(str(error).split())[:200]
        return {"status": device_record.TOO_LARGE, "reason": reason}


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
