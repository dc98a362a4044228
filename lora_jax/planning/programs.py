"""A job's programs from shapes alone, compiled for a target ahead of time: no weights, no device.

The job's train step is `train.make_step`'s, its generation `generate.make`'s. Where XLA may abort
the process, `compiled` has a process of its own do it: python -m lora_jax.planning.programs.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lora_jax import errors
from lora_jax.checkpoints import inventory
from lora_jax.generation import config as generation_config
from lora_jax.generation import continuation
from lora_jax.generation import weights as decode_weights
from lora_jax.lora import config
from lora_jax.lora.nnx import inject as lora
from lora_jax.lora.nnx import model_state
from lora_jax.models import config as model_config
from lora_jax.models import quantization_config as model_quantization
from lora_jax.optim import adamw
from lora_jax.optim import config as optim_config
from lora_jax.optim import step as train
from lora_jax.parallel import devices
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips, hlo

_STEPS = 100  # of the schedule: the program is the same for any number


@dataclasses.dataclass(frozen=True)
class Job:
    """What decides a training run's programs. batch_size lines at a time, over all devices.

    generation: (rows at a time, prompt tokens, new tokens) of --prompt or --exact-match, or None.
    beta: of DPO, where a line is a pair of rows; None for a row to a line.
    """

    architecture: model_config.LlamaConfig
    dtype: str = "bfloat16"
    quant: str = "int4"
    lora: config.LoRAConfig = dataclasses.field(default_factory=config.LoRAConfig)
    optim: optim_config.OptimConfig = dataclasses.field(default_factory=optim_config.OptimConfig)
    remat: str = "full"
    batch_size: int = 1
    grad_accum: int = 1
    seq_len: int = 2048
    generation: tuple[int, int, int] | None = None
    beta: float | None = None

    @property
    def rows_a_line(self) -> int:
        return 1 if self.beta is None else 2

    @property
    def length(self) -> int:
        """Tokens of a line."""
        return self.rows_a_line * self.seq_len

    def of_length(self, tokens: int) -> "Job":
        """The same with lines of so many tokens."""
        return dataclasses.replace(self, seq_len=tokens // self.rows_a_line)


def job_of(
    settings: Mapping[str, Any],
    architecture: model_config.LlamaConfig,
    generation: tuple[int, int, int] | None = None,
) -> Job:
    """The Job of a run's settings, named as train.py's flags are; all of them must be there."""
    same = ("dtype", "quant", "remat", "batch_size", "grad_accum", "seq_len")
    return Job(
        architecture,
        lora=config.build(config.LoRAConfig, settings),
        optim=config.build(optim_config.OptimConfig, settings),
        generation=generation,
        beta=settings["beta"] if settings.get("dpo") else None,
        **{name: settings[name] for name in same},
    )


class Compiled(NamedTuple):
    """What XLA made of a program, for one device: bytes, seconds it took, what it communicates."""

    peak_bytes: int
    argument_bytes: int
    temp_bytes: int
    seconds: float
    collectives: dict[str, dict[str, int]]  # hlo.collective_bytes


class Host(NamedTuple):
    """What JAX sees: platform, device kind, their number, bytes of each that it may use."""

    platform: str
    kind: str
    count: int
    memory: int | None


class Program(NamedTuple):
    """A jitted function and the shapes of its arguments."""

    function: Any
    arguments: Sequence[Any]

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """The program for the devices of `mesh`."""
        with jax.set_mesh(mesh):
            return self.function.trace(*self.arguments).lower()


def shapes(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The arrays of `tree` as shapes, each with the sharding that `sharding.place` gives it."""

    def shape(path, leaf):
        names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
        where = sharding.of(names, leaf.ndim, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(shape, tree)


def model_parts(
    job: Job, mesh: Mesh | AbstractMesh
) -> tuple[nnx.GraphDef, Any, model_state.Frozen, int]:
    """(graphdef, lora, frozen, trainable numbers) of the model as `checkpoint.load` makes it."""
    made = []

    def build():
        model = inventory.skeleton(
            job.architecture, dtype=jnp.dtype(job.dtype), quantization=job.quant, mesh=mesh
        )
        # PiSSA begins with values, of which there are none here.
        adapters = dataclasses.replace(job.lora, init_lora_weights="default")
        lora.inject(model, adapters, rngs=nnx.Rngs(0))
        graphdef, trained, frozen = model_state.split(model)
        made.append((graphdef, lora.num_params(model)))
        return trained, frozen

    trained, frozen = jax.eval_shape(build)
    if job.beta is not None:
        frozen = frozen._replace(reference=trained)
    graphdef, trainable = made[0]
    return graphdef, trained, frozen, trainable


def train_step(job: Job, mesh: Mesh) -> Program:
    """The step as train.make_step gives it, with state, frozen and batch as shapes."""
    graphdef, trained, frozen, _ = model_parts(job, mesh)
    step = train.make_step(
        graphdef,
        adamw.make(job.optim, _STEPS),
        adamw.schedule(job.optim, _STEPS),
        seed=0,
        remat=job.remat,
        beta=job.beta,
    )
    row = jax.ShapeDtypeStruct(
        (job.grad_accum, job.batch_size, job.length), jnp.int32, sharding=sharding.batch(mesh)
    )
    batch = train.Batch(row, row, row)
    return Program(step, (shapes(state(job, trained), mesh), shapes(frozen, mesh), batch))


def state(job: Job, trained: Any) -> train.State:
    """The shapes of what training changes."""
    optimizer = adamw.make(job.optim, _STEPS)
    return jax.eval_shape(lambda a: train.start(a, optimizer), trained)


def generation(job: Job, mesh: Mesh) -> Program:
    """What continues job.generation's prompts, as generate.make gives it."""
    rows, prompt, new = job.generation
    graphdef, trained, frozen, _ = model_parts(job, mesh)
    model = nnx.merge(graphdef, trained, frozen.dropout_keys, frozen.base)
    sampling = generation_config.Sampling(max_new_tokens=new)
    run = continuation.make(
        graphdef, sampling, eos_ids=(2,), form=decode_weights.choose(model, mesh)
    )
    ids = jax.ShapeDtypeStruct((rows, prompt), jnp.int32, sharding=sharding.rows(rows, mesh))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct((), key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    return Program(run, (shapes(trained, mesh), shapes(frozen, mesh), ids, ids, key))


PROGRAMS = {"train": train_step, "generate": generation}


def compile_here(job: Job, target: str | None, sizes: Mapping[str, int], what: str) -> Compiled:
    """Compiles one of PROGRAMS in this process, which XLA may abort.

    target: as targets.parse; None: the devices JAX sees. sizes: of the mesh's axes.
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
    if found[0].platform == "cpu":  # there XLA leaves the temporaries out of it
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
    """The Host of this process."""
    first = jax.local_devices()[0]
    memory = devices.memory_bytes(first)
    return Host(first.platform, first.device_kind, jax.device_count(), memory)


def compiled(
    job: Job,
    target: str | None,
    sizes: Mapping[str, int],
    what: str = "train",
    *,
    limit: float = 900,
) -> Compiled | str:
    """What `compile_here` finds, from a process of its own; why it found nothing, as a text.

    limit: seconds after which the process is ended. Ctrl-C ends it too.
    """
    asked = {"job": dataclasses.asdict(job), "target": target, "sizes": dict(sizes), "what": what}
    answer = _ask(asked, target, limit)
    return answer if isinstance(answer, str) else Compiled(**answer)


def host(*, limit: float = 120) -> Host:
    """What JAX sees, from a process of its own: this one takes no accelerator.

    Raises: UserError when there is no answer.
    """
    answer = _ask({"what": "host"}, None, limit)
    if isinstance(answer, str):
        raise errors.UserError(
            expected="devices that JAX can open",
            found=answer,
            do="name another --target, or end what holds the device",
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
            flag = f" --xla_force_host_platform_device_count={chip.count}"  # the last one counts
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
    # Before it come frames, after it JAX's advice on them.
    told = log.split("-" * 20 + "\nFor simplicity, JAX")[0].strip().splitlines()
    if code < 0:
        return f"the compiler ended with {signal.Signals(-code).name}: " + " ".join(told[-1:])
    last = next((i for i in reversed(range(len(told))) if "Error" in told[i].split(":")[0]), -1)
    return " ".join(" ".join(told[last:]).split())[:400]


def job_from(fields: dict[str, Any]) -> Job:
    """The Job whose dataclasses.asdict went through JSON."""
    architecture = fields["architecture"]
    rope = model_config.RopeConfig(**architecture["rope"])
    stored = architecture["quantization"]
    stored = None if stored is None else model_quantization.Quantization(**stored)
    windows = tuple(architecture["sliding_windows"])
    given = fields["generation"]
    return Job(
        **fields
        | {
            "architecture": model_config.LlamaConfig(
                **architecture | {"rope": rope, "sliding_windows": windows, "quantization": stored}
            ),
            "lora": config.LoRAConfig(**fields["lora"]),
            "optim": optim_config.OptimConfig(**fields["optim"]),
            "generation": None if given is None else tuple(given),
        }
    )


def _answer() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own waits for the compiler to return
    asked = json.load(sys.stdin)
    what = asked.pop("what")
    if what == "host":
        found: NamedTuple = host_here()
    else:
        found = compile_here(job_from(asked.pop("job")), **asked, what=what)
    print(json.dumps(found._asdict()))


if __name__ == "__main__":
    _answer()
