"""The top of the page: the name of the model, how the run ended, and the most important numbers."""

import pathlib
import statistics
from collections.abc import Iterable

from lora_jax import console
from lora_jax.training.adapters import sweep_table
from lora_jax.training.output import run_folder
from lora_jax.training.report import formatting, run_files
from lora_jax.training.report.markup import Markup, tag


def title(record: run_folder.RunJson) -> str:
    """The name of the base model: a hub id, or the last part of a path."""
    name = str(record.get("base", {}).get("id", "run"))
    path = pathlib.Path(name)
    return (path.name or name) if path.is_absolute() or len(path.parts) > 2 else name


def header(record: run_folder.RunJson, metrics: run_files.Metrics, name: str) -> Markup:
    """Name, status, main settings and main numbers."""
    settings, status = record.get("settings", {}), str(record.get("status", "unknown"))
    status, _, why = status.partition(": ")
    kind = status.split(" ")[0]
    sign = {"finished": "✓", "failed": "✗", "stopped": "■", "running": "▸"}.get(kind, "?")
    about = [
        length(record.get("num_steps"), metrics),
        f"sweep {settings['sweep']}"
        if settings.get("sweep")
        else f"rank {settings['rank']}"
        if "rank" in settings
        else "",
        formatting.setting(settings["targets"]) if settings.get("targets") else "",
        f"base in {settings['quant']}" if settings.get("quant", "none") != "none" else "",
        str(settings.get("dtype") or ""),
    ]
    numbers = [
        tag("div", tag("dt", label), tag("dd", value), tag("dd", note, class_="note"))
        for label, value, note in figures(record, metrics)
    ]
    return tag(
        "header", tag("h1", name),
        tag("p", tag("span", f"{sign} {status}", class_=f"status {kind}"),
            " · ".join(filter(None, about)), class_="about"),
        tag("p", formatting.shortened(why), class_="bad") if why else "",
        tag("dl", *numbers, class_="figures") if numbers else "",
    )  # fmt: skip


def length(planned: int | None, metrics: run_files.Metrics) -> str:
    """The number of steps, such as "200 steps" or "120 of 200 steps"."""
    if not planned:
        return ""
    done = max((row["step"] for row in metrics), default=0)
    whole = f"{planned:,} {'step' if planned == 1 else 'steps'}"
    return whole if done >= planned else f"{done:,} of {whole}"


def figures(
    record: run_folder.RunJson, metrics: run_files.Metrics
) -> Iterable[tuple[str, str, str]]:
    """(label, value, note) of the most important numbers."""
    found = sweep_table.table(run_files.sweep_members(record), metrics)
    if best := sweep_table.best(found):
        by = "eval_loss" if "eval_loss" in found[best] else "loss"
        label = {"eval_loss": "held-out loss", "loss": "training loss"}[by]
        yield "Best", best, f"{label} {formatting.loss(found[best][by])}"
    for name, label, shown in (
        ("eval_loss", "Held-out loss", formatting.loss),
        ("eval_reward_accuracy", "Pairs in order", "{:.1%}".format),
        ("exact_match", "Exact match", "{:.1%}".format),
        ("loss", "Training loss", formatting.loss),
    ):
        known = [row for row in metrics if formatting.finite(row.get(name)) is not None]
        if known:
            first, last = known[0], known[-1]
            note = f"step {last['step']}"
            if last["step"] > first["step"]:
                note = f"from {shown(first[name])} at step {first['step']}"
            yield label, shown(last[name]), note
    for name, label, shown, note in (
        ("tokens_per_second", "Throughput", lambda x: f"{formatting.short(x)}/s", "tokens, median"),
        ("mfu", "MFU", "{:.0%}".format, "of peak FLOP/s, median"),
    ):
        values = [formatting.finite(row.get(name)) for row in metrics[1:]]
        if values := [value for value in values if value is not None]:
            yield label, shown(statistics.median(values)), note
    if formatting.finite(record.get("peak_bytes")):
        of = "of this process" if "cpu" in str(record.get("device")) else "of one device"
        yield "Peak memory", console.size(record["peak_bytes"]), of
    if seconds := run_files.seconds(record):
        yield "Time", formatting.duration(sum(seconds.values())), ", ".join(seconds)
