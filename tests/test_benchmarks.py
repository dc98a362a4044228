"""The benchmarks run, at a size that measures nothing."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def run(script: str, *flags: str) -> list[list[str]]:
    """The cells of the table's rows."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, ROOT / "benchmarks" / script, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_end_to_end_measures_training_and_decoding():
    quick = ["--size", "tiny", "--steps", "1", "--reps", "1", "--patience", "0"]
    rows = run("end_to_end.py", *quick, "--batches", "0,2", "--quants", "int4")
    assert [row[0] for row in rows] == ["train int4", "decode int4 × 2"]
    for row in rows:
        # Not the speed of decoding: a difference of two times that noise exceeds at this size.
        assert all(float(row[i]) >= 0 for i in (2, 4, 6, 7, 9, 10)), row
        assert row[3].endswith("/1")
    assert float(rows[0][1]) > 0 and float(rows[0][5]) > 0
