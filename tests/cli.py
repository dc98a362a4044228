"""Runs a script of scripts/ in this process, as `python scripts/NAME.py …` would."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from lora_jax.cli import runner

ROOT = pathlib.Path(__file__).parents[1]
VERBS = {"inspect_data": "inspect"}
BASE = ROOT / "tests/golden/models/stories260K"


@dataclasses.dataclass
class Ended:
    """The exit code, and what was printed."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines() + self.err.splitlines()


@functools.cache
def _kept() -> list[tuple[Any, str, Any]]:
    """[(module, name, what makes a program there, once for equal arguments)].

    A second run with the settings of a first would trace, lower and read the same programs.
    """
    from lora_jax.generation import steps
    from lora_jax.optim import adamw
    from lora_jax.optim import step as train_step
    from lora_jax.planning import job as jobs

    makers = [
        (adamw, "make"),
        (adamw, "schedule"),
        (train_step, "make_step"),
        (train_step, "make_eval_loss"),
        (steps, "Programs"),
    ]
    kept = [(module, name, _once(getattr(module, name))) for module, name in makers]
    return [*kept, (jobs, "model_parts", _once_a_model(jobs.model_parts))]


def _once(make: Any) -> Any:
    import jax

    kept = functools.cache(make)

    def made(*arguments, **how):
        traced = any(isinstance(part, jax.core.Tracer) for part in (*arguments, *how.values()))
        return (make if traced else kept)(*arguments, **how)

    return made


def _once_a_model(model_parts: Any) -> Any:
    """The shapes of a model depend on these alone, and tracing it takes a second."""
    found: dict[Any, Any] = {}

    def parts(job, mesh):
        key = repr((job.architecture, job.dtype, job.quant, job.lora, job.beta)), mesh
        if key not in found:
            found[key] = model_parts(job, mesh)
        return found[key]

    return parts


@contextlib.contextmanager
def kept_programs() -> Iterator[pytest.MonkeyPatch]:
    """Inside, a program is made once for equal arguments, as in `run`."""
    with pytest.MonkeyPatch.context() as patch:
        for maker in _kept():
            patch.setattr(*maker)
        yield patch


def run(script: str, *flags: object) -> Ended:
    """Runs scripts/`script`.py to its end; an exception that it lets through passes through."""
    module = importlib.import_module(f"lora_jax.cli.{VERBS.get(script, script)}")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with kept_programs() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", [f"scripts/{script}.py", *map(str, flags)])
            runner.run(module.main)
    return Ended(ended.value.code or 0, out.getvalue(), err.getvalue())


def refused(script: str, *flags: object) -> str:
    """The message of a run that ends with a user's error, lines joined."""
    ended = run(script, *flags)
    assert ended.code == 2, ended
    assert ended.err.startswith("error:\n  expected: ") and "Traceback" not in ended.err
    return " ".join(ended.err.split())


def write_rows(path: pathlib.Path, count: int, first: int = 0) -> pathlib.Path:
    """A .jsonl file of prompts and completions."""
    rows = [
        {"prompt": f"Tom has {n} cats.", "completion": f" He likes cat {n % 5}."}
        for n in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(folder: pathlib.Path) -> list[dict]:
    """The rows of metrics.jsonl, which must be JSON in the strict sense."""

    def no_constant(name: str):
        raise AssertionError(f"{name} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_constant) for line in lines]
