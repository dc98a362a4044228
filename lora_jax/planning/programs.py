"""A job's programs, compiled for a target ahead of time from shapes: no weights, no device.

They are the train step of `optim.make_step` and the programs of `generation.Engine`. XLA may abort
the process that compiles, so `compiled` starts one: python -m lora_jax.planning.programs.
"""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax import errors
from lora_jax.generation import steps
from lora_jax.optim import adamw
from lora_jax.optim import loss as train_loss
from lora_jax.optim import step as train
from lora_jax.parallel import devices
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips, hlo, serving
from lora_jax.planning import job as jobs


class Compiled(NamedTuple):
    """What XLA reports of a program, for one device: memory, compile time and communication."""

    peak_bytes: int
    argument_bytes: int
    temp_bytes: int
    seconds: float
    collectives: dict[str, dict[str, int]]  # hlo.collective_bytes


class Host(NamedTuple):
    """The devices that JAX sees: platform, kind, number, and the bytes of each that it may use."""

    platform: str
    kind: str
    count: int
    memory: int | None


class Program(NamedTuple):
    """A jitted function, the shapes of its arguments, and its static keyword arguments."""

    function: Any
    arguments: Sequence[Any]
    static: Mapping[str, Any] = MappingProxyType({})

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """The program for the devices of `mesh`."""
        with jax.set_mesh(mesh):
            return self.trace(mesh).lower()

    def trace(self, mesh: Mesh) -> jax.stages.Traced:
        """The same, with its jaxpr."""
        with jax.set_mesh(mesh):
            return self.function.trace(*self.arguments, **self.static)


def train_step(job: jobs.Job, mesh: Mesh) -> Program:
    """The step of `optim.make_step`, with the shapes of state, frozen and batch."""
    graphdef, trained, frozen, _ = jobs.model_parts(job, mesh)
    step = train.make_step(
        graphdef,
        adamw.make(job.optim, jobs.NUM_STEPS),
        adamw.schedule(job.optim, jobs.NUM_STEPS),
        seed=0,
        remat=job.remat,
        beta=job.beta,
    )
    ids = jax.ShapeDtypeStruct(
        (job.grad_accum, job.batch_size, job.length), jnp.int32, sharding=sharding.batch(mesh)
    )
    batch = train_loss.Batch(ids, ids, ids)
    return Program(
        step, (jobs.shapes(jobs.state(job, trained), mesh), jobs.shapes(frozen, mesh), batch)
    )


def generation(job: jobs.Job, mesh: Mesh) -> Program:
    """The step of `generation.Engine` that gives each sequence of job.generation a new token."""
    rows, prompt, new = job.generation
    graphdef, trained, frozen, _ = jobs.model_parts(job, mesh)
    weights = steps.Weights(frozen.base, trained, frozen.dropout_keys, {})
    return _decode(serving.of_weights(graphdef, weights, rows, prompt + new, mesh), mesh)


def decode(job: serving.Serving, mesh: Mesh) -> Program:
    """The step that gives each slot a new token."""
    return _decode(serving.shapes(job, mesh), mesh, job.span)


def prefill(job: serving.Serving, mesh: Mesh) -> Program:
    """The program for a chunk of a prompt in each group of slots."""
    found = serving.shapes(job, mesh)
    groups = found.num_groups
    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    each = array((groups,), jnp.int32)
    chunk = steps.Chunk(
        array((groups, min(serving.CHUNK, job.context)), jnp.int32), each, each, each, each,
        array((groups, job.adapters), jnp.float32),
    )  # fmt: skip
    arguments = found.weights, found.state, chunk
    return Program(found.programs.prefill, arguments, {"span": job.span})


def _decode(found: serving.Shapes, mesh: Mesh, span: int | None = None) -> Program:
    whole = NamedSharding(mesh, PartitionSpec())
    live = jax.ShapeDtypeStruct((len(found.state.lengths),), bool, sharding=whole)
    return Program(found.programs.decode, (found.weights, found.state, live), {"span": span})


PROGRAMS = {"train": train_step, "generate": generation, "decode": decode, "prefill": prefill}


def compile_here(
    job: jobs.Job | serving.Serving, target: str | None, sizes: Mapping[str, int], what: str
) -> Compiled:
    """Compiles one of PROGRAMS in this process, which XLA may abort.

    target: a name as in chips.parse; None: the devices that JAX sees. sizes: of the mesh's axes.
    """
    found = jax.devices() if target is None else chips.devices(target)
    mesh = sharding.make_mesh(dict(sizes), found)
    start = time.monotonic()
    with jax.set_mesh(mesh):
        program = PROGRAMS[what](job, mesh)
    compiled = program.lower(mesh).compile()
    seconds = time.monotonic() - start
    uses = compiled.memory_analysis()
    peak = uses.peak_memory_in_bytes
    if found[0].platform == "cpu":  # on which XLA leaves the temporaries out of the peak
        peak = uses.argument_size_in_bytes + uses.temp_size_in_bytes
        peak += uses.output_size_in_bytes - uses.alias_size_in_bytes
    return Compiled(
        peak,
        uses.argument_size_in_bytes,
        uses.temp_size_in_bytes,
        round(seconds, 1),
        hlo.collective_bytes(hlo.parse(compiled.as_text())),
    )


def host_here() -> Host:
    """The devices that JAX sees in this process."""
    first = jax.local_devices()[0]
    memory = devices.memory_bytes(first)
    return Host(first.platform, first.device_kind, jax.device_count(), memory)


def compiled(
    job: jobs.Job | serving.Serving,
    target: str | None,
    sizes: Mapping[str, int],
    what: str = "train",
    *,
    limit: float = 900,
) -> Compiled | str:
    """The result of `compile_here` in a separate process, or the reason why there is none.

    limit: seconds after which that process is stopped. Ctrl-C stops it too.
    """
    asked = {"job": dataclasses.asdict(job), "target": target, "sizes": dict(sizes), "what": what}
    answer = _ask(asked, target, limit)
    return answer if isinstance(answer, str) else Compiled(**answer)


def host() -> Host:
    """The devices that JAX sees, found in a separate process: this one opens no accelerator.

    Raises: UserError if that process fails.
    """
    answer = _ask({"what": "host"}, None, 120)
    if isinstance(answer, str):
        raise errors.UserError(
            expected="devices that JAX can open",
            found=answer,
            do="name another --target, or stop the process that holds the device",
        )
    return Host(**answer)


def _ask(asked: dict[str, Any], target: str | None, limit: float) -> dict[str, Any] | str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if target is not None:
        chip = chips.parse(target)
        environment["JAX_PLATFORMS"] = "cpu"
        if chip.platform == "cpu":
            flag = f" --xla_force_host_platform_device_count={chip.count}"  # the last flag wins
            environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag
        else:
            environment["XLA_FLAGS"] = ""
    try:
        child = subprocess.run(
            [sys.executable, "-m", "lora_jax.planning.programs"],
            input=json.dumps(asked),
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return f"no result within {limit:g} s"
    if child.returncode:
        return _reason(child.returncode, child.stderr)
    return json.loads(child.stdout.splitlines()[-1])


def _reason(code: int, log: str) -> str:
    """The last exception of a process that failed, on one line."""
    # Stack frames precede it, and JAX's advice about them follows it.
    lines = log.split("-" * 20 + "\nFor simplicity, JAX")[0].strip().splitlines()
    if code < 0:
        return f"the compiler ended with {signal.Signals(-code).name}: " + " ".join(lines[-1:])
    last = next((i for i in reversed(range(len(lines))) if "Error" in lines[i].split(":")[0]), -1)
    return " ".join(" ".join(lines[last:]).split())[:400]


def _answer() -> None:
    # Python's own handler would wait for the compiler to return.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    asked = json.load(sys.stdin)
    what = asked.pop("what")
    if what == "host":
        found: NamedTuple = host_here()
    else:
        read = serving.serving_from if what in ("decode", "prefill") else jobs.job_from
        found = compile_here(read(asked.pop("job")), **asked, what=what)
    print(json.dumps(found._asdict()))


if __name__ == "__main__":
    _answer()
