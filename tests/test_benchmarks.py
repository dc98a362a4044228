"""The benchmarks run, at a size that measures nothing."""

import importlib
import pathlib
import sys

import cases
import jax
import pytest

from lora_jax.parallel import mesh as sharding

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def end_to_end(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("end_to_end")


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("batch", [*cases.long(0), 2])
def test_end_to_end_measures_training_and_decoding(end_to_end, tmp_path, batch):
    end_to_end.write_model(tmp_path, "tiny", "bfloat16")
    case = {"size": "tiny", "model": str(tmp_path), "dtype": "bfloat16", "quant": "int4",
            "batch": batch, "remat": "none", "steps": 1, "reps": 1, "patience": 0}  # fmt: skip
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    with jax.set_mesh(mesh):
        measure = end_to_end.run_decode if batch else end_to_end.run_train
        result = measure(case, mesh)
    cells = end_to_end.row("case", [result], {"first_s": 1.0}, [])[1:-1].split("|")
    assert len(cells) == len(end_to_end.COLUMNS)
    assert result["s"] > 0 and result["first_s"] > 0 and result["of"] == 1
    assert ("copy_mb" in result) == bool(batch)


@pytest.mark.long
def test_matmul_times_every_form(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    matmul = importlib.import_module("matmul")
    flags = ["matmul.py", "--models", "tiny", "--rows", "1,256", "--rounds", "1", "--patience", "0"]
    monkeypatch.setattr(sys, "argv", flags)
    monkeypatch.setattr(matmul, "LEAST_SECONDS", 0)
    matmul.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    forms = {(rows, form) for _, rows, form, *_ in rows}
    assert len(forms) == len(rows) == 2 * 8
    assert all(float(milliseconds) > 0 for *_, milliseconds, _ in rows)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sampling_times_every_setting(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    sampling = importlib.import_module("sampling")
    flags = ["sampling.py", "--vocab", "300", "--rows", "1,2", "--rounds", "1", "--patience", "0"]
    monkeypatch.setattr(sys, "argv", flags)
    sampling.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 2 * (len(sampling.CASES) + 2)
    assert all(float(milliseconds) > 0 for *_, milliseconds in rows)
