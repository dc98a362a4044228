"""Runs the cases of a job, and leaves out the kernels that fail."""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import jax
import numpy as np

from lora_jax import errors
from lora_jax.kernels import choice, platform
from lora_jax.parallel import processes
from lora_jax.selftest import case, passed

PATIENCE = 600.0  # seconds for the compiler, after which what it has not done is left out


class Proof(NamedTuple):
    """kernels: that were right, now or earlier. left_out: one finding for each kernel that is left
    out. unknown: findings of XLA's own operations that did not run. num_run: cases that ran now."""

    kernels: tuple[str, ...]
    left_out: tuple[case.Finding, ...]
    unknown: tuple[case.Finding, ...]
    num_run: int
    seconds: float

    def lines(self) -> Iterator[str]:
        """What a user should know of it."""
        for found in self.left_out:
            yield (
                f"{found.kernel} is left out, and XLA's own operations take its place. "
                f"{found.name}: {found.problem}. Please report this line and the output of "
                "lora-jax doctor --json"
            )
        for found in self.unknown:
            yield f"could not be checked on this device: {found.name}: {found.problem}"
        if self.num_run and self.kernels:
            yield (
                f"{', '.join(self.kernels)}: checked on this device in {self.seconds:.1f} s, with "
                "the weights and shapes of this job"
            )


def is_needed() -> bool:
    """Whether the ambient mesh has devices that kernels are written for."""
    return platform.platform_here() in ("gpu", "tpu")


def run(cases: Sequence[case.Case]) -> Proof:
    """Runs the cases that have not passed on this device before. All processes must call it.

    Raises: UserError if an operation of XLA's own is wrong, which nothing can replace.
    """
    begun = time.monotonic()
    cases = [*{one.name: one for one in cases}.values()]
    done = processes.broadcast([passed.has_passed(one) for one in cases])
    todo = [one for one, is_done in zip(cases, done, strict=True) if not is_done]
    found = [*_run(todo)]
    processes.same("kernels that are right", [each.problem is None for each in found])
    wrong = [each for each in found if each.kernel == choice.XLA
             and each.problem and not each.failed_to_run]  # fmt: skip
    if wrong:
        raise errors.UserError(
            expected="XLA's operations to be right on this device",
            found=[f"{each.name}: {each.problem}" for each in wrong],
            do="update jax and the driver (lora-jax doctor says how); report this otherwise. "
            "--kernels xla goes on without this check",
        )
    left_out: dict[str, case.Finding] = {}
    for each in found:
        if each.problem and each.kernel in choice.KERNELS and each.kernel not in left_out:
            left_out[each.kernel] = each
            choice.leave_out(each.kernel, each.problem)
    kernels = dict.fromkeys(one.kernel for one in cases if one.kernel in choice.KERNELS)
    return Proof(
        tuple(kernel for kernel in kernels if kernel not in left_out),
        tuple(left_out.values()),
        tuple(each for each in found if each.failed_to_run and each.kernel == choice.XLA),
        len(todo),
        time.monotonic() - begun,
    )


def _run(cases: Sequence[case.Case]) -> Iterator[case.Finding]:
    marks = [passed.Mark(one) for one in cases]
    ended = processes.broadcast([mark.is_left_behind() for mark in marks])
    todo = []
    for one, mark, has_ended in zip(cases, marks, ended, strict=True):
        if has_ended:
            text = f"a process ended while it ran; to try again, delete {mark.path}"
            yield case.Finding(one.kernel, one.name, text, failed_to_run=True)
        else:
            todo.append(one)
    together = passed.Mark()
    if not processes.broadcast(together.is_left_behind()):
        with together:
            yield from _together(todo)
        return
    for one in todo:
        with passed.Mark(one):
            found = case.check(one)
        yield _noted(one, found)
    together.path.unlink(missing_ok=True)


def _together(cases: Sequence[case.Case]) -> Iterator[case.Finding]:
    """Compiles all at the same time, and runs one after the other."""
    pool, end = futures.ThreadPoolExecutor(os.cpu_count()), time.monotonic() + PATIENCE
    try:
        results = [_compiling(pool, one) for one in cases]
        for one, result in zip(cases, results, strict=True):
            try:
                found = case.finish(one, _compiled(result, end))
            except Exception as error:
                found = case.failure(one, error)
            yield _noted(one, found)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _compiling(pool: futures.Executor, one: case.Case) -> futures.Future:
    try:
        return pool.submit(case.compiled, case.start(one))
    except Exception as error:
        failed: futures.Future = futures.Future()
        failed.set_exception(error)
        return failed


def _compiled(result: futures.Future, end: float) -> jax.stages.Compiled:
    try:
        return result.result(max(0, end - time.monotonic()))
    except futures.TimeoutError:
        if result.done():  # an error of the compiler's own
            raise
        raise TimeoutError(f"not compiled after {PATIENCE:g} seconds") from None


def _noted(one: case.Case, found: case.Finding) -> case.Finding:
    if found.problem is None and processes.leads():
        passed.note(one, found)
    if found.failed_to_run and not device_works():
        passed.Mark(one).leave_behind()
        raise errors.UserError(
            expected="a device that works after a kernel has failed",
            found=f"{found.name}: {found.problem}",
            do="start again, and it is left out (or use --kernels xla, which leaves out all). "
            "Please report these lines and the output of lora-jax doctor --json",
        )
    return found


def device_works() -> bool:
    """Whether this process can still use its device. After some faults of a kernel, it cannot."""
    try:
        return float(jax.device_put(np.float32(2), jax.local_devices()[0])) == 2
    except Exception:
        return False
