"""A run as one page, report.html, from what the run has left in its folder."""

import html
import json
import math
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax import console, errors
from lora_jax.training.adapters import sweep_table
from lora_jax.training.report import curves
from lora_jax.training.report.curves import Markup, joined, tag
from lora_jax.training.settings import convert

TEXT = 4000  # characters of a text that are shown


# ------------------------------------------------------------------------- numbers


def four(loss: float) -> str:
    """A loss as the run prints it."""
    return f"{loss:.4f}"


def duration(seconds: float) -> str:
    """Such as 43.2 s, 12 min 5 s or 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


# ------------------------------------------------------------------------- parts of the page


def render(record: Mapping[str, Any], metrics: curves.Metrics) -> str:
    """The page. record: what run.json holds; metrics: the rows of metrics.jsonl."""
    metrics = [row for row in metrics if isinstance(row.get("step"), int)]
    settings = record.get("settings", {})
    if sweep := settings.get("sweep"):  # which says it
        settings = {name: value for name, value in settings.items() if name != sweep.split("=")[0]}
    name, names = title(record), swept(record)
    parts = [
        header(record, metrics, name),
        section("Training", training(metrics, names)),
        section("Adapters", compared(record, metrics, names) if names else Markup()),
        tag(
            "div",
            section("Held-out scores", Markup() if names else scores(record, metrics)),
            section("Memory", memory(record)),
            section("Time", times(record, metrics)),
            class_="some",
        ),
        section("Samples", samples(record.get("samples", {}))),
        section("Settings", listed(settings, "many")),
        tag(
            "div",
            section("Base and data", listed(origin(record))),
            section("Device and versions", listed(surroundings(record))),
            class_="two",
        ),
    ]
    return PAGE.format(title=html.escape(f"{name}: report"), style=STYLE, body=joined(parts))


def section(heading: str, inside: Markup) -> Markup:
    return tag("section", tag("h2", heading), inside) if inside else Markup()


def title(record: Mapping[str, Any]) -> str:
    """The base's name: a hub id, or the last part of a path."""
    name = str(record.get("base", {}).get("id", "run"))
    path = pathlib.Path(name)
    return (path.name or name) if path.is_absolute() or len(path.parts) > 2 else name


def header(record: Mapping[str, Any], metrics: curves.Metrics, name: str) -> Markup:
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
        text_of(settings["targets"]) if settings.get("targets") else "",
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
        tag("p", cut(why), class_="bad") if why else "",
        tag("dl", *numbers, class_="figures") if numbers else "",
    )  # fmt: skip


def length(planned: int | None, metrics: curves.Metrics) -> str:
    """Such as 200 steps, or 120 of 200 steps."""
    if not planned:
        return ""
    done = max((row["step"] for row in metrics), default=0)
    whole = f"{planned:,} {'step' if planned == 1 else 'steps'}"
    return whole if done >= planned else f"{done:,} of {whole}"


def figures(record: Mapping[str, Any], metrics: curves.Metrics) -> Iterable[tuple[str, str, str]]:
    """(label, value, note) of what is looked at first."""
    found = sweep_table.table(swept(record), metrics)
    if best := sweep_table.best(found):
        by = "eval_loss" if "eval_loss" in found[best] else "loss"
        label = {"eval_loss": "held-out loss", "loss": "training loss"}[by]
        yield "Best", best, f"{label} {four(found[best][by])}"
    for name, label, shown in (
        ("eval_loss", "Held-out loss", four),
        ("eval_reward_accuracy", "Pairs in order", "{:.1%}".format),
        ("exact_match", "Exact match", "{:.1%}".format),
        ("loss", "Training loss", four),
    ):
        known = [row for row in metrics if curves.finite(row.get(name)) is not None]
        if known:
            first, last = known[0], known[-1]
            note = f"step {last['step']}"
            if last["step"] > first["step"]:
                note = f"from {shown(first[name])} at step {first['step']}"
            yield label, shown(last[name]), note
    for name, label, shown, note in (
        ("tokens_per_second", "Throughput", lambda x: f"{curves.short(x)}/s", "tokens, median"),
        ("mfu", "MFU", "{:.0%}".format, "of peak FLOP/s, median"),
    ):
        values = [curves.finite(row.get(name)) for row in metrics[1:]]
        if values := [value for value in values if value is not None]:
            yield label, shown(statistics.median(values)), note
    if curves.finite(record.get("peak_bytes")):
        yield "Peak memory", console.size(record["peak_bytes"]), measured_on(record)
    if seconds := seconds_of(record):
        yield "Time", duration(sum(seconds.values())), ", ".join(seconds)


def measured_on(record: Mapping[str, Any]) -> str:
    return "of this process" if "cpu" in str(record.get("device")) else "of one device"


def swept(record: Mapping[str, Any]) -> list[str]:
    """The members of a sweep; none of a run with one adapter."""
    asked = record.get("settings", {}).get("sweep")
    return list(convert.sweep(asked)[1]) if asked else []


def compared(record: Mapping[str, Any], metrics: curves.Metrics, names: Sequence[str]) -> Markup:
    """The members of a sweep side by side."""
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


def training(metrics: curves.Metrics, names: Sequence[str]) -> Markup:
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


def scores(record: Mapping[str, Any], metrics: curves.Metrics) -> Markup:
    """The held-out scores of the first and the last evaluation, and of the best step if kept."""
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
        ("Loss", "eval_loss", four),
        ("Pairs in order", "eval_reward_accuracy", "{:.1%}".format),
        ("Reward margin", "eval_reward_margin", curves.short),
        ("Exact match", "exact_match", "{:.1%}".format),
    ]
    if not record.get("settings", {}).get("dpo"):  # whose loss is not of tokens
        lines.insert(1, ("Perplexity", "eval_loss", lambda loss: curves.short(perplexity(loss))))
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


def _score(row: Mapping[str, Any], name: str, shown) -> Markup:
    value = curves.finite(row.get(name))
    if value is None:
        return tag("td", "not finite" if name in row else "–")
    return tag("td", shown(value))


def samples(answers: Mapping[str, Any]) -> Markup:
    """The same held-out prompts answered before and after training."""
    before, after = answers.get("before") or [], answers.get("after") or []
    shown = []
    for index in range(max(len(before), len(after))):
        old, new = (part[index] if index < len(part) else None for part in (before, after))
        one = new or old
        cells = [answer(label, part) for label, part in (("before", old), ("after", new)) if part]
        if not any(part and right(part) for part in (old, new)):
            cells.append(tag("div", tag("h4", "expected"), verbatim(one["expected"])))
        shown.append(tag("article", tag("h3", "Prompt"), verbatim(one["prompt"], "prompt"),
                         tag("div", *cells, class_="answers")))  # fmt: skip
    return joined(shown)


def answer(label: str, found: Mapping[str, str]) -> Markup:
    verdict = ("good", "✓ as expected") if right(found) else ("bad", "✗ not as expected")
    heading = tag("h4", label, " ", tag("span", verdict[1], class_=verdict[0]))
    return tag("div", heading, verbatim(found["text"]))


def right(found: Mapping[str, str]) -> bool:
    return found["text"].strip() == found["expected"].strip()


def verbatim(text: str, class_: str | None = None) -> Markup:
    # HTML leaves out a newline that a <pre> begins with: this one.
    return tag("pre", Markup("\n"), cut(text.rstrip("\n")) or "(nothing)", dir="auto",
               class_=class_)  # fmt: skip


def cut(text: str) -> str:
    """`text`, without its middle if it is long."""
    if len(text) <= TEXT:
        return text
    half = TEXT // 2
    return f"{text[:half]}\n… {len(text) - TEXT} characters left out …\n{text[-half:]}"


def memory(record: Mapping[str, Any]) -> Markup:
    """What was planned beside what was measured."""
    told = record.get("memory", {})
    rows = [
        ("Before loading", curves.finite(told.get("bytes_before"))),
        ("Step, planned", curves.finite(told.get("planned_bytes"))),
        ("Peak, measured", curves.finite(record.get("peak_bytes"))),
    ]
    return bars([(label, value, console.size(round(value))) for label, value in rows if value])


def seconds_of(record: Mapping[str, Any]) -> dict[str, float]:
    found = {name: curves.finite(value) for name, value in record.get("seconds", {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def times(record: Mapping[str, Any], metrics: curves.Metrics) -> Markup:
    shown = bars([(name, value, duration(value)) for name, value in seconds_of(record).items()])
    notes = []
    if (seconds := curves.finite(record.get("compile_seconds"))) is not None:
        notes.append(f"Of this, compiling took {duration(seconds)}.")
    waits = [curves.finite(row.get("data_wait")) for row in metrics]
    if waits := [wait for wait in waits if wait is not None]:
        notes.append(f"A step waited for data for {statistics.mean(waits):.1%} of its time.")
    return joined([shown, *(tag("p", text, class_="note below") for text in notes)])


def bars(rows: Sequence[tuple[str, float, str]]) -> Markup:
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


def origin(record: Mapping[str, Any]) -> dict[str, Any]:
    base = record.get("base", {})
    told = {"base": base.get("id"), "base, commit": base.get("commit"),
            "base, size": console.size(base["bytes"]) if curves.finite(base.get("bytes")) else None,
            "base, checksum": base.get("checksum")}  # fmt: skip
    told |= {f"data, {name}": mark for name, mark in record.get("data", {}).items()}
    return {name: value for name, value in told.items() if value is not None}


def surroundings(record: Mapping[str, Any]) -> dict[str, Any]:
    mesh = console.pairs(record.get("mesh", {}))
    told = {"device": record.get("device"), "mesh": mesh, **record.get("versions", {})}
    return {name: value for name, value in told.items() if value}


def listed(values: Mapping[str, Any], class_: str = "") -> Markup:
    if not values:
        return Markup()
    rows = [
        tag("div", tag("dt", name.replace("_", "-")), tag("dd", cut(text_of(value))))
        for name, value in values.items()
    ]
    return tag("dl", *rows, class_=f"listed {class_}".strip())


def text_of(value: Any) -> str:
    """A setting as it would be typed; – for what is not set."""
    if value is None or value in ([], {}, ""):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}={each}" for key, each in value.items())
    return str(value)


# ------------------------------------------------------------------------- the look

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """\
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --text: #1b1b1a; --soft: #5c5b57; --rule: #e3e2dd;
  --train: #2563c9; --held: #b4500b; --good: #1a7440; --bad: #b3261e; --warn: #8a5a00;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131416; --card: #1b1c1f; --text: #ececea; --soft: #a5a6aa; --rule: #34363b;
    --train: #7cb0ff; --held: #ffa45c; --good: #6fd08c; --bad: #ff8a80; --warn: #f0c060;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 var(--sans); }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1, h2, h3, h4, p, dl, dd, figure, pre { margin: 0; }
h1 { font-size: 1.75rem; font-weight: 650; line-height: 1.2; letter-spacing: -0.015em; }
h2 { font-size: 1.1rem; font-weight: 650; margin-bottom: 0.85rem; }
h3 { font-size: 0.9rem; font-weight: 600; }
h4, .note, small, dt { font-size: 0.8rem; font-weight: 400; color: var(--soft); }
h1, p, dd { overflow-wrap: anywhere; }
section { margin-top: 2.75rem; break-inside: avoid; min-width: 0; }
.about { margin-top: 0.6rem; color: var(--soft); }
.status { margin-right: 0.75rem; font-weight: 600; color: var(--warn); }
.status.finished, .good { color: var(--good); }
.status.failed, .bad { color: var(--bad); }
.status.running { color: var(--train); }
.figures, article, .chart { background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr));
  gap: 1.25rem; margin-top: 1.5rem; padding: 1.1rem 1.25rem; }
.figures dd:not(.note) { font-size: 1.3rem; font-weight: 600; line-height: 1.4;
  letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.two, .three, .pair, .some, .answers { display: grid; gap: 1rem;
  grid-template-columns: minmax(0, 1fr); }
.two, .some { row-gap: 0; }
.below { margin-top: 0.6rem; }
.chart { padding: 0.9rem 1.1rem 0.8rem; }
.chart.loss, .pair { margin-bottom: 1rem; }
figcaption { display: flex; flex-wrap: wrap; align-items: center; gap: 0.25rem 1.1rem; }
.key { font-size: 0.8rem; color: var(--soft); }
.key::before { content: ""; display: inline-block; vertical-align: 0.22em; width: 1.1rem;
  margin-right: 0.4rem; border-top: 2px solid var(--train); }
.key.held::before { width: 9px; height: 9px; border: 0; border-radius: 50%;
  background: var(--held); vertical-align: 0; }
.key.broken::before { border-top: 2px dotted var(--bad); }
.plot { padding: 0.9rem 0.9rem 3rem 3rem; }
.plot > svg { display: block; width: 100%; height: 9rem; overflow: visible; }
.several .plot > svg { height: 14rem; }
.loss .plot > svg { height: 18rem; }
svg svg { overflow: visible; }
svg text { font: 12px var(--sans); fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); }
.tick { stroke: var(--soft); }
.line { fill: none; stroke: var(--train); stroke-width: 1.75; stroke-linejoin: round;
  stroke-linecap: round; vector-effect: non-scaling-stroke; }
.line.own { stroke: currentColor; }
.own circle { fill: currentColor; }
.key.own::before { border-top-color: currentColor; }
.line.held { stroke: var(--held); stroke-width: 1; }
.band { fill: var(--train); opacity: 0.22; }
.alone { fill: var(--train); }
circle.held { fill: var(--held); stroke: var(--card); stroke-width: 1.5; }
line.broken { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 2 3; }
.told { fill: transparent; }
.told:hover { fill: var(--text); opacity: 0.07; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.75rem 0.4rem 0; border-bottom: 1px solid var(--rule);
  text-align: right; font-weight: 400; }
th[scope="row"] { text-align: left; color: var(--soft); }
thead th { font-weight: 600; vertical-align: bottom; }
th small { display: block; }
td:last-child, th:last-child { padding-right: 0; }
section > table { width: 100%; }
.bars th, .bars td { white-space: nowrap; }
.bars .bar { width: 40%; }
.bar svg { display: block; width: 100%; height: 0.6rem; }
.bar rect { fill: var(--train); rx: 2px; }
article { padding: 1rem 1.1rem; }
article + article { margin-top: 1rem; }
article h3 { font-size: 0.8rem; font-weight: 400; color: var(--soft); }
pre { font: 13px/1.5 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 24rem; overflow-y: auto; }
code { font-family: var(--mono); white-space: nowrap; }
.answers { margin-top: 0.9rem; }
.answers h4 { margin-bottom: 0.3rem; }
.answers pre { padding: 0.65rem 0.8rem; background: var(--page); border: 1px solid var(--rule);
  border-radius: 6px; }
.listed > div { display: grid; grid-template-columns: minmax(8rem, 1fr) 2.2fr; gap: 1rem;
  padding: 0.3rem 0; border-bottom: 1px solid var(--rule); break-inside: avoid; }
.listed dt { line-height: 1.6; }
.listed dd { font: 13px/1.5 var(--mono); min-width: 0; }
@media (min-width: 46rem) {
  .two { grid-template-columns: repeat(2, minmax(0, 1fr)); column-gap: 3rem; }
  .pair { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .some { grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); column-gap: 3rem; }
  .answers { grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }
  .many { columns: 2; column-gap: 3rem; }
}
@media (max-width: 30rem) {
  main { padding: 1.5rem 1rem 3rem; }
  .figures { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .chart { padding-inline: 0.8rem; }
  .plot { padding-left: 2.6rem; }
  .loss .plot > svg { height: 13rem; }
}
"""


# ------------------------------------------------------------------------- files


def read(folder: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(run.json, the rows of metrics.jsonl, none where there is no file).

    Raises: UserError for a folder without a run.
    """
    try:
        record = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        record, found = None, getattr(error, "strerror", None) or str(error)
    if not isinstance(record, dict):
        raise errors.UserError(
            expected="the folder of a run, with its run.json",
            found="no JSON object" if record is not None else found,
            where=str(folder / "run.json"),
            do="name a folder that train.py has written, such as runs/…",
        )
    path, rows = folder / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # a line cut off by a kill
    return record, [row for row in rows if isinstance(row, dict)]


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes report.html into the folder of a run, in one step.

    Raises: UserError for a folder without a run, or one that cannot be written.
    """
    path, page = folder / "report.html", render(*read(folder))
    new = path.with_suffix(".new")
    try:
        new.write_text(page, encoding="utf-8", errors="replace")
        os.replace(new, path)
    except OSError as error:
        raise errors.UserError(
            expected="a run's folder that can be written",
            found=error.strerror or str(error),
            where=str(path),
            do="change its permissions, or free some space",
        ) from None
    return path
