"""Output on a terminal."""

import contextlib
import pty
import sys
import termios

import pytest

from lora_jax import console


def read(outer):
    """What was written to a terminal that is closed now."""
    parts = []
    with contextlib.suppress(OSError), open(outer, "rb", buffering=0) as terminal:
        while part := terminal.read(1000):
            parts.append(part)
    return b"".join(parts).decode()


def test_the_bar_fits_into_80_columns(monkeypatch):
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, 80))
    metrics = {"loss": 12.3456, "tokens_per_second": 123_456.7, "mfu": 0.423, "peak_bytes": 12.34e9}
    with open(inner, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with console.Progress(0, 10_000, None) as progress:
            for moment in ("start_t", "last_print_t"):
                setattr(progress._bar, moment, getattr(progress._bar, moment) - 40_000)
            progress.show(4_000, metrics)
    shown = read(outer).split("\r")
    assert max(map(len, shown)) <= 80
    expected = "| 16:40:00 left, loss 12.346, 123,457 tokens/s, MFU 42%, 12.3 GB"
    assert any(text.startswith("4000/10000|") and text.endswith(expected) for text in shown), shown


@pytest.mark.parametrize(
    ("started", "train", "inspect"),
    [
        ("/somewhere/bin/lora-jax train", "lora-jax train", "lora-jax inspect"),
        ("lora-jax generate", "lora-jax train", "lora-jax inspect"),
        ("python -m lora_jax train", "python -m lora_jax train", "python -m lora_jax inspect"),
        ("scripts/train.py", "python scripts/train.py", "python scripts/inspect_data.py"),
    ],
)
def test_a_command_to_type_has_the_form_of_the_one_that_runs(monkeypatch, started, train, inspect):
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert (console.command("train"), console.command("inspect")) == (train, inspect)


def test_a_python_below_the_current_folder_is_named_by_its_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert console.command("merge") == ".venv/bin/python scripts/merge.py"
