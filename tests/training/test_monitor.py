"""Monitoring: spikes, patience, MFU, compilations, dashboards, profiles."""

import dataclasses
import json
import re
import sys
import types

import cli
import jax
import numpy as np
import pytest
import test_plan
from test_run import at_step

from lora_jax import errors
from lora_jax.parallel import devices
from lora_jax.planning import chips, operations
from lora_jax.training import monitor
from lora_jax.training.adapters import sweep


def test_spikes_of_the_loss_are_reported():
    spikes = monitor.Spikes()
    reports = [spikes.note(2 + 0.1 * (step % 3) + 3 * (step == 40)) for step in range(60)]
    assert [step for step, text in enumerate(reports) if text] == [40]
    assert reports[40].startswith("loss 5.1, after 2.1 on average")


@pytest.mark.parametrize(
    "losses, spent",
    [([3, 2, 1], False), ([1, 2, 1], True), ([3, None, 2, 2], False), ([1, None, None], True)],
)
def test_patience_counts_evaluations_without_a_better_loss(losses, spent):
    patience, endless = monitor.Patience(2), monitor.Patience(None)
    for loss in losses:
        patience.note(loss)
        endless.note(loss)
    assert patience.spent == spent and not endless.spent


@pytest.mark.parametrize("losses, least", [([np.nan, 2, 1], 1), ([np.inf, 3, 4], 3)])
def test_a_member_whose_held_out_loss_is_not_finite_does_not_hide_the_best(losses, least):
    swept = object.__new__(sweep.SweepAdapters)
    swept._lost, swept.members = {}, [types.SimpleNamespace(name=name) for name in "abc"]
    means = {f"eval_loss/{name}": loss for name, loss in zip("abc", losses, strict=True)}
    assert swept.eval_loss(means) == least


def test_mfu_is_the_share_of_useful_operations_in_the_published_peak():
    job, target = test_plan.LLAMA_7B, chips.parse("tpu:v5e-4")
    share = monitor.Utilization(job, target).share(512, 0.5)
    useful = operations.useful(dataclasses.replace(job, seq_len=512))
    assert share == pytest.approx(useful / (0.5 * 4 * 197e12), abs=1e-4)
    base = 6738415616 - 32000 * 4096 - 65 * 4096  # the weights in matrix products of Llama-2-7B
    assert useful == pytest.approx(4 * base * 512, rel=0.05)
    assert monitor.Utilization(job, chips.parse("cpu:4")).share(512, 0.5) is None


def test_a_second_compilation_for_the_same_shape_is_reported():
    def double(x):
        return 2 * x

    function, reports, took = jax.jit(double), [], []
    with monitor.Compilations() as compilations:
        for number, size in enumerate((4, 4, 6, 4, 6), start=1):
            if number == 5:
                function.clear_cache()
            function(np.ones(size, np.float32))
            jax.jit(lambda x: x + 1)(1.0)  # another function does not count
            reports.append(compilations.done(number, function, (1, 8, size)))
            took.append(compilations.seconds)
    assert reports[:4] == [""] * 4 and took[0] > 0
    text = r"step 5 was compiled again \(\d\.\d s\), for a batch of 1 × 8 × 6 as before"
    assert re.fullmatch(text, reports[4])
    jax.jit(lambda x: x + 2)(1.0)
    assert compilations.seconds == took[-1]  # no longer listening


def stand_in(monkeypatch):
    """Replaces wandb; returns what it is called with."""
    reported = types.SimpleNamespace(settings=None, rows=[], finished=False)

    class Run:
        def log(self, numbers, step):
            reported.rows.append({"step": step, **numbers})

        def finish(self):
            reported.finished = True

    def init(**settings):
        reported.settings = settings
        return Run()

    module = types.ModuleType("wandb")
    module.init, module.__spec__ = init, object()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return reported


def test_a_run_reports_to_a_dashboard(tmp_path, monkeypatch):
    reported, folder = stand_in(monkeypatch), tmp_path / "run"
    monkeypatch.setitem(chips.PEAKS, "cpu", chips.Peaks(1e10, 1e11, 1e10))
    monkeypatch.setattr(devices, "device_peak_bytes", lambda: 5_670_000_000)
    compiled = monitor.Compilations.EVENT, 7.25
    at_step(monkeypatch, 3, lambda: jax.monitoring.record_event_duration_secs(
        *compiled, fun_name="jit(step)"))  # fmt: skip
    rows = cli.write_rows(tmp_path / "train.jsonl", 20)
    ended = cli.run(
        "train", "--model", cli.BASE, "--quant", "int4", "--batch-size", 8, "--grad-accum", 1,
        "--max-steps", 5, "--dataset", rows, "--eval-every", 5, "--output-dir", folder,
        # the program of test_from_python.py
        "--rank", 4, "--seq-len", 32, "--trainable-token-indices", "<s>",
        "--report-to", "wandb",
    )  # fmt: skip
    assert ended.code == 0 and ended.err == "", ended
    assert reported.rows == cli.metrics(folder) and reported.finished
    assert reported.settings["config"]["quant"] == "int4" and reported.settings["resume"] == "allow"
    steps = [row for row in reported.rows if "loss" in row]
    assert all(0 < row["mfu"] < 1 and row["peak_bytes"] == 5_670_000_000 for row in steps)
    assert ", MFU " in ended.out and "%, 5.67 GB" in ended.out
    run = json.loads((folder / "run.json").read_text())
    assert run["settings"]["remat"] == "full"  # by default, on a CPU
    assert run["compile_seconds"] >= 7.25 and ended.out.count("warning") == 1
    out = " ".join(ended.out.split())
    assert "step 4 was compiled again (7.2 s), for a batch of 1 × 8 × 32 as before" in out


@pytest.mark.long
def test_a_run_is_profiled(tmp_path):
    rows = cli.write_rows(tmp_path / "train.jsonl", 20)
    ended = cli.run(
        "train", "--model", cli.BASE, "--quant", "int4", "--batch-size", 8, "--max-steps", 5,
        "--dataset", rows, "--output-dir", tmp_path / "run", "--rank", 4, "--seq-len", 32,
        "--profile", tmp_path / "trace",
    )  # fmt: skip
    assert ended.code == 0, ended
    assert "steps 3 to 5: " in " ".join(ended.out.split())
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_tensorboard_gets_every_metric(tmp_path):
    pytest.importorskip("tensorboardX")
    dashboard = monitor.Dashboard("tensorboard", tmp_path, {}, 0)
    dashboard.log({"step": 1, "loss": 2.5, "grad_norm": 1.0})
    dashboard.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in file.read_bytes() and b"grad_norm" in file.read_bytes()


def test_a_missing_dashboard_package_is_reported_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    message = cli.refused("train", "--report-to", "tensorboard", "--output-dir", tmp_path / "run")
    assert "pip install tensorboardX" in message and not (tmp_path / "run").exists()


def test_a_trace_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(errors.UserError, match=f"--profile {tmp_path}/file"):
        monitor.Profile(str(tmp_path / "file"), 0)
