"""Runs `lora-jax serve` for the scripts beside this one, in the environment of lora_jax.

LORA_JAX_PYTHON: the interpreter of that environment; the scripts themselves need their clients.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[3]
STORIES = ROOT / "tests/golden/models/stories260K"
PYTHON = os.environ.get("LORA_JAX_PYTHON", sys.executable)
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def process(*flags: object) -> Iterator[tuple[str, subprocess.Popen]]:
    """(the URL of a server on a free port, its process). It ends with the context."""
    command = [PYTHON, "-m", "lora_jax", "serve", "--port", "0", *map(str, flags)]
    started = subprocess.Popen(command, env=ENV, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        for line in started.stdout:
            if "://" in line and line.startswith("serve "):
                url = line.split()[1].removesuffix("/v1;")
                break
        else:
            raise SystemExit(f"the server ended with {started.wait()}")
        threading.Thread(target=started.stdout.read, daemon=True).start()
        yield url, started
    finally:
        started.terminate()
        started.wait()


@contextlib.contextmanager
def running(*flags: object) -> Iterator[str]:
    """The URL of a server on a free port."""
    with process(*flags) as (url, _):
        yield url


def report(given: object, *checks: Callable[[object], object]) -> int:
    """Runs checks and prints how each ended. Returns how many failed."""
    failed = 0
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            check(given)
            print(f"passed  {name}", flush=True)
        except Exception:
            failed += 1
            print(f"failed  {name}\n{traceback.format_exc()}", flush=True)
    return failed
