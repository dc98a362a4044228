"""Jobs that fit into a device's memory: the largest ones, and changes that make a job fit."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from lora_jax import errors
from lora_jax.models import config as model_config
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import job as jobs
from lora_jax.planning import memory, resident

HEADROOM = 0.95  # share of the memory to plan for; the rest covers the model's error


class Proposals(NamedTuple):
    """The largest jobs that fit, each with one change; None: no such job fits."""

    batch_size: jobs.Job | None
    seq_len: jobs.Job | None
    remat: jobs.Job | None


def propose(
    job: jobs.Job, sizes: Mapping[str, int], chip: str, limit: float, known: resident.Resident
) -> Proposals:
    """The largest batch, longest sequences and least recomputation that fit, one change each."""

    def fits(changed: jobs.Job) -> bool:
        return memory.memory(changed, sizes, chip, known).need() <= HEADROOM * limit

    def largest(with_size: Callable[[int], jobs.Job], unit: int, most: int) -> jobs.Job | None:
        low, high = 0, most // unit  # in units; low fits
        while low < high:
            middle = (low + high + 1) // 2
            if fits(with_size(middle * unit)):
                low = middle
            else:
                high = middle - 1
        return with_size(low * unit) if low else None

    unit = sharding.batch_shards(sizes)
    policies = (dataclasses.replace(job, remat=remat) for remat in reversed(model_config.REMAT))
    context = job.architecture.context
    return Proposals(
        largest(lambda rows: dataclasses.replace(job, batch_size=rows), unit, 4096 * unit),
        largest(lambda length: _of_length(job, length), min(128, context), context),
        next(filter(fits, policies), None),
    )


def choose_remat(
    job: jobs.Job,
    sizes: Mapping[str, int],
    chip: str,
    limit: float | None,
    known: resident.Resident | None = None,
) -> tuple[str, dict[str, int]]:
    """(the policy of --remat auto, {policy: bytes} of each policy that was tried).

    The policy is the one that recomputes least and fits into `limit` bytes; if none fits, the one
    that needs least memory. Nothing is tried if the limit is unknown (None), or on a CPU, whose
    memory other programs use as well: then, too, it is the one that needs least memory.
    """
    needs: dict[str, int] = {}
    if limit is None or chip == "cpu":
        return model_config.REMAT[0], needs
    known = known or resident.resident(job, sizes, chip)
    for remat in reversed(model_config.REMAT):
        planned = memory.memory(dataclasses.replace(job, remat=remat), sizes, chip, known)
        needs[remat] = planned.need()
        if needs[remat] <= HEADROOM * limit:
            break
    return remat, needs


def _of_length(job: jobs.Job, length: int) -> jobs.Job:
    """The job with examples of `length` tokens; held-out prompts with their answers, too."""
    generation = job.generation
    if generation is not None and generation[1:] == (job.seq_len, 0):
        generation = (generation[0], length, 0)
    return dataclasses.replace(job, seq_len=length, generation=generation)


def changes(
    job: jobs.Job, sizes: Mapping[str, int], chip: str, limit: float, known: resident.Resident
) -> Iterator[tuple[str, memory.Memory]]:
    """(flags, memory) of ways to make a job fit, the least costly first."""
    ways: list[tuple[str, jobs.Job, Mapping[str, int]]] = []
    if job.remat != "full":
        ways.append(("--remat full", dataclasses.replace(job, remat="full"), sizes))
    least = sharding.batch_shards(sizes)
    smallest = dataclasses.replace(job, batch_size=least, remat="full")
    if smallest != job:
        flags = f"--batch-size {least} --remat full (and more --grad-accum)"
        ways.append((flags, smallest, sizes))
    stored = job.architecture.quantization  # a quantized checkpoint keeps its own format
    stays_packed = stored is not None and stored.stays_packed
    for fmt in () if stays_packed else ("int8", "int4", "int4-g128"):
        ways.append((f"--quant {fmt}", dataclasses.replace(job, quant=fmt), sizes))
    length = job.seq_len // 2
    while length >= 128:
        shorter = _of_length(smallest, length)
        flags = f"--seq-len {length} --batch-size {least} --remat full"
        ways.append((flags, shorter, sizes))
        length //= 2
    for count in (2, 4, 8, 16, 32, 64, 128, 256):
        if count > sizes["fsdp"]:
            spread = {"data": 1, "fsdp": count, "tensor": sizes["tensor"]}
            many = dataclasses.replace(job, batch_size=-(-job.batch_size // count) * count)
            flags = "--mesh " + ",".join(f"{axis}={size}" for axis, size in spread.items())
            if many != job:
                flags += f" --batch-size {many.batch_size}"
            flags += f" on {math.prod(spread.values())} such devices"
            ways.append((flags, many, spread))
    found_kinds = set()
    for flags, changed, mesh in ways:
        kind = flags.split()[0]
        if kind in found_kinds:
            continue
        then = known
        try:
            if (changed.quant, mesh) != (job.quant, sizes):
                then = resident.resident(changed, mesh, chip)
            found = memory.memory(changed, mesh, chip, then)
        except errors.UserError:  # a mesh that does not divide the model
            continue
        saved = sum(known.base.values()) - sum(then.base.values())
        if changed.quant != job.quant and saved <= 0:
            continue
        if found.need() <= HEADROOM * limit:
            found_kinds.add(kind)
            yield flags, found
