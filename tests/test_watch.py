"""What looks on while a run trains."""

import sys
import types

import cli
import pytest

import watch  # isort: skip (scripts/, which cli puts on the path)


def test_losses_that_stand_out_are_told():
    spikes = watch.Spikes()
    told = [spikes.note(2 + 0.1 * (step % 3) + 3 * (step == 40)) for step in range(60)]
    assert [step for step, text in enumerate(told) if text] == [40]
    assert told[40].startswith("loss 5.1, after 2.1 on average")


@pytest.mark.parametrize(
    "losses, spent",
    [([3, 2, 1], False), ([1, 2, 1], True), ([3, None, 2, 2], False), ([1, None, None], True)],
)
def test_patience_counts_evaluations_without_a_better_loss(losses, spent):
    patience, endless = watch.Patience(2), watch.Patience(None)
    for loss in losses:
        patience.note(loss)
        endless.note(loss)
    assert patience.spent == spent and not endless.spent


def stand_in(monkeypatch):
    """A wandb that keeps what it is given."""
    told = types.SimpleNamespace(settings=None, rows=[], finished=False)

    class Run:
        def log(self, numbers, step):
            told.rows.append({"step": step, **numbers})

        def finish(self):
            told.finished = True

    def init(**settings):
        told.settings = settings
        return Run()

    module = types.ModuleType("wandb")
    module.init, module.__spec__ = init, object()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_a_run_reports_and_is_profiled(tmp_path, monkeypatch):
    told, folder = stand_in(monkeypatch), tmp_path / "run"
    rows = cli.write_rows(tmp_path / "train.jsonl", 20)
    ended = cli.run(
        "train", "--model", cli.BASE, "--quant", "int4", "--batch-size", 8, "--grad-accum", 1,
        "--max-steps", 5, "--dataset", rows, "--eval-every", 5, "--output-dir", folder,
        "--report-to", "wandb", "--profile", tmp_path / "trace",
    )  # fmt: skip
    assert ended.code == 0 and ended.err == "", ended
    assert told.rows == cli.metrics(folder) and told.finished
    assert told.settings["config"]["quant"] == "int4" and told.settings["resume"] == "allow"
    assert "steps 3 to 5: " in " ".join(ended.out.split())
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_tensorboard_shows_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    dashboard = watch.Dashboard("tensorboard", tmp_path, {}, 0)
    dashboard.log({"step": 1, "loss": 2.5, "grad_norm": 1.0})
    dashboard.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in file.read_bytes() and b"grad_norm" in file.read_bytes()


def test_a_dashboard_that_is_not_installed_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name: None)
    told = cli.refused("train", "--report-to", "tensorboard", "--output-dir", tmp_path / "run")
    assert "pip install tensorboardX" in told and not (tmp_path / "run").exists()
