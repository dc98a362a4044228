"""A training job, and the shapes of its model, adapters and optimizer state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from lora_jax import lora
from lora_jax.checkpoints import inventory
from lora_jax.lora import config
from lora_jax.lora.nnx import model_state
from lora_jax.models import config as model_config
from lora_jax.models import quantization_config as model_quantization
from lora_jax.models import rope_config
from lora_jax.optim import adamw
from lora_jax.optim import config as optim_config
from lora_jax.optim import step as train
from lora_jax.parallel import mesh as sharding

NUM_STEPS = 100  # of the schedule: the compiled program is the same for any number


@dataclasses.dataclass(frozen=True)
class Job:
    """The settings that determine a training run's programs.

    Args:
      batch_size: sequences in a micro-batch, over all devices.
      seq_len: most tokens of an example.
      generation: (prompts at a time, prompt tokens, new tokens) of --prompt or --exact-match, or
        None.
      beta: the β of DPO, where a sequence is a pair of examples; None without DPO.
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
    def examples_per_sequence(self) -> int:
        return 1 if self.beta is None else 2

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.examples_per_sequence * self.seq_len

    def of_length(self, tokens: int) -> "Job":
        """The same job with sequences of `tokens` tokens."""
        return dataclasses.replace(self, seq_len=tokens // self.examples_per_sequence)


def job_from(fields: dict[str, Any]) -> Job:
    """The Job whose dataclasses.asdict was written as JSON and read back."""
    given = fields["generation"]
    return Job(
        **fields
        | {
            "architecture": architecture_from(fields["architecture"]),
            "lora": config.LoRAConfig(**fields["lora"]),
            "optim": optim_config.OptimConfig(**fields["optim"]),
            "generation": None if given is None else tuple(given),
        }
    )


def architecture_from(fields: dict[str, Any]) -> model_config.LlamaConfig:
    """The same for an architecture."""
    rope = _rope_from(fields["rope"])
    ropes = tuple(each and _rope_from(each) for each in fields["ropes"])
    stored = fields["quantization"]
    stored = None if stored is None else model_quantization.Quantization(**stored)
    windows = tuple(fields["sliding_windows"])
    return model_config.LlamaConfig(
        **fields
        | {"rope": rope, "ropes": ropes, "sliding_windows": windows, "quantization": stored}
    )


def _rope_from(fields: dict[str, Any]) -> rope_config.RopeConfig:
    factors = {name: tuple(fields[name]) for name in ("short_factor", "long_factor")}
    return rope_config.RopeConfig(**fields | factors)


def shapes(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The arrays of `tree` as shapes, each with the sharding that `sharding.place` gives it."""

    def shape(path, leaf):
        where = sharding.of(sharding.names(path), leaf.ndim, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(shape, tree)


def model_parts(
    job: Job, mesh: Mesh | AbstractMesh
) -> tuple[nnx.GraphDef, Any, model_state.Frozen, int]:
    """(graphdef, lora, frozen, number of trained parameters) of the model that a run would load."""
    made = []

    def build():
        model = inventory.skeleton(
            job.architecture, dtype=jnp.dtype(job.dtype), quantization=job.quant, mesh=mesh
        )
        # PiSSA starts from the values of the weights, and there are none here.
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


def state(job: Job, trained: Any) -> train.State:
    """The shapes of the training state: adapters and optimizer moments."""
    optimizer = adamw.make(job.optim, NUM_STEPS)
    return jax.eval_shape(lambda a: train.start(a, optimizer), trained)
