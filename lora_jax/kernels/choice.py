"""Which of this project's kernels may run. XLA's own operations take the place of the others.

A kernel is left out because the user says so, or because it was wrong on this device.
"""

import contextlib
from collections.abc import Iterator

import jax

INT4_TPU = "int4_matmul/pallas_tpu"
INT4_HOPPER = "int4_matmul/mosaic_gpu"
INT4_TENSOR_CORES = "int4_matmul/triton_gpu"
INT4_FEW_ROWS = "int4_matmul/xla_gpu"
ATTENTION_TPU = "attention/splash"
ATTENTION_TOKAMAX = "attention/tokamax"
ATTENTION_CUDNN = "attention/cudnn"
ATTENTION_CACHED = "attention/flash_decoding"
LOW_RANK = "low_rank/triton_gpu"
XLA = "xla"  # none of them: XLA's own operations
KERNELS = (
    INT4_TPU,
    INT4_HOPPER,
    INT4_TENSOR_CORES,
    INT4_FEW_ROWS,
    ATTENTION_TPU,
    ATTENTION_TOKAMAX,
    ATTENTION_CUDNN,
    ATTENTION_CACHED,
    LOW_RANK,
)

_left_out: dict[str, str] = {}  # {kernel: why}
_only_xla = False


def use(mode: str) -> None:
    """From now on, programs that are compiled have no kernel if mode is "xla"; with "auto", those
    that are not left out."""
    global _only_xla
    if _only_xla != (mode == "xla"):
        _only_xla = mode == "xla"
        jax.clear_caches()  # of programs that were traced before


def leave_out(kernel: str, why: str) -> None:
    """From now on, programs that are compiled do without the kernel.

    Raises: ValueError if there is no such kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"expected one of {KERNELS}, found {kernel!r}")
    if kernel not in _left_out:
        _left_out[kernel] = why
        jax.clear_caches()  # of programs that were traced with it


def refusal(kernel: str) -> str | None:
    """Why the kernel is left out, or None."""
    return "--kernels xla" if _only_xla else _left_out.get(kernel)


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """A context after which the same kernels are left out as before."""
    before, mode = dict(_left_out), "xla" if _only_xla else "auto"
    try:
        yield
    finally:
        use(mode)
        if before != _left_out:
            _left_out.clear()
            _left_out.update(before)
            jax.clear_caches()
