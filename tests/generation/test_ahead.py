"""Programs that are compiled, and halves of steps that are dispatched, before they are needed."""

import cases
import numpy as np
import pytest
from test_engine import GREEDY, compilations, fresh, golden

from lora_jax.generation import chunks, config, grammar

pytest.importorskip("llguidance")
ABC = grammar.regex("[a-c]+")


def mixed(count, longest):
    """Requests of all kinds, with prompts of at most `longest` tokens."""
    rng = np.random.default_rng(0)
    for i in range(count):
        prompt = rng.integers(3, 500, rng.integers(1, longest + 1)).tolist()
        yield prompt, config.Sampling(
            max_new_tokens=int(rng.integers(1, 6)), temperature=float(i % 2), top_k=i % 3,
            logprobs=i % 4 if i % 5 == 0 else None, seed=i if i % 2 else None,
            prompt_logprobs=1 if i % 7 == 0 else None,
            presence_penalty=float(i % 6 == 0), logit_bias=((i % 500, 1.0),) * (i % 8 == 0),
            min_tokens=i % 2, stop=("a",) * (i % 3),
        )  # fmt: skip
        if i % 10 == 0:
            yield prompt, config.Sampling(max_new_tokens=4, grammar=ABC)
        if i % 9 == 0:
            yield [*prompt, 5], config.Sampling(max_new_tokens=2)  # with a prefix to copy


@pytest.mark.parametrize(
    "context, sizes",
    [(128, (32, 64)), *cases.long((128, chunks.SIZES), (256, chunks.SIZES))],  # 256: of two spans
)
def test_nothing_compiles_after_all_was_compiled_ahead(context, sizes, monkeypatch):
    """200 requests of all kinds, the first ones too."""
    monkeypatch.setattr(chunks, "SIZES", sizes)
    serving = fresh("stories260K", slots=4, context=context, eos_ids=(2,))
    serving.compile_ahead().join()
    with compilations() as found:
        asked = [serving.submit(*each) for each in mixed(170, context - 10)]
        asked[1].abort()
        results = [each.result() for each in asked]
        assert not found
    assert len(results) > 200 and serving.stats().cached_tokens > 0


def test_logits_are_computed_while_grammars_advance(monkeypatch):
    """A grammar delays neither its own request nor those beside it."""
    serving, order = fresh("stories260K", eos_ids=(2,)), []
    loop = serving._loop

    def noted(call, name):
        def called(*arguments):
            if name != "_read" or loop._dispatched:
                order.append(name)
            return call(*arguments)

        return called

    for owner, name in ((serving.batch, "forward"), (loop, "_read"), (serving.batch, "choose")):
        monkeypatch.setattr(owner, name, noted(getattr(owner, name), name))
    prompt, following = golden("stories260K")[0]
    by_grammar = config.Sampling(max_new_tokens=6, grammar=ABC)
    both = [serving.submit(prompt, by_grammar), serving.submit(prompt, GREEDY)]
    found, plain = (each.result() for each in both)
    assert plain.tokens == following[: GREEDY.max_new_tokens]
    assert len(found.tokens) == 6 and set(found.text) <= set("abc")
    first = ["forward", "choose"]
    assert order[:17] == [*first, *5 * ["forward", "_read", "choose"]]
    assert {*order[17:]} == {"_read"}
