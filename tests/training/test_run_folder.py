"""The output folder: its files, and the folders that are refused."""

import collections
import json
import math
import pathlib

import pytest

from lora_jax import errors
from lora_jax.checkpoints import free_space
from lora_jax.training.output import run_folder

Usage = collections.namedtuple("Usage", "total used free")


def opened(path, resume=False):
    return run_folder.RunFolder(pathlib.Path(path), resume=resume)


def record(status="running"):
    return run_folder.Record(
        status, settings={}, num_steps=1, versions={}, device="cpu", mesh={}, memory={}, base={},
        data={},
    )  # fmt: skip


def test_a_folder_without_output_is_removed_again(tmp_path):
    with opened(tmp_path / "a/run"):
        assert (tmp_path / "a/run").is_dir()
    assert not (tmp_path / "a/run").exists()
    with pytest.raises(errors.UserError), opened(tmp_path / "run") as folder:
        folder.read_run()  # as --resume does with a wrong name
    assert not (tmp_path / "run").exists()


def test_a_folder_with_files_is_refused_without_resume(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(errors.UserError, match="--resume") as refused:
        opened(tmp_path)
    assert str(tmp_path) in str(refused.value)
    with opened(tmp_path, resume=True):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_used(tmp_path):
    with opened(tmp_path) as folder:
        folder.write_run(record("running"))
        assert folder.read_run()["status"] == "running"


def test_the_folder_of_a_run_killed_before_it_started_is_used(tmp_path):
    for name in (".lock", "run.new"):
        (tmp_path / name).write_text("")
    with opened(tmp_path) as folder:
        folder.write_run(record())


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(errors.UserError, match="a writable output folder"):
            opened(path)


def test_a_folder_with_brackets_is_refused(tmp_path):
    """Checkpoints in it could not be read."""
    for resume in (False, True):
        with pytest.raises(errors.UserError, match="without brackets"):
            run_folder.RunFolder(tmp_path / "run[1]", resume=resume)
    assert not (tmp_path / "run[1]").exists()


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "mkdir", forbidden)
    with pytest.raises(errors.UserError, match="Permission denied"):
        opened(tmp_path / "run")


@pytest.mark.parametrize("text", ["[]", "{}", '{"settings": 3}', "[" * 10**5, "\udcff", "{"])
def test_a_run_json_that_cannot_be_used_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text, errors="surrogateescape")
    with pytest.raises(errors.UserError, match="the folder of a run") as error:
        run_folder.read_run(tmp_path)
    assert error.value.where == str(tmp_path / "run.json")
    assert run_folder.quantization_of(tmp_path / "adapter") is None


def test_a_mistyped_run_leads_to_its_neighbor(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(errors.UserError, match=f"did you mean {tmp_path}/mine") as error:
        run_folder.read_run(tmp_path / "mein")
    assert "no run.json" in str(error.value)


def test_lines_of_metrics_that_are_damaged_end_them(tmp_path):
    for last in ("[1]", "{}", "\udcff", '{"step"'):
        (tmp_path / "metrics.jsonl").write_text(
            f'{{"step": 1}}\n{last}\n', errors="surrogateescape"
        )
        with opened(tmp_path, resume=True) as folder:
            assert folder.metrics(9) == [{"step": 1}]


def test_a_file_of_the_run_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(errors.UserError) as error, opened(tmp_path, resume=True) as folder:
        folder.log({"step": 1})
    assert error.value.where == str(tmp_path / "metrics.jsonl")
    assert error.value.found == "Is a directory" and "--resume continues" in error.value.do
    with pytest.raises(FileNotFoundError), opened(tmp_path, resume=True):
        open("/nowhere/else").close()  # another file: not of the folder


def test_two_runs_at_once_in_one_folder_are_refused(tmp_path):
    with opened(tmp_path / "run") as first:
        with pytest.raises(errors.UserError, match="another run is writing to it"):
            opened(tmp_path / "run")
        first.write_run(record())
        with pytest.raises(errors.UserError, match="another run is writing to it"):
            opened(tmp_path / "run", resume=True)
    with opened(tmp_path / "run", resume=True):
        pass


def test_a_full_disk_is_reported_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(free_space.shutil, "disk_usage", lambda _: Usage(2**30, 2**30, 2**20))
    with pytest.raises(errors.UserError, match=r"(?s)64 MiB free.*1 MiB free"):
        opened(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_too_small_for_the_checkpoints_is_reported(tmp_path, monkeypatch):
    with opened(tmp_path / "run") as folder:
        folder.check_space(2**20)
        monkeypatch.setattr(free_space.shutil, "disk_usage", lambda _: Usage(2**40, 0, 2**30))
        with pytest.raises(errors.UserError, match=r"2048 MiB free.*"):
            folder.check_space(2**31)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_disk_that_fills_up_during_the_run_is_reported(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(errors.UserError, match=r"(?s)space on the disk.*--resume"):
        with opened(tmp_path, resume=True) as folder:
            folder.log({"step": 1})


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(ValueError, match="a bug"):
        with opened(tmp_path / "run"):
            raise ValueError("a bug")


def test_metrics_are_json_even_if_not_finite(tmp_path):
    with opened(tmp_path) as folder:
        folder.log({"step": 1, "loss": 0.5})
        folder.log({"step": 2, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None, "grad_norm": None, "lr": None},
    ]


def test_each_line_is_written_at_once(tmp_path):
    with opened(tmp_path) as folder:
        folder.log({"step": 1})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("damage", ["", '{"step": 3, "lo', "\0\0\0", '{"step": 3}\n{"step": 4}\n'])
def test_cut_back_removes_later_steps_and_a_damaged_line(tmp_path, damage):
    good = '{"step": 0, "eval_loss": 1}\n{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(good + damage)
    with opened(tmp_path, resume=True) as folder:
        folder.cut_back(2)
        assert (tmp_path / "metrics.jsonl").read_text() == good
        folder.cut_back(-1)
        assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_cut_back_needs_no_metrics(tmp_path):
    with opened(tmp_path) as folder:
        folder.cut_back(3)


def test_run_json_is_replaced_atomically(tmp_path, monkeypatch):
    with opened(tmp_path) as folder:
        folder.write_run(record("running"))

        def killed(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(run_folder.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.write_run(record("finished"))
        assert folder.read_run()["status"] == "running"


def test_a_damaged_run_json_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"settings": ')
    with opened(tmp_path, resume=True) as folder:
        with pytest.raises(errors.UserError, match=r"run\.json"):
            folder.read_run()


def test_default_paths_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run_folder.default_path()
    assert first.parts[0] == "runs"

    class Clock(run_folder.datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2025, 3, 4, 5, 6, 7)

    monkeypatch.setattr(run_folder.datetime, "datetime", Clock)
    for name in ("2025-03-04-050607", "2025-03-04-050607-2", "2025-03-04-050607-3"):
        path = run_folder.default_path()
        assert path == pathlib.Path("runs") / name
        path.mkdir(parents=True)


def test_the_other_processes_read_and_write_nothing(tmp_path):
    with opened(tmp_path / "run") as folder:
        folder.write_run(record("running"))
        before = {path: path.read_bytes() for path in folder.path.iterdir()}
        with run_folder.Followed(tmp_path / "run") as followed:
            assert followed.read_run()["status"] == "running"
            assert (followed.adapter, followed.checkpoints) == (folder.adapter, folder.checkpoints)
            followed.write_run(record())
            followed.log({"step": 1})
            followed.cut_back(0)
            followed.check_space(2**60)
        assert {path: path.read_bytes() for path in folder.path.iterdir()} == before
