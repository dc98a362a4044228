"""`lora-jax doctor`, on this machine and on faked ones, with kernels that are not run."""

import json

import cli
import pytest

from lora_jax.cli import doctor, doctor_kernels
from lora_jax.diagnosis import nvidia_smi, probe, system

RIGHT = doctor_kernels.Row("int4 forward", "1 × 4096 → 14336", "k_minor", None, 2e-3, 2.1e-5, 0.63)
UNKNOWN = doctor_kernels.Row("embedding", "8192 × 4096", "xla", None, 0.0, 2e-3, None)
WRONG = RIGHT._replace(problem="error 0.5, at most 0.01", error=0.5, share=None)


@pytest.fixture
def machine(monkeypatch):
    """Sets what the machine is, what JAX answers, and the rows of the kernels."""
    monkeypatch.setenv("COLUMNS", "80")

    def set_machine(rows=(RIGHT, UNKNOWN), jax=None, **found):
        answer = jax or probe.Answer((probe.Device("cpu", "cpu"),))
        read = system.System(
            packages={"jax": "0.10.2", "jaxlib": "0.10.2"}, python="3.12.1", jax=answer, **found
        )
        monkeypatch.setattr(doctor.system, "read", lambda: read)
        monkeypatch.setattr(doctor_kernels, "rows", lambda: iter(rows))

    return set_machine


def test_a_healthy_machine_fits_on_a_screen(machine):
    machine()
    ended = cli.run("doctor")
    assert ended.code == 0 and not ended.err
    assert max(map(len, ended.lines)) <= 80 and len(ended.lines) <= 24
    for part in ("jax 0.10.2", "Python 3.12.1", "1 × cpu (cpu)", "nothing found"):
        assert part in ended.out
    assert "int4 forward, 1 × 4096 → 14336" in ended.out and "0.021" in ended.out
    assert "63%" in ended.out
    assert "attention xla; with packing xla" in ended.out
    assert "int4      xla; backward xla" in ended.out
    assert "decoding  weights dense" in ended.out


def test_the_same_as_json(machine):
    machine()
    ended = cli.run("doctor", "--json")
    found = json.loads(ended.out)
    assert ended.code == 0 and found["problems"] == []
    assert found["system"]["jax"]["devices"][0]["platform"] == "cpu"
    assert found["kernels"][0] == RIGHT._asdict()
    assert {"tokens": 8192, "packed": True, "implementation": "xla"} in found["choices"][
        "attention"
    ]


def test_a_wrong_kernel_ends_it_with_1(machine):
    machine(rows=(RIGHT, WRONG))
    ended = cli.run("doctor")
    assert ended.code == 1 and "wrong: error 0.5, at most 0.01" in ended.out
    assert cli.run("doctor", "--no-kernels").code == 0


def test_an_accelerator_that_cannot_be_used_ends_it_with_1(machine):
    gpu = nvidia_smi.Gpu("NVIDIA L4", "580.65.06", 24 * 10**9, 0, "8.9")
    machine(nvidia=nvidia_smi.Found((gpu,), 1, None, "13.0"))
    ended = cli.run("doctor")
    assert ended.code == 1 and "int4" not in ended.out
    out = " ".join(ended.out.split())
    assert "machine: 1 × NVIDIA L4 with 24 GB, driver 580.65.06 for CUDA up to 13.0" in out
    assert (
        "wrong     JAX is installed without its plugin for CUDA, which the NVIDIA L4" in ended.out
    )
    assert '          → pip install "jax[cuda13]==0.10.2"' in ended.out


def test_it_works_where_jax_does_not(machine):
    machine(jax=probe.Answer(error="no answer within 120 s"))
    ended = cli.run("doctor", "--json")
    (problem,) = json.loads(ended.out)["problems"]
    assert ended.code == 1 and "no answer within 120 s" in problem["what"]


def test_what_costs_time_is_no_failure(machine):
    machine(environment={"XLA_FLAGS": "--xla_dump_to=/tmp/x"})
    ended = cli.run("doctor")
    assert ended.code == 0 and "XLA_FLAGS has --xla_dump_to=/tmp/x" in ended.out


def test_the_extra_is_not_needed_but_named(machine, monkeypatch):
    monkeypatch.setattr(doctor.extras, "_is_installed", lambda module: module != "tqdm")
    machine()
    ended = cli.run("doctor")
    assert ended.code == 0 and 'pip install "lora-jax[train]"' in ended.out


def test_the_help_fits(machine):
    machine()
    assert max(map(len, cli.run("doctor", "--help").lines)) <= 80


def test_an_unknown_flag_is_refused():
    assert "--jsn" in cli.refused("doctor", "--jsn")
