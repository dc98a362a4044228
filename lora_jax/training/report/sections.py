"""The sections of the page: curves, scores, memory, time, base and data, device and versions."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax import console
from lora_jax.training.adapters import sweep_table
from lora_jax.training.output import run_folder
from lora_jax.training.report import curves, formatting, run_files
from lora_jax.training.report.markup import Markup, joined, tag

Values = Mapping[str, Any]  # {label: value as run.json has it}


def section(heading: str, inside: Markup) -> Markup:
    """A section with a heading; "" if it is empty."""
    return tag("section", tag("h2", heading), inside) if inside else Markup()


def training(metrics: run_files.Metrics, names: Sequence[str]) -> Markup:
    """The curves. names: the members of a sweep, if it is one."""
    if names:
        charts = [
            curves.compared(metrics, {f"{key}/{name}": name for name in names}, heading, what)
            for key, heading, what in (
                ("loss", "Loss", "loss"),
                ("eval_loss", "Held-out loss", "loss"),
                ("grad_norm", "Gradient norm", "gradient norm"),
                ("lr", "Learning rate", "learning rate"),
            )
        ]
        return tag("div", *charts, class_="pair")
    large = curves.chart(metrics, "loss", "Loss", "loss", "eval_loss")
    pairs = [
        curves.chart(metrics, "reward_accuracy", "Pairs in order", "share", "eval_reward_accuracy"),
        curves.chart(metrics, "reward_margin", "Reward margin", "margin", "eval_reward_margin"),
    ]
    small = [
        curves.chart(metrics, "lr", "Learning rate", "learning rate"),
        curves.chart(metrics, "grad_norm", "Gradient norm", "gradient norm"),
        curves.chart(metrics, "tokens_per_second", "Tokens per second", "tokens/s"),
    ]
    if not large and not any(pairs + small):
        return tag("p", "No step has been logged.", class_="note")
    logged = curves.series(metrics, "loss", curves.POINTS)
    size = max((point.last - point.first + 1 for point in logged), default=1)
    note = f"Each point is the mean of {size} steps, in a band from the least to the greatest."
    return joined([large, tag("div", *pairs, class_="pair") if any(pairs) else "",
                   tag("div", *small, class_="three"),
                   tag("p", note, class_="note below") if size > 1 else ""])  # fmt: skip


def compared(
    record: run_folder.RunJson, metrics: run_files.Metrics, names: Sequence[str]
) -> Markup:
    """A table that compares the members of a sweep."""
    found = sweep_table.table(names, metrics)
    shown = sweep_table.columns(found, perplexity=not record.get("settings", {}).get("dpo"))
    best = sweep_table.best(found)
    body = [
        tag("tr", tag("th", name, " ← best" if name == best else "", scope="row"),
            *(tag("td", sweep_table.cell(own, key)) for key in shown))
        for name, own in found.items()
    ]  # fmt: skip
    top = [tag("th", heading, scope="col") for heading in shown.values()]
    return tag("table", tag("thead", tag("tr", tag("td"), *top)), tag("tbody", *body))


def scores(record: run_folder.RunJson, metrics: run_files.Metrics) -> Markup:
    """The held-out scores of the first and last evaluation, and of the best step if it is kept."""
    rows = [row for row in metrics if "eval_loss" in row]
    if not rows:
        flags = (tag("code", flag) for flag in ("--eval-dataset", "--eval-every"))
        return tag("p", "Nothing held out was scored; ", next(flags), " or ", next(flags),
                   " asks for it.", class_="note")  # fmt: skip
    columns = [("before", rows[0])] if rows[0]["step"] == 0 else []
    if rows[-1]["step"] or not columns:
        finished = record.get("status") == "finished"
        columns.append(("after" if finished else "so far", rows[-1]))
    best = record.get("best")
    if best and best["step"] != rows[-1]["step"]:
        columns.append(("best", best))
    lines = [
        ("Loss", "eval_loss", formatting.loss),
        ("Pairs in order", "eval_reward_accuracy", "{:.1%}".format),
        ("Reward margin", "eval_reward_margin", formatting.short),
        ("Exact match", "exact_match", "{:.1%}".format),
    ]
    if not record.get("settings", {}).get("dpo"):  # its loss is not per token
        lines.insert(
            1,
            ("Perplexity", "eval_loss", lambda loss: formatting.short(formatting.perplexity(loss))),
        )
    body = [
        tag("tr", tag("th", label, scope="row"), *(_score(row, name, shown) for _, row in columns))
        for label, name, shown in lines
        if any(name in row for _, row in columns)
    ]
    top = [
        tag("th", label, tag("small", f"step {row['step']:,}"), scope="col")
        for label, row in columns
    ]
    table = tag("table", tag("thead", tag("tr", tag("td"), *top)), tag("tbody", *body))
    text = f"The adapter is of step {best['step']:,}, the best." if best else ""
    return joined([table, tag("p", text, class_="note below") if text else ""])


def _score(row: run_folder.MetricsLine, name: str, shown: Callable[[float], str]) -> Markup:
    value = formatting.finite(row.get(name))
    if value is None:
        return tag("td", "not finite" if name in row else "–")
    return tag("td", shown(value))


def memory(record: run_folder.RunJson) -> Markup:
    """The planned memory compared with the measured one."""
    planned = record.get("memory", {})
    rows = [
        ("Before loading", formatting.finite(planned.get("bytes_before"))),
        ("Step, planned", formatting.finite(planned.get("planned_bytes"))),
        ("Peak, measured", formatting.finite(record.get("peak_bytes"))),
    ]
    return bars([(label, value, console.size(round(value))) for label, value in rows if value])


def times(record: run_folder.RunJson, metrics: run_files.Metrics) -> Markup:
    """Seconds by phase, with the share of compiling and of waiting for data."""
    spent = run_files.seconds(record)
    shown = bars([(name, value, formatting.duration(value)) for name, value in spent.items()])
    notes = []
    if (seconds := formatting.finite(record.get("compile_seconds"))) is not None:
        notes.append(f"Of this, compiling took {formatting.duration(seconds)}.")
    waits = [formatting.finite(row.get("data_wait")) for row in metrics]
    if waits := [wait for wait in waits if wait is not None]:
        notes.append(f"A step waited for data for {statistics.mean(waits):.1%} of its time.")
    return joined([shown, *(tag("p", text, class_="note below") for text in notes)])


def bars(rows: Sequence[tuple[str, float, str]]) -> Markup:
    """A table with a bar for each (label, value, text)."""
    if not rows:
        return Markup()
    most = max(value for _, value, _ in rows) or 1
    lines = [
        tag("tr", tag("th", label, scope="row"), tag("td", text),
            tag("td", tag("svg", tag("rect", width=f"{100 * value / most:.2f}%", height="100%")),
                class_="bar", aria_hidden="true"))
        for label, value, text in rows
    ]  # fmt: skip
    return tag("table", tag("tbody", *lines), class_="bars")


def origin(record: run_folder.RunJson) -> Values:
    """Which base model and data the run used."""
    base = record.get("base", {})
    num_bytes = base.get("bytes")
    found = {
        "base": base.get("id"),
        "base, commit": base.get("commit"),
        "base, size": console.size(num_bytes) if formatting.finite(num_bytes) else None,
        "base, checksum": base.get("checksum"),
    }
    found |= {f"data, {name}": mark for name, mark in record.get("data", {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def environment(record: run_folder.RunJson) -> Values:
    """Which devices and versions the run used."""
    mesh = console.pairs(record.get("mesh", {}))
    found = {"device": record.get("device"), "mesh": mesh, **record.get("versions", {})}
    return {name: value for name, value in found.items() if value}


def listed(values: Values, class_: str = "") -> Markup:
    """A list of names with their values; "" if it is empty."""
    if not values:
        return Markup()
    rows = [
        tag(
            "div",
            tag("dt", name.replace("_", "-")),
            tag("dd", formatting.shortened(formatting.setting(value))),
        )
        for name, value in values.items()
    ]
    return tag("dl", *rows, class_=f"listed {class_}".strip())
