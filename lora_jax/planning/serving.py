"""A serving job, and the shapes of its model, bank and slots."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lora_jax.checkpoints import inventory
from lora_jax.generation import steps
from lora_jax.generation import weights as decode_weights
from lora_jax.lora.nnx import bank
from lora_jax.models import config as model_config
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import job as jobs

CHUNK = 512  # tokens of a prompt, the most that the engine computes at once


@dataclasses.dataclass(frozen=True)
class Serving:
    """The settings that determine the programs of `generation.Engine`.

    Args:
      slots: requests served at a time.
      context: the most tokens of a request, prompt and output.
      adapters: slots of the bank of adapters; 0: no bank.
      rank: of a slot of the bank.
      targets: the layers that have a bank, as LoRAConfig.targets.
      kv_dtype: as generation.Engine.
      span: the tokens of the longest request now, of which attention reads; None: the context.
    """

    architecture: model_config.LlamaConfig
    dtype: str = "bfloat16"
    quant: str = "int4"
    slots: int = 8
    context: int = 4096
    adapters: int = 0
    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    kv_dtype: str | None = None
    span: int | None = None


def serving_from(fields: dict[str, Any]) -> Serving:
    """The Serving whose dataclasses.asdict was written as JSON and read back."""
    targets = fields["targets"]
    return Serving(
        **fields
        | {
            "architecture": jobs.architecture_from(fields["architecture"]),
            "targets": targets if isinstance(targets, str) else tuple(targets),
        }
    )


class Shapes(NamedTuple):
    """The programs of an engine, and the shapes of what stays on its devices.

    num_groups: into how many groups the mesh splits the slots.
    """

    programs: steps.Programs
    form: str | None
    weights: steps.Weights
    state: steps.State
    num_groups: int


def shapes(job: Serving, mesh: Mesh | AbstractMesh, *, form: str | None = "") -> Shapes:
    """What an engine has on a mesh. form: as generation.weights.choose; "": what it chooses.

    Call it with the mesh as JAX's ambient one.
    """
    made = []

    def build():
        model = inventory.skeleton(
            job.architecture, dtype=jnp.dtype(job.dtype), quantization=job.quant, mesh=mesh
        )
        if job.adapters:
            bank.add(model, slots=job.adapters, rank=job.rank, targets=job.targets)
        graphdef, adapters, base = nnx.split(model, bank.BankParam, ...)
        made.append(graphdef)
        return nnx.to_pure_dict(adapters), nnx.to_pure_dict(base)

    adapters, base = jax.eval_shape(build)
    weights = steps.Weights(base, {}, {}, adapters)
    return of_weights(
        made[0], weights, job.slots, job.context, mesh,
        num_adapters=job.adapters, kv_dtype=job.kv_dtype, form=form,
    )  # fmt: skip


def of_weights(
    graphdef: nnx.GraphDef,
    weights: steps.Weights,
    num_slots: int,
    length: int,
    mesh: Mesh | AbstractMesh,
    *,
    num_adapters: int = 0,
    kv_dtype: str | None = None,
    form: str | None = "",
) -> Shapes:
    """The same for a model whose weights are known."""
    if form == "":
        model = nnx.merge(graphdef, weights.adapters, weights.trained, weights.keys, weights.base)
        form = decode_weights.choose(model, mesh)
    run = steps.Programs(graphdef, form)
    whole = NamedSharding(mesh, PartitionSpec())
    empty = run.empty.eval_shape(weights, num_slots, length, num_adapters, kv_dtype)
    kv = sharding.cache(num_slots, empty.cache.k.shape[2], mesh)
    state = _on(empty._replace(cache=None), whole)._replace(cache=_on(empty.cache, kv))
    num_groups, forms = steps.num_groups(num_slots, mesh), None
    if form:
        forms = _on(run.derive.eval_shape(weights, num_slots // num_groups), whole)
    weights = jobs.shapes(weights, mesh)._replace(forms=forms)
    return Shapes(run, form, weights, state, num_groups)


def _on(tree: Any, where: NamedSharding) -> Any:
    """The arrays of `tree` as shapes with that sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
    )
