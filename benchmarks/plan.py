"""Compares the memory that lora_jax/planning predicts for a job with what XLA plans for it.

python benchmarks/plan.py [--cache FOLDER] [--only WORD]      → benchmarks/plan.md

Needs pip install "lora-jax[train,aot]".
Each run is compiled once, in its own process. Its result stays
in the cache until the sources or the compilers change, so an interrupted comparison can continue.
With --only, runs whose printed line contains WORD are compiled; the others come from the cache.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"

import architectures
import memory

from lora_jax.models import config as model_config
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips, operations, programs, resident
from lora_jax.planning import job as jobs
from lora_jax.planning import memory as device_memory

SOURCES = pathlib.Path(__file__).parents[1] / "lora_jax"
NOT_COMPILED = (  # sources that do not change a compiled program
    *("assets", "cli", "data", "training", "console.py", "errors.py", "hub.py", "tokenizer.py"),
    *(f"planning/{name}.py" for name in ("memory", "operations", "proposals", "resident")),
)
PACKAGES = ("jax", "flax", "libtpu", "jax-cuda12-plugin")
LIMIT = 1800  # seconds for one run


class Run(NamedTuple):
    """A job with a batch of `rows` sequences over all devices, on a mesh written as for --mesh.

    tokens: of a sequence. dpo: each sequence is a pair of examples.
    """

    model: str
    target: str
    mesh: str
    rows: int
    remat: str = "full"
    quant: str = "int4"
    tokens: int = 2048
    dpo: bool = False

    @property
    def job(self) -> jobs.Job:
        relative = architectures.RELATIVES.get(self.model)
        return jobs.Job(
            model_config.from_dict(relative)
            if relative
            else memory.architecture(*architectures.MODELS[self.model]),
            quant=self.quant,
            remat=self.remat,
            batch_size=self.rows,
            beta=0.1 if self.dpo else None,
        ).of_length(self.tokens)

    @property
    def sizes(self) -> dict[str, int]:
        return sharding.parse(self.mesh, chips.parse(self.target).count)


_7B, _13B, _70B = "Llama-2-7B", "Llama-2-13B", "Llama-3.1-70B"
_ONE = "data=1"
FITS = (
    Run(_7B, "gpu:rtx4080", _ONE, 1),
    Run(_7B, "gpu:rtx4080", _ONE, 4),
    Run(_7B, "gpu:rtx4080", _ONE, 8),
    Run(_7B, "gpu:rtx4080", _ONE, 1, "dots"),
    Run(_13B, "gpu:rtx4080", _ONE, 1),
    Run(_13B, "gpu:l4", _ONE, 1),
    Run(_70B, "tpu:v5e-16", "fsdp=16", 16),
    Run(_70B, "gpu:h100-8", "fsdp=8", 8),
)
RELATIVES = (
    Run("Gemma 3 12B", "gpu:h100", _ONE, 1),
    *(
        Run(model, chip, _ONE, 1, remat)
        for model in ("Gemma 3 1B", "Qwen3-0.6B")
        for chip in ("gpu:h100", "tpu:v5e")
        for remat in ("full", "dots", "none")
    ),
)
ERRORS = (
    *(
        Run(_7B, chip, _ONE, rows, remat)
        for chip in ("gpu:h100", "gpu:a100", "tpu:v5e", "tpu:v6e")
        for remat in ("full", "dots", "none")
        for rows in (1, 4)
        # XLA:TPU does not compile a program that exceeds the chip's memory.
        if not (chip.startswith("tpu") and rows == 4 and remat == "none")
        if not (chip == "tpu:v5e" and (rows, remat) in ((1, "none"), (4, "dots")))
    ),
    Run(_13B, "gpu:h100", _ONE, 1),
    Run(_13B, "tpu:v5e", _ONE, 1),
    Run(_7B, "gpu:h100-4", "tensor=4", 1),
    Run(_7B, "tpu:v5e-4", "tensor=4", 1),
    Run(_7B, "gpu:h100", _ONE, 1, quant="nf4"),
    Run(_7B, "gpu:h100", _ONE, 1, quant="none"),
    Run(_7B, "gpu:h100", _ONE, 1, dpo=True),
    Run(_7B, "gpu:h100", _ONE, 4, dpo=True),
    Run(_7B, "gpu:h100", _ONE, 1, "dots", dpo=True),
    Run(_7B, "tpu:v5e", _ONE, 1, dpo=True),
    *RELATIVES,
)
COUNTS = (1, 4, 8, 16, 32, 64, 128, 256)
SCALING = (
    *(Run(_7B, f"tpu:v5e-{count}", f"data={count}", count) for count in COUNTS),
    *(
        Run(_70B, f"tpu:v5e-{count}", f"data={count // 16},fsdp=16", count)
        for count in (16, 64, 256)
    ),
)


def digest() -> str:
    """A hash of the sources and compilers that the programs depend on."""
    found = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*.py")):
        if not path.relative_to(SOURCES).as_posix().startswith(NOT_COMPILED):
            found.update(path.read_bytes())
    found.update(repr(versions()).encode())
    return found.hexdigest()[:16]


def versions() -> list[str]:
    return [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]


def compiled(run: Run, cache: pathlib.Path, *, cached_only: bool) -> programs.Compiled | str:
    """What XLA reports of the run's program, or why there is none."""
    file = cache / f"{'_'.join(map(str, run)).replace(':', '')}_{digest()}.json"
    if file.exists():
        known = json.loads(file.read_text())
        return known if isinstance(known, str) else programs.Compiled(**known)
    if cached_only:
        return "not compiled yet"
    found = programs.compiled(run.job, run.target, run.sizes, limit=LIMIT)
    file.write_text(json.dumps(found if isinstance(found, str) else found._asdict()))
    return found


INTRODUCTION = """\
# The memory of a job, planned and compiled

`python benchmarks/plan.py`, with {versions}. No device was used. planned: by lora_jax/planning,
from shapes alone. XLA: the peak memory of one device that the compiler plans for the train step,
with `--rank 8` on q and v. sequences: of a batch over all devices; with --dpo, each is a pair of
examples. laid out: arguments and temporaries as XLA places them, including gaps. at least: the
step at the chip's published peaks. {total} runs, largest error {worst:.1%}.
"""


def report(results: Sequence[tuple[Run, programs.Compiled | str]]) -> Iterator[str]:
    """The lines of plan.md."""
    by_run = dict(results)
    rows = {run: _row(run, found) for run, found in results}
    errors = [row["error"] for row in rows.values() if row["error"] is not None]
    worst = max(map(abs, errors), default=0)
    yield INTRODUCTION.format(versions=", ".join(versions()), total=len(errors), worst=worst)
    yield "## Does it fit?\n"
    titles = ("model", "quant", "target", "mesh", "sequences × tokens", "remat")
    columns = ("planned", "XLA", "of", "tokens/s at most", "compile s")
    yield from _table([rows[run] for run in FITS], (*titles, *columns))
    yield "\n## Planned against compiled\n"
    columns = ("planned", "XLA", "error", "laid out")
    named = sorted({run for run in (*FITS, *ERRORS)}, key=lambda run: (run.target, run))
    yield from _table([rows[run] for run in named], (*titles, *columns))
    by_chip: dict[str, list[float]] = {}
    for run in by_run:
        if rows[run]["error"] is not None:
            by_chip.setdefault(chips.parse(run.target).chip, []).append(rows[run]["error"])
    yield "\n| chip | runs | mean error | largest |\n|---|---|---|---|"
    for chip, each in sorted(by_chip.items()):
        mean = sum(map(abs, each)) / len(each)
        yield f"| {chip} | {len(each)} | {mean:.1%} | {max(each, key=abs):+.1%} |"
    yield "\n## From one chip to 256\n"
    yield "All columns are per device. collectives: bytes that a device receives in a step.\n"
    columns = ("planned", "XLA", "TFLOP", "collectives", "at least s", "compile s")
    yield from _table([rows[run] for run in SCALING], (*titles, *columns))


def _row(run: Run, found: programs.Compiled | str) -> dict[str, Any]:
    target, job = chips.parse(run.target), run.job
    there = resident.resident(job, run.sizes, target.chip)
    planned = device_memory.memory(job, run.sizes, target.chip, there).total
    flops = operations.operations(job).total
    moved = operations.bytes_moved(job, run.sizes, there, target.platform)
    row: dict[str, Any] = {
        "model": run.model, "quant": run.quant, "target": run.target, "mesh": run.mesh,
        "sequences × tokens": f"{run.rows} × {run.tokens}" + (" (--dpo)" if run.dpo else ""),
        "remat": run.remat,
        "planned": _gb(planned), "of": _gb(target.peaks.memory), "error": None,
        "TFLOP": f"{flops / target.count / 1e12:.0f}",
    }  # fmt: skip
    if isinstance(found, str):
        return row | {"XLA": found.replace("|", "/")[-100:]}
    least = operations.floor(flops, moved, found.collectives, target).seconds
    received = ", ".join(
        f"{total['bytes'] / 1e6:.0f} MB {kind}" for kind, total in found.collectives.items()
    )
    return row | {
        "XLA": _gb(found.peak_bytes),
        "error": planned / found.peak_bytes - 1,
        "laid out": _gb(found.argument_bytes + found.temp_bytes),
        "collectives": received or "none",
        "at least s": f"{least:.3g}",
        "tokens/s at most": f"{run.rows * run.tokens / least:,.0f}",
        "compile s": f"{found.seconds:.0f}",
    }


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _table(rows: Sequence[dict[str, Any]], titles: Sequence[str]) -> Iterator[str]:
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * len(titles)
    for row in rows:
        cells = ["" if row.get(title) is None else row[title] for title in titles]
        cells = [f"{cell:+.1%}" if isinstance(cell, float) else cell for cell in cells]
        yield "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = pathlib.Path(tempfile.gettempdir()) / "lora_jax_plan"
    parser.add_argument("--cache", type=pathlib.Path, default=default)
    parser.add_argument("--only", default="", metavar="WORD")
    flags = parser.parse_args()
    flags.cache.mkdir(parents=True, exist_ok=True)
    results = []
    for run in dict.fromkeys((*ERRORS, *FITS, *SCALING)):
        start = time.monotonic()
        line = " ".join(map(str, run))
        found = compiled(run, flags.cache, cached_only=flags.only not in line)
        results.append((run, found))
        result = found if isinstance(found, str) else _gb(found.peak_bytes)
        print(f"{line}: {result} ({time.monotonic() - start:.0f} s)", flush=True)
    lines = "\n".join(report(results)) + "\n"
    pathlib.Path(__file__).with_suffix(".md").write_text(lines)
    return any(isinstance(found, str) for _, found in results)


if __name__ == "__main__":
    sys.exit(main())
