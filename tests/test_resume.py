"""Runs that were killed, damaged or moved to other devices go on as if they had not been."""

import json
import random
import re
import signal

import cli
import forks
import pytest
from test_job import checkpoints, comparable, compiled_once  # noqa: F401 (a fixture)

SEED, KILLS, STEPS = 7, 10, 40
FLAGS = ("--model", cli.BASE, "--rank", 2, "--dropout", 0.1, "--remat", "none")


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    with forks.parent(tmp_path_factory.mktemp("parent")) as started:
        yield started


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return cli.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 24)


def test_killed_at_any_moment_a_run_loses_no_saved_step(parent, rows, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    flags = (*FLAGS, "--dataset", rows, "--batch-size", 2, "--grad-accum", 1,
             "--max-steps", STEPS, "--save-every", 1)  # fmt: skip
    code, log = parent.train(*flags, "--save-every", 100, "--output-dir", whole, devices=2)
    assert code == 0, log
    draws = random.Random(SEED)
    for number in range(KILLS + 1):
        saved = checkpoints(folder) if (folder / "checkpoints").exists() else []
        started = (folder / "run.json").exists()
        kill = forks.some_time(draws) if number < KILLS else None
        print(f"kill {number} (seed {SEED}): {kill}")
        typed = ("--resume",) if started else flags
        code, log = parent.train(*typed, "--output-dir", folder, devices=2, kill=kill)
        assert code == (-signal.SIGKILL if kill else 0), log
        assert "damaged" not in log
        if told := re.search(r"resume +(?:from step (\d+)|no finished)", log):
            assert int(told[1] or 0) == max(saved, default=0)
    assert comparable(folder) == comparable(whole)
    assert checkpoints(folder) == [STEPS - 1, STEPS]
