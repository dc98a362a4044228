"""Plan the memory and time of a training job, without weights or devices.

The same as `lora-jax train --plan`, with the flags of `train`.
"""

import dataclasses
import json
import sys
from typing import Any

from lora_jax import console, errors, hub
from lora_jax.cli import arguments, plan_serve, process_flags, train
from lora_jax.cli import plan_output as output
from lora_jax.training.settings import groups

DESCRIPTION = """\
Plan the memory and time of a training job, without weights or devices.

  lora-jax plan --model huggyllama/llama-7b --use-4bit --target gpu:h100
  lora-jax plan --model owner/name --seq-len 4096 --target tpu:v5e-8
  lora-jax plan --serve --help                     the same for a server

The other flags are those of train, of which these change the plan most.
"""
MAIN = ("--serve", "--target", "--hbm", "--no-compile", "--json", "--model", "--quant", "--mesh",
        "--seq-len", "--rank", "--targets", "--batch-size", "--grad-accum", "--remat")  # fmt: skip


def run(of: train.Asked) -> int:
    """Prints the plan of the run that `train` would start with these flags."""
    asked, settings = of.others, of.settings
    process_flags.refuse(asked, "--plan")
    limit = output.num_bytes(asked["hbm"]) if "hbm" in asked else None

    from lora_jax.models import config as model_config
    from lora_jax.parallel import mesh as sharding
    from lora_jax.planning import chips, programs, proposals, resident
    from lora_jax.planning import memory as device_memory

    settings, job = _job(settings)
    target, host = output.devices(asked.get("target"))
    limit = limit or host.memory
    if settings.model.mesh:
        sizes = sharding.parse(settings.model.mesh, host.count)
    else:
        sizes = sharding.default(
            host.count,
            sum(resident.resident(job, sharding.ONE, target.chip).base.values()),
            limit,
        )
    if "batch_size" not in settings.given:
        rows = sharding.round_up(job.batch_size, sharding.mesh_of(sizes))
        job = dataclasses.replace(job, batch_size=rows)
    there = resident.resident(job, sizes, target.chip)
    widest, chosen = job, ""  # widest: the job that proposals start from
    if job.remat == "auto":
        remat, needs = proposals.choose_remat(job, sizes, target.chip, limit, there)
        # What auto would choose for a larger batch.
        widest = dataclasses.replace(job, remat=model_config.REMAT[0])
        job = dataclasses.replace(job, remat=remat)
        chosen = "--remat auto is " + console.remat(remat, needs, limit) + "\n" if needs else ""
    memory = device_memory.memory(job, sizes, target.chip, there)
    found: output.Report = {
        "model": settings.model.model,
        "job": _settings(job),
        "target": asked.get("target") or f"{host.count} × {host.kind}",
        "mesh": sizes,
        "memory": {**memory._asdict(), "total": memory.total, "generating": memory.generating},
    }
    show = output.printer(asked)
    show(f"plan of {console.near(settings.model.model)}: {_flags(job)}")
    show(f"on {found['target']}, mesh " + console.pairs(sizes) + "\n" + chosen)
    compiled: programs.Compiled | str = "--no-compile"
    if not asked.get("no_compile"):
        compiled = output.compile_(job, asked.get("target"), sizes)
    found["xla"] = compiled if isinstance(compiled, str) else compiled._asdict()
    need = memory.need(None if isinstance(compiled, str) else compiled.peak_bytes)
    fits = None if limit is None else need <= limit
    found |= {"need": need, "limit": limit, "fits": fits}
    _show_memory(show, memory, compiled)
    if limit is not None:
        _show_verdict(show, need, limit, fits, memory, compiled)
        if target.platform == "gpu" and asked.get("target") and "hbm" not in asked:
            show(f"  JAX takes {chips.GPU_SHARE:.0%} of a GPU's memory, unless")
            show("  XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise: then plan with --hbm")
    found |= _show_operations(show, job, sizes, there, target, compiled)
    if limit is not None:
        found |= _show_proposals(show, widest, sizes, target.chip, limit, there, fits, asked)
    if asked.get("json"):
        print(json.dumps(found, indent=2))
    return 0


def _job(settings: groups.TrainSettings) -> tuple[groups.TrainSettings, Any]:
    """(the settings with the defaults of this base model, the planning.job.Job of a run with them).

    Raises: UserError if it is a sweep.
    """
    from lora_jax.lora import tied_head
    from lora_jax.models import config as model_config
    from lora_jax.training import planned, setup, single_tokens, starting

    if settings.loop.sweep:
        count = planned.num_adapters(settings)
        raise errors.UserError(
            expected="a job that trains one adapter",
            found=f"--sweep with {count} adapters",
            do=f"plan without --sweep and with --batch-size "
            f"{count * settings.loop.batch_size}, the sequences that it computes at a time; "
            f"A and B, their moments and gradients take {count} times as much",
        )
    settings, start = starting.find(settings, resuming=False)
    base = hub.config_folder(settings.model.model, settings.model.revision)
    architecture = model_config.load(base)
    context = architecture.context
    settings = setup.with_targets(settings, architecture).replace(
        dtype=settings.model.dtype or architecture.dtype,
        quant=settings.model.resolve_quant(architecture, base),
        seq_len=settings.data.resolve_seq_len(context),
    )
    if start:
        num_tokens = tied_head.num_tokens(start.adapter, architecture, str(start.folder))
        architecture = dataclasses.replace(architecture, vocab_size=num_tokens)
    # The rows of the new tokens besides those of the base are too few to matter.
    new = (*settings.model.add_tokens, *settings.model.add_special_tokens)
    settings = single_tokens.with_new(settings, architecture, new)
    return settings, planned.job(settings, architecture, _generation(settings, context))


def _settings(job) -> output.Report:
    names = ("dtype", "quant", "remat", "batch_size", "grad_accum", "seq_len", "generation", "beta")
    return {name: getattr(job, name) for name in names} | {"rank": job.lora.rank}


def _flags(job) -> str:
    return (f"--quant {job.quant} --dtype {job.dtype} --rank {job.lora.rank} --remat {job.remat} "
            f"--batch-size {job.batch_size} --grad-accum {job.grad_accum} "
            f"--seq-len {job.seq_len}" + (" --dpo" if job.beta else ""))  # fmt: skip


def _generation(settings: groups.TrainSettings, context: int) -> tuple[int, int, int] | None:
    """Upper bounds of (prompts at a time, prompt tokens, new tokens); None without generation.

    Without a tokenizer each byte counts as a token. Held-out prompts with answers count seq_len.
    """
    from lora_jax.generation import limits
    from lora_jax.training import scoring

    prompts = settings.prompts.prompt
    asked = []
    if prompts:
        longest = max(len(text.encode()) for text in prompts) + 1  # for BOS
        new = settings.prompts.max_new_tokens
        # A prompt has at least one token.
        limits.check_length(1, new, context)
        length = min(-(-longest // 16) * 16, context - new)
        asked.append((min(len(prompts), scoring.SLOTS), length, new))
    if settings.eval.exact_match:
        asked.append((min(settings.eval.exact_match, scoring.SLOTS), settings.data.seq_len, 0))
    return max(asked, key=lambda each: each[0] * (each[1] + each[2]), default=None)


def _show_memory(show, memory, compiled) -> None:
    output.show_memory(show, memory.resident | memory.kept, memory.work, memory.total)
    for name, size in memory.generation.items():
        show(output.row(f"when generating: {name}", size, "(not during a step)"))
    if isinstance(compiled, str):
        show(f"\nXLA's own plan: none: {compiled}")
    else:
        error = memory.total / compiled.peak_bytes - 1
        show(f"\nXLA's own plan, compiled in {compiled.seconds:.0f} s")
        show(output.row("peak", compiled.peak_bytes, f"(planned {error:+.1%})"))
        show(output.row("arguments", compiled.argument_bytes))
        show(output.row("temporaries, as they are laid out", compiled.temp_bytes))


def _show_verdict(show, need: int, limit: int, fits: bool, memory, compiled) -> None:
    when = ", when generating" if need == memory.generating else ""
    verdict = "fits" if fits else "does not fit"
    show(f"\n{verdict}: {console.size(need)} of {console.size(limit)}{when}")
    laid_out = 0
    if not isinstance(compiled, str):
        laid_out = compiled.argument_bytes + compiled.temp_bytes
    if fits and limit < laid_out:
        show(f"  barely: with the gaps between arrays it takes {console.size(laid_out)}")


def _show_operations(show, job, sizes, there, target, compiled) -> output.Report:
    from lora_jax.planning import operations as plan

    operations = plan.operations(job)
    useful = plan.useful(job)
    moved = plan.bytes_moved(job, sizes, there, target.platform)
    collectives = None if isinstance(compiled, str) else compiled.collectives
    show("\nan optimizer step, all devices together")
    for name, flops in operations._asdict().items():
        show(output.row(f"{name}, floating point operations", f"{flops / 1e12:.3g} T"))
    again = f"({1 - useful / operations.total:.0%} overhead)"
    show(output.row("total", f"{operations.total / 1e12:.4g} T", again))
    show("each device")
    show(output.row("bytes read and written", moved, "(an estimate)"))
    for kind, total in (collectives or {}).items():
        show(output.row(f"{kind}, received", total["bytes"], f"({total['count']} times)"))
    if collectives is not None and not collectives:
        show(output.row("collectives", "none"))
    found = {
        "flops": {**operations._asdict(), "total": operations.total, "useful": useful},
        "bytes_moved": moved,
    }
    if target.peaks is None:
        show("  the peaks of this device are not published: no lower bound of the time")
        return found
    least = plan.floor(operations.total, moved, collectives, target)
    tokens = job.batch_size * job.grad_accum * job.length
    mfu = useful / target.count / target.peaks.flops / least.seconds
    bound = max(least._fields, key=lambda name: getattr(least, name) or 0)
    show("\nlower bound of the time: at the published peaks, which no program reaches")
    for name, seconds in least._asdict().items():
        shown = "not known" if seconds is None else f"{seconds:.4g} s"
        show(output.row(f"step, {name} alone", shown))
    show(output.row("step, at least", f"{least.seconds:.4g} s", f"({bound})"))
    show(output.row("tokens/s, at most", f"{tokens / least.seconds:,.0f}"))
    show(output.row("MFU, at most", f"{mfu:.0%}", "(of work done once)"))
    return found | {
        "floor": {**least._asdict(), "seconds": least.seconds},
        "tokens_per_second_at_most": tokens / least.seconds,
        "mfu_at_most": mfu,
    }


def _show_proposals(
    show, job, sizes, chip: str, limit: int, there, fits: bool, asked
) -> output.Report:
    """What would fit; for the first proposal also whether XLA agrees."""
    from lora_jax.planning import memory, proposals

    found = proposals.propose(job, sizes, chip, limit, there)
    percent = f"{proposals.HEADROOM:.0%}"
    show(f"\nwhat would fit in {percent} of {console.size(limit)}, all else unchanged")
    names = {
        "batch_size": "the largest --batch-size",
        "seq_len": "the longest --seq-len",
        "remat": "the fastest --remat",
    }
    values: output.Report = {}
    for field, name in names.items():
        proposal = getattr(found, field)
        values[field] = proposal and getattr(proposal, field)
        size = proposal and memory.memory(proposal, sizes, chip, there).need()
        value = "nothing" if proposal is None else str(values[field])
        note = "" if size is None else f"({console.size(size)})"
        show(output.row(name, value, note))
    tried = found.batch_size or found.remat or found.seq_len
    answer: output.Report = {"proposals": values}
    if not fits:
        show("to make it fit:")
        changes = proposals.changes(job, sizes, chip, limit, there)
        ways = [(flags, changed.need()) for flags, changed in changes]
        for flags, need in ways:
            show(f"  {flags}  ({console.size(need)})")
        if not ways:
            show("  no change of these settings; use a smaller model, or larger devices")
        answer["changes"] = dict(ways)
    if tried is not None and tried != job and not asked.get("no_compile"):
        compiled = output.compile_(tried, asked.get("target"), sizes)
        show(f"\nthe first of these, compiled: {_flags(tried)}")
        if isinstance(compiled, str):
            show(f"  no plan by XLA: {compiled}")
            answer["proposal_xla"] = compiled
        else:
            need = memory.memory(tried, sizes, chip, there).need(compiled.peak_bytes)
            agrees = "agrees: " if need <= limit else "does not agree: "
            show(f"  XLA {agrees}{console.size(need)} of {console.size(limit)}")
            answer["proposal_xla"] = compiled._asdict()
    return answer


def flags(**where: Any) -> arguments.Flags:
    """Its own flags, and those of `train`. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, short=MAIN, **where)
    flags.group("planning")
    flags.switch("--serve", "plan a server, which has other flags: plan --serve --help")
    train.add_planning(flags)
    train.add_run(flags)
    return flags


def parse(argv: list[str] | None = None) -> train.Asked | plan_serve.Settings:
    """What the flags ask for."""
    if "--serve" in (sys.argv[1:] if argv is None else argv):
        return plan_serve.parse(argv)
    return train.asked(flags(), argv)


def main() -> int:
    asked = parse()
    if isinstance(asked, plan_serve.Settings):
        return plan_serve.run(asked)
    if asked.settings is None:
        raise errors.UserError(
            expected="the flags of a run", found="--resume", do="give the flags of the run instead"
        )
    return run(asked)
