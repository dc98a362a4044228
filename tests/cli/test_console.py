"""What the scripts draw on a terminal."""

import contextlib
import pty
import sys
import termios

import cli  # noqa: F401 (puts scripts/ on the path)

from lora_jax import console  # isort: skip


def read(outer):
    """What was written to a terminal that is closed by now."""
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
    told = "| 16:40:00 left, loss 12.346, 123,457 tokens/s, MFU 42%, 12.3 GB"
    assert any(text.startswith("4000/10000|") and text.endswith(told) for text in shown), shown
