"""A run as `planning` takes it, and the remat policy that is planned to fit."""

import dataclasses

import jax
from jax.sharding import Mesh

from lora_jax import console
from lora_jax.console import say
from lora_jax.lora import outer_names, token_indices
from lora_jax.models import config as model_config
from lora_jax.parallel import devices, processes
from lora_jax.planning import chips, proposals
from lora_jax.planning import job as jobs
from lora_jax.training import run_data
from lora_jax.training.settings import convert, groups


def num_adapters(settings: groups.TrainSettings) -> int:
    """How many adapters are trained at the same time."""
    return len(convert.sweep(settings.loop.sweep)[1]) if settings.loop.sweep else 1


def job(
    settings: groups.TrainSettings,
    architecture: model_config.LlamaConfig,
    generation: tuple[int, int, int] | None = None,
) -> jobs.Job:
    """The settings as planning takes them. generation: see jobs.Job."""
    loop, lora_settings = settings.loop, outer_names.inner_config(settings.lora, architecture)
    return jobs.Job(
        architecture,
        dtype=settings.model.dtype,
        quant=settings.model.quant,
        lora=token_indices.with_any_ids(lora_settings),  # a plan reads no tokenizer
        optim=settings.optim,
        remat=loop.remat,
        batch_size=loop.batch_size,
        grad_accum=loop.grad_accum,
        seq_len=settings.data.seq_len,
        generation=generation,
        beta=settings.beta,
    )


def job_and_target(
    settings: groups.TrainSettings, architecture: model_config.LlamaConfig, mesh: Mesh
) -> tuple[jobs.Job, chips.Target]:
    """(the job as planning takes it, the devices)."""
    first = mesh.devices.flat[0]
    own = job(settings, architecture)
    own = dataclasses.replace(own, batch_size=own.batch_size * num_adapters(settings))
    return own, chips.of_kind(first.platform, first.device_kind, mesh.size)


def choose_remat(
    settings: groups.TrainSettings,
    architecture: model_config.LlamaConfig,
    mesh: Mesh,
    data: run_data.RunData,
) -> groups.TrainSettings:
    """The settings with the remat policy that "auto" chooses on these devices."""
    if settings.loop.remat != "auto":
        return settings
    own, target = job_and_target(settings, architecture, mesh)
    limit = devices.memory_bytes(jax.local_devices()[0])
    limit = processes.broadcast(limit)  # hosts may report different amounts
    longest = own.of_length(data.batches.length)
    chosen, needs = proposals.choose_remat(longest, dict(mesh.shape), target.chip, limit)
    if needs:
        say("remat", console.remat(chosen, needs, limit))
    return settings.replace(remat=chosen)
