"""Plan the memory and speed of a server, without weights or devices: `lora-jax plan --serve`."""

import dataclasses
import json
from typing import Any, NamedTuple

from lora_jax import console, errors, hub
from lora_jax.cli import arguments, model_flags, serve, train
from lora_jax.cli import plan_output as output
from lora_jax.generation import config as generation_config
from lora_jax.training.settings import groups

DEFAULTS = {"slots": 8, "adapters": 0, "rank": 16, "targets": "all-linear"}
DESCRIPTION = """\
Plan the memory and speed of a server, without weights or devices.

  lora-jax plan --serve --model owner/name --use-4bit --target gpu:h100
  lora-jax plan --serve --slots 64 --context 4096 --adapters 8 --target tpu:v6e
"""
_LIVE = 1024  # tokens of a request for which tokens/s are shown, besides the whole context


class Settings(NamedTuple):
    """What a command line asks for.

    values: slots, adapters, rank and targets. context: None: that of `serve`. kv_dtype: see
    generation.Engine. others: other flags.
    """

    base: groups.ModelSettings
    values: dict[str, Any]
    context: int | None
    kv_dtype: str | None
    others: arguments.Given


def flags(**where: Any) -> arguments.Flags:
    """Its flags. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, DEFAULTS, **where)
    flags.group("planning")
    flags.switch("--serve", "plan a server, not a training job")
    train.add_planning(flags)
    model_flags.add(flags)
    flags.group("serving")
    flags.add("--slots", "requests generated at the same time", type=int, metavar="N")
    flags.add("--context", "maximum number of tokens of prompt and output (default: as in serve, "
              f"the model's, up to {generation_config.DEFAULT_CONTEXT})", type=int,
              metavar="T")  # fmt: skip
    serve.add_kv_dtype(flags)
    flags.add("--adapters", "slots for adapters in one batch", type=int, metavar="X")
    flags.add("--rank", "rank of such a slot", type=int, metavar="R")
    flags.add("--targets", "names of the linear layers that adapters change, or all-linear")
    return flags


def parse(argv: list[str] | None = None) -> Settings:
    """What the flags ask for. Raises: UserError if they contradict each other."""
    typed = model_flags.quantization(flags().typed(argv))
    values = {name: typed.get(name, default) for name, default in DEFAULTS.items()}
    least = {"slots": 1, "context": 1, "adapters": 0, "rank": 1}
    if wrong := [f"--{name} {typed[name]}" for name in least if typed.get(name, 1) < least[name]]:
        raise errors.UserError(expected="at least 1, of --adapters 0", found=wrong)
    names = {field.name for field in dataclasses.fields(groups.ModelSettings)}
    base = groups.ModelSettings(**{name: typed[name] for name in names & typed.keys()})
    return Settings(base, values, typed.get("context"), serve.kv_dtype(typed), typed)


def run(settings: Settings) -> int:
    """Prints the plan."""
    base, values, asked = settings.base, settings.values, settings.others
    limit = output.num_bytes(asked["hbm"]) if "hbm" in asked else None
    folder = hub.config_folder(base.model, base.revision)

    from lora_jax.models import config as model_config
    from lora_jax.parallel import mesh as sharding
    from lora_jax.planning import serving
    from lora_jax.planning import serving_memory as plans

    architecture = model_config.load(folder)
    usual = min(architecture.context, generation_config.DEFAULT_CONTEXT)
    context = settings.context or usual
    if context > architecture.context:
        raise errors.UserError(
            expected=f"at most the model's context of {architecture.context} tokens",
            found=f"--context {context}",
        )
    target, host = output.devices(asked.get("target"))
    limit = limit or host.memory
    job = serving.Serving(
        architecture,
        base.dtype or architecture.dtype,
        base.resolve_quant(architecture, folder),
        context=context,
        kv_dtype=settings.kv_dtype,
        **values,
    )
    if base.mesh:
        sizes = sharding.parse(base.mesh, target.count)
    else:
        whole = plans.known(job, sharding.ONE, target.chip)
        sizes = sharding.default(target.count, sum(whole.arrays.values()), limit)
    known = plans.known(job, sizes, target.chip)
    memory = plans.of(job, sizes, target.chip, known)
    name = asked.get("target") or f"{target.count} × {target.chip}"
    found: output.Report = {
        "model": base.model,
        "job": {
            name: getattr(job, name) for name in ("dtype", "quant", "context", "kv_dtype", *values)
        },
        "target": name,
        "mesh": sizes,
        "memory": {**memory._asdict(), "total": memory.total},
        "limit": limit,
    }
    show = output.printer(asked)
    show(f"plan of serving {console.near(base.model)}: --quant {job.quant} --dtype {job.dtype} "
         f"--slots {job.slots} --context {job.context} --adapters {job.adapters}"
         + (f" --kv-cache-dtype {job.kv_dtype}" if job.kv_dtype else "")
         + (f" --rank {job.rank}" if job.adapters else ""))  # fmt: skip
    show(f"on {name}, mesh " + console.pairs(sizes) + "\n")
    output.show_memory(show, memory.resident, memory.work, memory.total)
    need = memory.total
    if not asked.get("no_compile"):
        need, found["xla"] = _compile(show, job, asked.get("target"), sizes, memory)
    found["need"] = need
    if limit is not None:
        found |= _show_verdict(show, need, limit, job, sizes, target, known)
    if target.peaks is not None:
        found["tokens_per_second_at_most"] = _show_speed(show, job, sizes, target, known)
    if asked.get("json"):
        print(json.dumps(found, indent=2))
    return 0


def _show_verdict(show, need, limit, job, sizes, target, known) -> output.Report:
    """Whether the server fits, and how far it could grow."""
    from lora_jax.planning import serving_memory as plans

    fits = need <= limit
    verdict = "fits" if fits else "does not fit"
    show(f"\n{verdict}: {console.size(need)} of {console.size(limit)}")
    proposals = {
        "slots": plans.most_slots(job, sizes, target.chip, limit, known),
        "context": plans.longest_context(job, sizes, target.chip, limit, known),
    }
    show(f"\nwhat would fit in {plans.HEADROOM:.0%} of {console.size(limit)}, all else unchanged")
    show(output.row("the most --slots", str(proposals["slots"] or "nothing")))
    show(output.row("the longest --context", str(proposals["context"] or "nothing")))
    return {"fits": fits, "proposals": proposals}


def _show_speed(show, job, sizes, target, known) -> dict[int, float]:
    """{tokens of a request: tokens/s at most}."""
    from lora_jax.planning import serving_memory as plans

    show("\nupper bound of the speed: all slots at the published peaks, which no program reaches")
    found = {}
    for live in sorted({min(_LIVE, job.context), job.context}):
        found[live] = plans.tokens_per_second(job, sizes, target, known, live)
        show(output.row(f"tokens/s, requests of {live} tokens", f"{found[live]:,.0f}"))
    return found


def _compile(show, job, target, sizes, memory) -> tuple[int, output.Report]:
    """(the bytes with XLA's temporaries in place of the planned ones, what XLA reports)."""
    found, planned = {}, dict(zip(("decode", "prefill"), memory.work.values(), strict=True))
    show("\nXLA's own temporaries")
    for what in planned:
        compiled = output.compile_(job, target, sizes, what)
        if isinstance(compiled, str):
            show(f"  none of {what}: {compiled}")
            found[what] = compiled
        else:
            note = f"(compiled in {compiled.seconds:.0f} s)"
            show(output.row(what, compiled.temp_bytes, note))
            planned[what], found[what] = compiled.temp_bytes, compiled._asdict()
    need = sum(memory.resident.values()) + max(planned.values())
    show(output.row("total", need, f"(planned {memory.total / need - 1:+.1%})"))
    return need, found
