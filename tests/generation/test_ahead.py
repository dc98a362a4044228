"""Programs that are compiled before requests need them."""

import numpy as np
from test_engine import compilations, fresh

from lora_jax.generation import config


def mixed(count):
    """Requests of all kinds."""
    rng = np.random.default_rng(0)
    for i in range(count):
        prompt = rng.integers(3, 500, rng.integers(1, 150)).tolist()
        yield prompt, config.Sampling(
            max_new_tokens=int(rng.integers(1, 6)), temperature=float(i % 2), top_k=i % 3,
            logprobs=i % 4 if i % 5 == 0 else None, seed=i if i % 2 else None,
            prompt_logprobs=1 if i % 7 == 0 else None,
            presence_penalty=float(i % 6 == 0), logit_bias=((i % 500, 1.0),) * (i % 8 == 0),
            min_tokens=i % 2, stop=("a",) * (i % 3),
        )  # fmt: skip
        if i % 9 == 0:
            yield [*prompt, 5], config.Sampling(max_new_tokens=2)  # with a prefix to copy


def test_no_request_compiles_after_all_was_compiled_ahead():
    serving = fresh(slots=4, context=256)
    serving.compile_ahead().join()
    with compilations() as found:
        asked = [serving.submit(prompt, sampling) for prompt, sampling in mixed(100)]
        asked[1].abort()
        results = [each.result() for each in asked]
    assert not found
    assert len(results) > 100 and serving.stats().cached_tokens > 0
