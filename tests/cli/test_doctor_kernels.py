"""The check and the timing of doctor's kernels, on tiny ones and on faulty ones."""

import jax
import jax.numpy as jnp
import pytest

from lora_jax.cli import doctor_cases, doctor_kernels, timing
from lora_jax.kernels import choice
from lora_jax.kernels.int4_matmul import forms
from lora_jax.planning import chips
from lora_jax.selftest import case

TINY = doctor_cases.Sizes(
    matmuls=((64, 128),), stack=3 * 64 * 64, rows=((1, 16), (16,)), tokens=(64,), heads=(16, 4, 16),
    vocabulary=(64, 32),
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "_SECONDS", 0)


@pytest.mark.long  # as in test_proof.py
def test_the_kernels_of_this_device_are_right():
    rows = [*doctor_kernels.rows(TINY)]
    assert [row.operation for row in rows] == [
        "int4", "int4", "int4 and gradient", "attention", "attention, packed", "cross-entropy",
        "embedding",
    ]  # fmt: skip
    assert {row.implementation for row in rows} == {"xla"}
    for row in rows:
        assert row.problem is None and row.error <= case.LIMITS.whole, row
        assert row.seconds > 0 and row.share is None  # a CPU has no published peaks
        assert len(row.line()) <= 80
    assert rows[0].shapes == "1 × 64 → 128" and rows[2].shapes == "16 × 64 → 128"
    assert rows[0].error > 0  # it was compared with another computation


def test_a_faulty_kernel_is_found(monkeypatch):
    blocked = forms.Forms.blocked

    def without_a_tile(self, *arguments):
        return blocked(self, *arguments).at[:, :16].set(0)

    monkeypatch.setattr(forms.Forms, "blocked", without_a_tile)
    row = next(doctor_kernels.rows(TINY))
    assert "off by" in row.problem


def double(run):
    """A case that should double its input."""
    return doctor_cases.Case("double", "4", case.Case(
        choice.XLA, "double", "4", (), lambda: jnp.arange(4, dtype=jnp.float32),
        lambda _, x, number: {"y": run(x)}, lambda _, x, number: {"y": 2 * x}, flops=12.0,
        num_bytes=6.0,
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        (lambda x: 2 * x, None),
        (lambda x: 2 * x * 1.001, None),
        (lambda x: (2 * x).at[3].set(0), "y off by 0.8 in all, of at most 0.02"),
        (lambda x: 2 * x / (x != 2), "off by inf"),
        (lambda x: jnp.log(-x), "off by nan"),
        (lambda x: 1 / 0, "division by zero"),
    ],
)
def test_a_wrong_result_or_an_exception_is_a_problem(run, problem):
    row = doctor_kernels._checked(double(run), None)
    assert (row.problem is None) if problem is None else (problem in row.problem)
    assert (row.seconds is None) == (problem is not None)


def test_without_memory_for_weights_the_report_goes_on(monkeypatch):
    def cases(device, sizes):
        yield double(lambda x: 2 * x)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile allocating")

    monkeypatch.setattr(doctor_cases, "cases", cases)
    first, second = doctor_kernels.rows(TINY)
    assert first.problem is None
    assert second.problem == "RESOURCE_EXHAUSTED: Out of memory while allocating"
    assert "the others" in second.line()


@pytest.mark.parametrize(("flops", "bandwidth", "least"), [(2.0, 6.0, 6.0), (12.0, 2.0, 3.0)])
def test_the_share_of_the_roofline(monkeypatch, flops, bandwidth, least):
    monkeypatch.setattr(timing.Calls, "seconds", lambda self: 12.0)
    peaks = chips.Peaks(flops, bandwidth, 1.0)
    row = doctor_kernels._checked(double(lambda x: 2 * x), peaks)
    assert row.share == pytest.approx(least / 12)


def test_a_timing_is_that_of_one_call(monkeypatch):
    calls = timing.Calls(lambda number, x: x + number, jnp.zeros(2))
    assert calls.result.tolist() == [0, 0] and calls._run(5).tolist() == [4, 4]
    monkeypatch.setattr(timing, "_SECONDS", 1.0)
    counts = []
    monkeypatch.setattr(calls, "_timed", lambda count: counts.append(count) or 0.01 * count)
    assert calls.seconds() == pytest.approx(0.01)
    assert counts[-1] >= 100 and len(set(counts[-timing._TIMINGS :])) == 1
