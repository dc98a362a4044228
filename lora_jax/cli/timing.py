"""How long an operation takes on the device, without the time to start it from Python."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_TIMINGS = 5
_SECONDS = 0.004  # of each, at least: a hundred times as long as starting a program takes


class Calls:
    """One compiled program of many calls function(number of the call, *arguments) in a row.

    result: that of call 0.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        def program(count, arguments):
            shapes = jax.eval_shape(function, 0, *arguments)
            result = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

            def call(number, state):
                arguments, _ = state
                # The barrier makes the next call wait for this one, and hides from XLA that it has
                # the same arguments: otherwise one call would do.
                return lax.optimization_barrier((arguments, function(number, *arguments)))

            return lax.fori_loop(0, count, call, (arguments, result))[1]

        self._program, self._arguments = jax.jit(program), arguments
        self.result = self._run(1)

    def seconds(self) -> float:
        """Seconds of one call: the median of several timings, each of enough calls."""
        count = 1
        while (taken := self._timed(count)) < _SECONDS:
            count = int(count * min(10, 1 + 1.2 * _SECONDS / taken)) + 1
        return statistics.median([taken, *(self._timed(count) for _ in range(1, _TIMINGS))]) / count

    def _timed(self, count: int) -> float:
        start = time.perf_counter()
        self._run(count)
        return time.perf_counter() - start

    def _run(self, count: int) -> Any:
        return jax.block_until_ready(self._program(count, self._arguments))
