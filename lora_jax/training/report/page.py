"""report.html: one page that describes a run, made from the files in its folder."""

import html
import os
import pathlib

from lora_jax import errors
from lora_jax.training.output import run_folder
from lora_jax.training.report import header, run_files, samples, sections, style
from lora_jax.training.report.markup import Markup, joined, tag


def render(record: run_folder.RunJson, metrics: run_files.Metrics) -> str:
    """The page as HTML. record: the content of run.json; metrics: the lines of metrics.jsonl."""
    metrics = [row for row in metrics if isinstance(row.get("step"), int)]
    settings = record.get("settings", {})
    if sweep := settings.get("sweep"):  # it already lists the values of that setting
        settings = {name: value for name, value in settings.items() if name != sweep.split("=")[0]}
    name, names = header.title(record), run_files.sweep_members(record)
    parts = [
        header.header(record, metrics, name),
        sections.section("Training", sections.training(metrics, names)),
        sections.section(
            "Adapters", sections.compared(record, metrics, names) if names else Markup()
        ),
        tag(
            "div",
            sections.section(
                "Held-out scores", Markup() if names else sections.scores(record, metrics)
            ),
            sections.section("Memory", sections.memory(record)),
            sections.section("Time", sections.times(record, metrics)),
            class_="some",
        ),
        sections.section("Samples", samples.samples(record.get("samples", {}))),
        sections.section("Settings", sections.listed(settings, "many")),
        tag(
            "div",
            sections.section("Base and data", sections.listed(sections.origin(record))),
            sections.section("Device and versions", sections.listed(sections.environment(record))),
            class_="two",
        ),
    ]
    return style.PAGE.format(
        title=html.escape(f"{name}: report"), style=style.STYLE, body=joined(parts)
    )


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes report.html into the folder of a run, atomically; returns its path.

    Raises: UserError if the folder has no run in it, or cannot be written to.
    """
    path, page = folder / "report.html", render(*run_files.read(folder))
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
