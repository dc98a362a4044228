"""Runs a command to its exit code: errors, Ctrl-C, closed pipes."""

import errno
import io
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from lora_jax import console, errors
from lora_jax.parallel import processes, rendezvous


def run(main: Callable[[], int | None]) -> None:
    """Runs a command. An error that the user can fix gives one message and exit code 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no log lines of C++ libraries
    _open_standard_files()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal has no ×
    before = signal.signal(signal.SIGINT, _end_at_once)
    try:
        code = main()
        sys.stdout.flush()
        processes.leave()
    except errors.UserError as error:
        code = fail(error)
    except BrokenPipeError:  # `… | head`
        _drop_output()
        code = 1
    except KeyboardInterrupt:
        processes.end(130, "stopped")
        print("\nstopped", file=sys.stderr)
        code = 130
    except Exception as error:
        explained = _explained(error)
        if explained is None:
            error.add_note("This is an error in lora_jax. Please report it, with the command and "
                           "these lines, where you got lora_jax from.")  # fmt: skip
            processes.end(1, traceback.format_exc(), sure=False)
            raise
        code = fail(explained, sure=False)
    finally:
        signal.signal(signal.SIGINT, before)
    sys.exit(code)


def _open_standard_files() -> None:
    """Nothing takes the place of those that were closed, as a service or `>&-` closes them.

    The next file that is opened would get their number, and what is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def _drop_output() -> None:
    """What could not be printed is not tried again at the end, which would print a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explained(error: Exception) -> errors.UserError | None:
    """The UserError for what the user can fix; None for other errors."""
    if explained := _full_disk(error):
        return explained
    from lora_jax.parallel import devices  # imports jax

    return devices.explain(error)


def _full_disk(error: BaseException) -> errors.UserError | None:
    """The UserError for a full disk, which may be that of `> file`; None for other errors."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    return errors.UserError(
        expected="space on the disk",
        found=error.strerror or str(error),
        where=None if error.filename is None else str(error.filename),
        do="free some space, and start again",
    )


def _end_at_once(*_: Any) -> NoReturn:
    """Handles Ctrl-C while there is nothing to save.

    KeyboardInterrupt would often be raised in the import of jax or in its garbage collection
    callback, which swallow it or break.
    """
    os.write(2, b"\nstopped\n")
    os._exit(130)


def fail(error: errors.UserError, *, sure: bool = True) -> int:
    """Prints the message, ends the other processes, and returns the exit code."""
    width = console.width()
    wrapped = [
        part
        for line in f"error:{error}".splitlines()
        for part in textwrap.wrap(
            line, width, subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False
        )
        or [""]
    ]
    code = processes.RESTART if isinstance(error, rendezvous.Missing) else 2
    processes.end(code, "\n".join(wrapped), sure=sure)
    print("\n".join(wrapped), file=sys.stderr)
    return code
