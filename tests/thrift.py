"""What makes a process that compiles very many small programs cheaper."""

import contextlib
import functools
import gc
from typing import Any

from hypothesis.internal import entropy


def begin() -> None:
    """To be called when jax has been imported."""
    # jax keeps very many objects, and to look through them all the time takes a tenth of it.
    gc.set_threshold(100_000, 50, 50)
    # Hypothesis collects garbage when it first seeds what is random: seconds, later in a run.
    with entropy.deterministic_PRNG():
        pass
    gc.freeze()
    # It makes an MLIR context for each program and loads all dialects: a fifth of a small one.
    with contextlib.suppress(ImportError, AttributeError):  # in a jax that does it otherwise
        from jax._src.interpreters import mlir

        mlir.make_ir_context = functools.cache(mlir.make_ir_context)


def do_not_collect(config: Any) -> None:
    """Keeps pytest from looking for garbage five times when it ends, at seconds each."""
    with contextlib.suppress(ImportError, AttributeError):  # in a pytest that does it otherwise
        from _pytest import unraisableexception

        config.stash[unraisableexception.gc_collect_iterations_key] = 0
