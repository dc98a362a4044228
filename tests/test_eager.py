"""What numpy computes for jax in this suite has the bits, the type and the place of jax's."""

import eager
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import monitoring

DRAWN = np.random.default_rng(0).normal(size=(3, 5)) * 1e5
CASES = {
    "put": lambda: jnp.asarray(DRAWN),
    "narrow": lambda: jnp.asarray(DRAWN, jnp.bfloat16),
    "too large": lambda: jnp.asarray(DRAWN).astype(jnp.float16),
    "wrap": lambda: jnp.asarray(np.arange(-300, 300)).astype(jnp.int8),
    "truth": lambda: jnp.asarray(DRAWN > 0).astype(jnp.float32),
    "zeros": lambda: jnp.zeros((3, 5)),
    "weak": lambda: jnp.full((3, 5), jnp.asarray(2)),
    "turn": lambda: jnp.asarray(DRAWN).T.reshape(-1)[None].squeeze(0)[1:4],
}


def found(make):
    array = make()
    how = array.dtype, array.weak_type, array.committed, array.sharding, array.shape
    return np.asarray(array).tobytes(), *how


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_that_of_jax(case):
    by_numpy = found(CASES[case])
    with eager.compiled():
        assert found(CASES[case]) == by_numpy


def test_a_program_is_compiled_where_compilations_are_counted():
    counts = [0]

    def note(event, _, **__):
        counts[-1] += event == "/jax/core/compile/backend_compile_duration"

    monitoring.register_event_duration_secs_listener(note)
    try:
        jnp.asarray(np.ones((3, 7, 11), np.float32)).reshape(11, 21)
        counts.append(0)
        with eager.compiled():
            jax.block_until_ready(jnp.asarray(np.ones((3, 7, 11), np.float32)).reshape(11, 21))
    finally:
        monitoring.unregister_event_duration_listener(note)
    assert counts[0] == 0 < counts[1]  # how many depends on the version of jax
