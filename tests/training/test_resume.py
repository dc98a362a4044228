"""Runs that were killed, damaged or moved to other devices are resumed without a difference."""

import functools
import json
import math
import pathlib
import random
import re
import shutil
import signal
import time
from unittest import mock

import cli
import forks
import numpy as np
import pytest
import safetensors.numpy
from test_run import at_step, checkpoints, comparable

from lora_jax import errors
from lora_jax.data import sources, stream
from lora_jax.optim import step as train_step
from lora_jax.training import evaluate, settings, setup
from lora_jax.training.output import resuming, run_folder

SEED = 12
KILLS = 8
STEPS = 6
MODEL = ("--model", cli.BASE, "--rank", 2, "--targets", "q_proj", "--remat", "full",
         "--dropout", 0.1, "--trainable-token-indices", 5, 30)  # fmt: skip
FLAGS = (*MODEL, "--batch-size", 8, "--grad-accum", 2, "--max-steps", STEPS,
         "--save-every", 2, "--keep-checkpoints", 3)  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Flags for a mixture of two data sets."""
    folder = tmp_path_factory.mktemp("data")
    many, few = (cli.write_rows(folder / f"{count}.jsonl", count, count) for count in (40, 10))
    return ("--dataset", many, few, "--weights", "3,1")


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """The folder of an uninterrupted run of six steps on eight devices."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended = cli.run("train", *FLAGS, *rows, "--output-dir", folder)
    assert ended.code == 0 and checkpoints(folder) == [2, 4, 6], ended
    return folder


def interrupted(whole, tmp_path, *, after=2):
    """A copy of the run as it was after step `after`."""
    folder = shutil.copytree(whole, tmp_path / "run")
    for step in checkpoints(folder):
        if step > after:
            shutil.rmtree(folder / "checkpoints" / str(step))
    change_run(folder, status="running")
    return folder


def change_run(folder, **parts):
    run = json.loads((folder / "run.json").read_text())
    run["settings"] |= parts.pop("settings", {})
    (folder / "run.json").write_text(json.dumps(run | parts))


def resumed(folder, *flags):
    ended = cli.run("train", "--resume", "--output-dir", folder, *flags)
    assert ended.code == 0, ended
    return " ".join(ended.out.split())


def status(folder):
    return json.loads((folder / "run.json").read_text())["status"]


# ------------------------------------------------------------------------- killed


@pytest.mark.long  # test_processes.py kills one of two processes, and resumes the run
def test_a_run_killed_at_any_time_loses_no_saved_step(parent, rows, tmp_path):
    whole, folder, many = tmp_path / "whole", tmp_path / "run", 4 * KILLS + 2
    flags = (*MODEL, *rows, "--streaming", "--seq-len", 32, "--batch-size", 2, "--grad-accum", 1,
             "--max-steps", many, "--save-every")  # fmt: skip
    code, log = parent.train(*flags, 100, "--output-dir", whole, devices=1)
    assert code == 0, log
    draws = random.Random(SEED)
    for number in range(KILLS + 1):
        saved = checkpoints(folder) if (folder / "checkpoints").exists() else []
        typed = ("--resume",) if (folder / "run.json").exists() else (*flags, 1)
        kill = forks.some_time(draws) if number < KILLS else None
        print(f"kill {number} (seed {SEED}): {kill}")
        code, log = parent.train(*typed, "--output-dir", folder, devices=1, kill=kill)
        assert code == (-signal.SIGKILL if kill else 0), log
        assert "damaged" not in log
        if found := re.search(r"resume +(?:from step (\d+)|no finished)", log):
            assert int(found[1] or 0) == max(saved, default=0)
    assert comparable(folder) == comparable(whole)
    assert checkpoints(folder) == [many - 1, many]


# ------------------------------------------------------------------------- a bad row in a stream


def test_a_bad_row_ends_a_stream_after_a_checkpoint_and_may_be_corrected_or_skipped(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(stream, "BLOCK", 8)
    monkeypatch.setattr(sources, "HEAD", 4)
    data, folder = cli.write_rows(tmp_path / "x.jsonl", 100), tmp_path / "run"
    good = data.read_text()
    lines = good.splitlines(keepends=True)
    lines[40] = '{"prompt": "a", "completion": 5}\n'
    data.write_text("".join(lines))
    flags = (*FLAGS, "--dataset", data, "--streaming", "--seq-len", 32, "--save-every", 100)
    message = cli.refused("train", *flags, "--output-dir", folder)
    assert "x.jsonl:41" in message and checkpoints(folder) == [2]
    skipping = shutil.copytree(folder, tmp_path / "skipping")
    out = resumed(skipping, "--skip-bad-rows", 1)
    assert "from step 2 of 6" in out and "1 skipped (of at most 1): x.jsonl:41:" in out
    data.write_text(good)
    assert "from step 2 of 6" in resumed(folder)
    whole = tmp_path / "whole"
    assert cli.run("train", *flags, "--output-dir", whole).code == 0
    assert comparable(folder) == comparable(whole) != comparable(skipping)


# ------------------------------------------------------------------------- damaged


def damage(folder, step):
    """Truncates all files with values. Orbax also leaves files that are no longer in use."""
    for path in (folder / "checkpoints" / str(step) / "state").glob("**/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.long
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    damage(folder, 6)
    out = resumed(folder)
    assert re.search(r"resume the checkpoint of step 6 is damaged and skipped: \w+", out)
    assert "is left to train" not in out  # although the run had finished
    assert "resume from step 4 of 6" in out
    assert comparable(folder) == comparable(whole) and checkpoints(folder) == [2, 4, 6]
    assert "from step 6 of 6" in resumed(folder)  # step 6 was saved again


@pytest.mark.long
def test_a_run_without_a_readable_checkpoint_is_refused_and_not_changed(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    for step in (2, 4, 6):
        damage(folder, step)
    message = cli.refused("train", "--resume", "--output-dir", folder)
    assert all(f"step {step}: " in message for step in (2, 4, 6))
    assert comparable(folder) == comparable(whole) and checkpoints(folder) == [2, 4, 6]
    assert status(folder) == "finished"


# ------------------------------------------------------------------------- other devices


def assert_as_uninterrupted(folder, whole):
    (ours, _), (theirs, _) = comparable(folder), comparable(whole)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    losses, expected = ([row["loss"] for row in part] for part in (ours, theirs))
    assert losses[:2] == expected[:2]  # the logged steps before are kept
    np.testing.assert_allclose(losses, expected, atol=1e-4, rtol=0)
    print("largest difference:", max(abs(a - b) for a, b in zip(losses, expected, strict=True)))


@pytest.mark.long
def test_a_run_is_resumed_with_another_split_of_a_step(whole, tmp_path):
    folder = interrupted(whole, tmp_path)
    assert "from step 2 of 6" in resumed(folder, "--batch-size", 16, "--grad-accum", 1)
    assert_as_uninterrupted(folder, whole)


@pytest.mark.long
def test_a_run_is_resumed_on_fewer_devices_and_another_mesh(parent, whole, tmp_path):
    folder = interrupted(whole, tmp_path)
    flags = ("--resume", "--output-dir", folder, "--mesh", "fsdp=2,tensor=2")
    code, log = parent.train(*flags, devices=4)
    assert code == 0 and "4 × cpu" in log and "from step 2 of 6" in log, log
    assert_as_uninterrupted(folder, whole)


def test_another_number_of_sequences_per_step_is_refused(whole, tmp_path):
    folder = interrupted(whole, tmp_path)
    message = cli.refused("train", "--resume", "--output-dir", folder, "--batch-size", 32)
    assert "16 sequences a step" in message and "32 × 2" in message


@pytest.mark.long
def test_a_batch_size_that_other_devices_cannot_split_is_refused_with_the_flags_to_use(
    whole, tmp_path
):
    folder = interrupted(whole, tmp_path)
    change_run(folder, settings={"batch_size": 2, "grad_accum": 8})
    message = cli.refused("train", "--resume", "--output-dir", folder)
    assert "--batch-size 8 --grad-accum 2, or another --mesh" in message
    assert "from step 2" in resumed(folder, "--batch-size", 8, "--grad-accum", 2)
    assert_as_uninterrupted(folder, whole)


# ------------------------------------------------------------------------- another base


def test_a_base_with_other_values_is_refused(whole, tmp_path):
    folder = interrupted(whole, tmp_path)
    base = pathlib.Path(shutil.copytree(cli.BASE, tmp_path / "base"))
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    change_run(folder, settings={"model": str(base)})
    run = json.loads((folder / "run.json").read_text())
    change_run(folder, base=run["base"] | {"id": str(base)})
    before = (folder / "run.json").read_bytes()
    message = cli.refused("train", "--resume", "--output-dir", folder)
    assert "found: another checksum of the base where:" in message
    assert (folder / "run.json").read_bytes() == before


def moved(whole, tmp_path, rows):
    """(an interrupted run whose base and data have moved, the flags that say where they are)."""
    folder = interrupted(whole, tmp_path)
    data = [shutil.copy(path, tmp_path / f"moved-{path.name}") for path in rows[1:3]]
    gone = {"model": "/gone/base", "dataset": ["/gone/40.jsonl", "/gone/10.jsonl"]}
    change_run(folder, settings=gone)
    base = shutil.copytree(cli.BASE, tmp_path / "base")
    return folder.rename(tmp_path / "renamed"), {"--model": [base], "--dataset": data}


def test_a_run_continues_after_it_its_base_and_its_data_have_moved(whole, rows, tmp_path):
    folder, now = moved(whole, tmp_path, rows)
    message = cli.refused("train", "--resume", "--output-dir", folder)
    assert "found: no /gone/base no /gone/40.jsonl no /gone/10.jsonl" in message
    assert "say where they are now: --model NEW_PATH --dataset NEW_PATH …" in message
    message = cli.refused("train", "--resume", "--output-dir", folder, "--model", *now["--model"])
    assert "gone/base" not in message and "now: --dataset NEW_PATH …" in message
    flags = [part for flag, values in now.items() for part in (flag, *values)]
    out = resumed(folder, *flags)
    assert f"resume model with the same content at {tmp_path}/base, was /gone/base" in out
    assert "resume from step 2 of 6" in out and "is finished" not in out
    assert_as_uninterrupted(folder, whole)
    run = json.loads((folder / "run.json").read_text())
    assert run["settings"]["model"] == run["base"]["id"] == str(tmp_path / "base")
    assert "the run is finished: no step is left to train" in resumed(folder)
    (tmp_path / "moved-10.jsonl").write_text('{"text": "something else"}\n')
    message = cli.refused("train", "--resume", "--output-dir", folder)
    assert "found: another train of the data where:" in message and "--dataset, now" in message


def test_trained_tokens_that_got_other_ids_are_refused():
    """As the new tokens of a run do if somebody adds some to the tokenizer of its base."""

    def check(before, now):
        base = {"commit": None}
        record = run_folder.Record("running", {"trainable_token_indices": now}, 1, {}, "", {}, {},
                                   base, {})  # fmt: skip
        job = mock.MagicMock(spec=setup.Job)
        then = {"settings": {"trainable_token_indices": before}, "base": base}
        resuming._check_same(job, then, record)

    check(None, None)
    check({"embed_tokens": [8, 9]}, {"embed_tokens": (8, 9)})
    with pytest.raises(errors.UserError, match=r"trained tokens are \[8, 9, 10\], not \[8, 9\]"):
        check([8, 9], (8, 9, 10))


def test_a_run_of_the_demo_continues_in_another_installation():
    made = settings.build(rank=4)
    record = {**made.flat(), "model": "/gone/lora_jax/assets/demo",
              "dataset": ["/gone/lora_jax/assets/demo/train.jsonl"],
              "eval_dataset": "/gone/lora_jax/assets/demo/eval.jsonl"}  # fmt: skip
    assert settings.resumed(record, {}, "run.json") == made


def test_a_run_json_of_an_earlier_version_is_refused(whole, tmp_path):
    folder = interrupted(whole, tmp_path)
    run = json.loads((folder / "run.json").read_text())
    del run["base"]["checksum"], run["data"], run["versions"]["lora-jax"]
    (folder / "run.json").write_text(json.dumps(run))
    message = cli.refused("train", "--resume", "--output-dir", folder)
    assert all(f"no {part} of the" in message for part in ("checksum", "train", "held out"))


# ------------------------------------------------------------------------- failed


def failing_at(monkeypatch, number, fail):
    steps = train_step.steps

    def broken(*arguments):
        for state, metrics in steps(*arguments):
            yield state, fail(metrics) if metrics["step"] == number else metrics

    monkeypatch.setattr(train_step, "steps", broken)


def out_of_memory(_):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.")


def test_run_json_has_the_failure_and_the_run_is_resumed_exactly(whole, tmp_path, monkeypatch):
    folder, found = interrupted(whole, tmp_path), []
    not_a_number = functools.partial(dict, loss=float("nan"))
    for fail in (not_a_number, out_of_memory):
        with monkeypatch.context() as patch:
            failing_at(patch, 3, fail)
            cli.refused("train", "--resume", "--output-dir", folder)
        found.append(status(folder))
    assert found == ["failed: NaN or infinity at step 3", "failed: 123 bytes wanted"]
    out = resumed(folder)
    assert found[-1] in out and "from step 2 of 6" in out
    assert comparable(folder) == comparable(whole) and status(folder) == "finished"


# ------------------------------------------------------------------------- the best step


@pytest.mark.long
def test_the_adapter_is_that_of_the_best_step(rows, tmp_path, monkeypatch):
    folder, losses, seen = tmp_path / "run", iter([0.9, 3, 1, 2]), {}
    steps = train_step.steps

    def watched(*arguments):
        for state, metrics in steps(*arguments):
            layer = state.lora["model"]["layers"]["self_attn"]["q_proj"]
            seen[metrics["step"]] = np.asarray(layer["lora_B"][0]).T
            yield state, metrics

    monkeypatch.setattr(train_step, "steps", watched)
    monkeypatch.setattr(evaluate, "means", lambda *_: {"eval_loss": float(next(losses))})
    ended = cli.run(
        "train", *FLAGS, *rows, "--output-dir", folder, "--eval-every", 2,
        "--save-every", 100, "--keep-checkpoints", 1, "--keep-best",
    )  # fmt: skip
    assert ended.code == 0, ended
    assert checkpoints(folder) == [4, 6]
    assert_the_adapter_is(folder, seen[4])
    best = {"step": 4, "eval_loss": 1.0}
    assert json.loads((folder / "run.json").read_text())["best"] == best
    assert re.search(r"best +step 4, held-out loss 1.0000", ended.out)
    assert "the held-out loss was 0.9000 before the first step" in ended.out

    shutil.rmtree(folder / "checkpoints/6")  # as if it was killed while saving
    losses = iter([0.5])
    assert "best step 6, held-out loss 0.5000" in resumed(folder)
    assert checkpoints(folder) == [6]
    assert_the_adapter_is(folder, seen[6])


@pytest.mark.long
def test_a_run_stops_early_and_keeps_the_best_step(rows, tmp_path, monkeypatch):
    folder, losses = tmp_path / "run", iter([9, 3, 1, math.nan, 2])
    monkeypatch.setattr(evaluate, "means", lambda *_: {"eval_loss": float(next(losses))})
    flags = ("--output-dir", folder, "--eval-every", 1, "--exact-match", 1)
    ended = cli.run("train", *FLAGS, *rows, *flags, "--patience", 2)
    assert ended.code == 0 and "no better held-out loss in 2 evaluations" in ended.out, ended
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished" and run["best"] == {"step": 2, "eval_loss": 1}
    scored = [row["step"] for row in cli.metrics(folder) if "exact_match" in row]
    assert scored == [0, 4] and len(run["samples"]["after"]) == 1
    before = comparable(folder)
    assert "from step 4 of 6" in resumed(folder)  # a finished run does not train again
    assert comparable(folder) == before and checkpoints(folder) == [2, 3, 4]


@pytest.mark.long
def test_a_run_stops_at_max_time_and_is_resumed(whole, rows, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    at_step(monkeypatch, 1, lambda: time.sleep(1))
    flags = (*FLAGS, *rows, "--output-dir", folder, "--max-time", "1s")
    ended = cli.run("train", *flags, "--log-every", 1)
    assert ended.code == 75 and "stopped after step 1 of 6; to continue:" in ended.out, ended
    assert status(folder) == "stopped at step 1" and "step 1 of 6: loss" in ended.out
    assert "from step 1 of 6" in resumed(folder, "--max-time", "1h")
    assert comparable(folder) == comparable(whole)


def assert_the_adapter_is(folder, expected):
    tensors = safetensors.numpy.load_file(folder / "adapter/adapter_model.safetensors")
    (found,) = (t for name, t in tensors.items() if "layers.0.self_attn.q_proj.lora_B" in name)
    np.testing.assert_array_equal(found, expected)
