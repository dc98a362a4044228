"""quantize: the report, its JSON, one tensor at a time, and what is refused."""

import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from cli import BASE, refused, run

from lora_jax.quant import formats

NUM_LINEARS = 5 * 7
DOWN = "model.layers.2.mlp.down_proj"


def write(folder, **tensors):
    """A folder of one file; `__` in a name is a dot."""
    arrays = {name.replace("__", "."): np.asarray(a) for name, a in tensors.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.json"
    flags = [flag for fmt in ("int4", "nf4-dq") for flag in ("--quant", fmt)]
    ended = run("quantize", "--model", BASE, *flags, "--report", "--json", path)
    assert ended.code == 0, ended
    return ended.out.splitlines(), json.loads(path.read_text())


def test_the_report_has_error_and_bits_of_each_format(reported):
    _, report = reported
    assert len(report["modules"]) == NUM_LINEARS
    found = {module["name"]: module for module in report["modules"]}[DOWN]
    with safetensors.safe_open(BASE / "model.safetensors", "numpy") as reader:
        weight = jnp.asarray(reader.get_tensor(f"{DOWN}.weight").T)
    assert found["shape"] == [64, 172]
    for fmt in ("int4", "nf4-dq"):
        packed = formats.quantize(weight, fmt)
        assert found["formats"][fmt] == {
            "error": pytest.approx(float(formats.error(weight, packed, fmt)), rel=1e-5),
            "bits_per_weight": pytest.approx(formats.bits_per_weight(packed, 172)),
        }


def test_totals_are_weighted_by_the_number_of_weights(reported):
    _, report = reported
    sizes = [np.prod(module["shape"]) for module in report["modules"]]
    for fmt, total in report["formats"].items():
        each = [module["formats"][fmt] for module in report["modules"]]
        bits = np.average([cost["bits_per_weight"] for cost in each], weights=sizes)
        assert total["bits_per_weight"] == pytest.approx(bits)
        errors = [cost["error"] for cost in each]
        assert min(errors) < total["error"] < max(errors)


def test_the_table_has_a_row_per_kind_in_80_columns_and_lists_the_worst(reported):
    lines, report = reported
    rows = {line.split()[0]: line for line in lines if line and line[0] != " "}
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {*kinds, "module", "all"} <= set(rows)
    assert all(len(line) <= 80 for line in lines if not line.startswith(("model ", "wrote ")))
    assert rows["down_proj"].split()[1:3] == ["0-4", "172×64"]
    total = report["formats"]
    shown = [f"{total[f]['error']:.2%} {total[f]['bits_per_weight']:.3f}" for f in total]
    assert rows["all"].split()[1:] == " ".join(shown).split()
    text = " ".join(" ".join(lines).split())
    for fmt in total:
        worst = max(report["modules"], key=lambda module: module["formats"][fmt]["error"])
        assert f"worst {fmt}: {worst['name']} {worst['formats'][fmt]['error']:.2%}" in text


@pytest.mark.long
def test_fast_has_a_slightly_larger_error(reported, tmp_path):
    path = tmp_path / "report.json"
    assert run("quantize", "--model", BASE, "--report", "--fast", "--json", path).code == 0
    fast = json.loads(path.read_text())
    assert fast["fast"] and not reported[1]["fast"]
    error = reported[1]["formats"]["int4"]["error"]
    assert error < fast["formats"]["int4"]["error"] < 1.05 * error


def test_many_layers_are_grouped_into_ranges(tmp_path):
    tensors = {f"model__layers__{i}__mlp__up_proj__weight": np.ones((4, 8)) for i in range(40)}
    folder = write(tmp_path, **{name: a.astype(np.float32) for name, a in tensors.items()})
    ended = run("quantize", "--model", folder, "--report", "--quant", "int8")
    spans = [line.split()[1] for line in ended.lines if line.startswith("up_proj")]
    assert spans == ["0-9", "10-19", "20-29", "30-39"]


def test_one_tensor_is_in_memory_at_a_time(monkeypatch):
    opened, alive, held = safetensors.safe_open, [], []

    class Reader:
        def __init__(self, *args):
            self.reader = opened(*args)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __getattr__(self, name):
            return getattr(self.reader, name)

        def get_tensor(self, name):
            assert all(array() is None for array in alive), (
                f"{name} is read while another is in memory"
            )
            held.append(len(jax.live_arrays()))
            array = self.reader.get_tensor(name)
            alive.append(weakref.ref(array))
            return array

    monkeypatch.setattr(safetensors, "safe_open", Reader)
    assert run("quantize", "--model", BASE, "--report", "--quant", "int8").code == 0
    assert len(held) == NUM_LINEARS and max(held) == held[0]


def test_it_needs_report_or_output_dir():
    assert "expected: --report" in refused("quantize", "--quant", "int4")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--fast", "--quant", "nf4"), "found: --fast with nf4"),
        (("--revision", "main"), "--revision without --model"),
        (("--json", "nowhere/report.json"), "where: nowhere"),
        (("--quant", "none"), "invalid choice: 'none'"),
    ],
)
def test_flags_without_effect_are_refused(flags, message):
    assert message in refused("quantize", "--report", *flags)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("h__0__attn__weight", np.ones((4, 8), np.float32), "found: none"),
        ("model__layers__0__up__weight", np.ones((4, 8), np.uint8), "up.weight (U8)"),
        ("model__layers__0__up__weight", np.full((4, 8), np.nan, np.float32), "NaN or infinity"),
    ],
)
def test_weights_that_cannot_be_quantized_are_refused(tmp_path, name, array, message):
    folder = write(tmp_path, **{name: array})
    assert message in refused("quantize", "--report", "--model", folder)
