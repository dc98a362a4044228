"""The sampler: transformers' values, draws, seeds, log-probabilities, and what nobody asks for."""

import functools
import pathlib

import cases
import jax
import numpy as np
import pytest

from lora_jax.generation import config, reductions
from lora_jax.generation import sampling as samplers

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "sampling.npz"
NUM, VOCAB = 6, 1000  # of the tests for which any do: one program
LIVE, LENGTH = np.ones(NUM, bool), np.ones(NUM, np.int32)
sample, edit, weights, draw, logprobs = map(
    jax.jit,
    (samplers.sample, samplers.edit, samplers.weights, reductions.draw, samplers.logprobs),
)
restricted = jax.jit(samplers._restricted, static_argnums=1)
empty = jax.jit(samplers.empty, static_argnums=(0, 1))


def make_rows(num, vocab, **settings):
    """Rows with settings as in Rows, of one value or one per row."""
    rows = jax.tree.map(np.asarray, empty(num, vocab))
    for name, value in settings.items():
        old = getattr(rows, name)
        rows = rows._replace(**{name: np.broadcast_to(np.asarray(value, old.dtype), old.shape)})
    return rows


def seeds(values):
    return np.stack([jax.random.key_data(jax.random.key(int(value))) for value in values])


def normal(*shape, seed=0, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def pack(allowed):
    """bool [B, V] → words of 32 bits."""
    padded = np.pad(allowed, ((0, 0), (0, -allowed.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


@functools.cache
def golden():
    """(arrays, rows, length, allowed) of the golden file."""
    found = dict(np.load(GOLDEN))
    num, vocab = found["logits"].shape
    own = [name for name in samplers.Rows._fields if name in found and name != "stops"]
    stops = np.full((num, config.MOST_STOP_IDS), -1)
    stops[:, : found["stops"].shape[1]] = found["stops"]
    seen, counts = np.zeros((num, vocab), bool), np.zeros((num, vocab), int)
    for row in range(num):
        seen[row, found["prompt"][row]] = True
        np.add.at(counts[row], found["output"][row], 1)
    num_prompt, num_output = found["prompt"].shape[1], found["output"].shape[1]
    rows = make_rows(
        num, vocab, **{name: found[name] for name in own}, biased=found["bias"].any(axis=1),
        stops=stops, min_length=num_prompt + found["min_tokens"], seen=seen, counts=counts,
        seed=seeds(range(num)),
    )  # fmt: skip
    return found, rows, np.full(num, num_prompt + num_output), pack(found["allowed"])


def kept_probabilities(logits, rows):
    w, least = map(np.asarray, weights(logits, rows))
    w = np.where(w >= least[:, None], w.astype(np.float64), 0)
    return w / w.sum(axis=1, keepdims=True)


def softmax(logits):
    w = np.exp(np.asarray(logits, np.float64) - logits.max(axis=-1, keepdims=True))
    return w / w.sum(axis=-1, keepdims=True)


def test_logits_are_edited_as_transformers_does():
    found, rows, length, allowed = golden()
    edited = edit(found["logits"], rows, length, allowed)
    np.testing.assert_allclose(edited, found["edited"], rtol=1e-6, atol=1e-6)


def test_tokens_are_kept_and_as_likely_as_in_transformers():
    found, rows, _, _ = golden()
    probabilities = kept_probabilities(found["edited"], rows)
    np.testing.assert_array_equal(probabilities > 0, np.isfinite(found["scores"]))
    np.testing.assert_allclose(probabilities, softmax(found["scores"]), rtol=2e-6, atol=1e-6)


def test_a_draw_of_the_whole_is_one_that_transformers_keeps():
    found, rows, length, allowed = golden()
    live = np.ones(len(length), bool)
    for position in range(20):
        tokens, _, _ = sample(found["logits"], rows._replace(seed=seeds(length + position)), length,
                              live, allowed)  # fmt: skip
        assert np.isfinite(found["scores"][np.arange(len(tokens)), tokens]).all()
    greedy, _, _ = sample(found["logits"], rows._replace(temperature=0 * rows.temperature), length,
                          live, allowed)  # fmt: skip
    np.testing.assert_array_equal(greedy, found["edited"].argmax(axis=1))


HARD = np.array([
    [0.0, -0.0, 1e-30, -1e-30, 5.0, -5.0, 1e30, -1e30],  # signs, small and large numbers
    [2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.0],  # ties
    [-np.inf, 3.0, -np.inf, 2.0, -np.inf, -np.inf, -np.inf, -1.0],
    [-7.5, -7.25, -7.0, -7.125, -9.0, -8.0, -7.75, -7.0000005],
], np.float32)  # fmt: skip


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 100])
def test_top_k_keeps_the_k_most_likely_and_ties(k):
    for logits in (HARD, normal(6, 300)):
        # a high temperature, so that no token that is kept underflows
        rows = make_rows(len(logits), logits.shape[1], temperature=1e30, top_k=k)
        kth = np.sort(logits, axis=1)[:, ::-1][:, min(k, logits.shape[1]) - 1]
        expected = (logits >= kth[:, None]) & np.isfinite(logits)
        np.testing.assert_array_equal(kept_probabilities(logits, rows) > 0, expected)


def test_a_top_k_beyond_all_integers_keeps_all():
    assert samplers.row(config.Sampling(top_k=10**30), [0], [], 8).top_k == 8


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_p_and_ties(p):
    ties = np.repeat(normal(6, 75), 4, axis=1)
    for logits in (normal(6, 300), ties):
        rows = make_rows(len(logits), logits.shape[1], temperature=1.0, top_p=p)
        found = kept_probabilities(logits, rows) > 0
        for row, kept in zip(logits, found, strict=True):
            likely = np.sort(row)[::-1]
            reached = np.cumsum(softmax(row[None])[0][np.argsort(-row)]) >= p
            np.testing.assert_array_equal(kept, row >= likely[np.argmax(reached)])


def mixed(num, vocab):
    """(logits, rows, length, allowed) of rows that ask for different things."""
    rng = np.random.default_rng(1)
    pick = lambda *values: np.array(values)[np.arange(num) % len(values)]  # noqa: E731
    rows = make_rows(
        num, vocab,
        temperature=pick(0, 1, 0.7, 0, 2), top_k=pick(0, 40, 0), top_p=pick(1, 1, 0.9, 0.5),
        min_p=pick(0, 0, 0, 0, 0, 0.05), repetition_penalty=pick(1, 1, 1.3),
        presence_penalty=pick(0, 0, 0, 0.5), frequency_penalty=pick(0, 0, 0, 0, 0.2),
        seed=seeds(range(num)), seen=rng.random((num, vocab)) < 0.1,
        counts=rng.integers(0, 3, (num, vocab)), logprobs=pick(False, True, True),
        bias=rng.normal(size=(num, vocab)), biased=pick(False, True),
        min_length=pick(0, 50), stops=rng.integers(-1, vocab, (num, config.MOST_STOP_IDS)),
    )  # fmt: skip
    allowed = (rng.random((num, vocab)) < 0.5) | pick(True, True, True, False)[:, None]
    return normal(num, vocab), rows, rng.integers(1, 100, num), pack(allowed)


@pytest.mark.parametrize("vocab", [96, *cases.long(1000)])
def test_a_row_is_the_same_alone_and_in_any_batch(vocab):
    num = 13
    logits, rows, length, allowed = arguments = mixed(num, vocab)
    live = np.ones(num, bool)
    tokens, _, after = sample(logits, rows, length, live, allowed)
    assert len(set(np.asarray(tokens).tolist())) > num // 2
    order = np.random.default_rng(0).permutation(num)
    for size in (1, 7):
        for taken in np.split(order[: num - num % size], num // size):
            few = jax.tree.map(lambda x, taken=taken: x[taken], arguments)
            one, _, after_one = sample(*few[:3], live[taken], few[3])
            np.testing.assert_array_equal(one, tokens[taken])
            np.testing.assert_array_equal(after_one.counts, after.counts[taken])
    half = np.arange(num) % 2 == 0  # in company that ends
    found, _, ended = sample(logits, rows, length, half, allowed)
    np.testing.assert_array_equal(found, np.where(half, tokens, 0))
    np.testing.assert_array_equal(ended.counts[half], after.counts[half])
    np.testing.assert_array_equal(ended.counts[~half], rows.counts[~half])


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=1.0),
        dict(temperature=1.7),
        dict(temperature=1.5, top_k=12, top_p=0.85, min_p=0.1),
    ],
)
def test_draws_follow_the_distribution(settings):
    """χ² of 20,000 positions of one seed."""
    num, vocab = 20_000, 60
    logits = normal(1, vocab, scale=1.5)
    rows = make_rows(num, vocab, **settings, seed=seeds([3]))
    tokens, _, _ = sample(np.tile(logits, (num, 1)), rows, np.arange(num), np.ones(num, bool), None)
    expected = num * kept_probabilities(logits, jax.tree.map(lambda x: x[:1], rows))[0]
    found = np.bincount(tokens, minlength=vocab)
    assert not found[expected == 0].any()
    kept = expected > 0
    chi_square = ((found[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_a_draw_inverts_the_distribution_of_a_large_vocabulary():
    """At the token drawn, the exact cumulative probability is u within the rounding of float32."""
    num, vocab = 40, 128_256
    w = np.exp(normal(1, vocab, scale=3) - 14)
    u = np.append(np.linspace(0, 1, num, endpoint=False), [1 - 2.0**-23]).astype(np.float32)
    token = draw(np.tile(w, (len(u), 1)), np.zeros(len(u), np.float32), u)
    cumulative = np.cumsum(w[0].astype(np.float64)) / w.sum(dtype=np.float64)
    before = np.append(0, cumulative)[token]
    error = np.maximum(before - u, 0) + np.maximum(u - cumulative[token], 0)
    assert error.max() < 3e-7


def test_a_token_of_probability_zero_is_never_drawn():
    w = np.zeros((3, 300), np.float32)
    w[0, [2, 131, 298]] = 1, 1e-30, 1e-12
    w[1, [128, 255]] = 3, 5
    w[2, 140] = 2e-38
    for u in (0, 0.3, 0.5, 0.9, 1 - 2.0**-23):
        token = draw(w, np.zeros(3, np.float32), np.full(3, u, np.float32))
        assert (w[np.arange(3), token] > 0).all()


def test_a_draw_uses_the_key_of_its_seed_and_position():
    """First token whose cumulative probability exceeds the uniform number of fold_in(key, n)."""
    logits = np.zeros((NUM, VOCAB), np.float32)
    length = np.array([0, 1, 2, 70, 500, 500], np.int32)
    own = [0, 0, 1, 2, 123456789, 2**31 - 1]
    tokens, _, _ = sample(
        logits, make_rows(NUM, VOCAB, temperature=1.0, seed=seeds(own)), length, LIVE
    )
    u = [jax.random.uniform(jax.random.fold_in(jax.random.key(seed), n))
         for seed, n in zip(own, length, strict=True)]  # fmt: skip
    np.testing.assert_array_equal(tokens, np.floor(VOCAB * np.array(u)))
    assert len(set(np.asarray(tokens).tolist())) == 6


def test_greedy_rows_ignore_filters_and_not_penalties():
    logits, every = normal(NUM, VOCAB), np.arange(NUM)
    best = logits.argmax(axis=1)
    logits[every, best] = np.abs(logits[every, best]) + 1
    penalty = np.array([0, 0, 50] * 2)
    rows = make_rows(NUM, VOCAB, top_k=1, top_p=0.1, min_p=1.0, presence_penalty=penalty)
    tokens, _, rows = sample(logits, rows, LENGTH, LIVE)
    np.testing.assert_array_equal(tokens, best)
    tokens, _, rows = sample(logits, rows, LENGTH, LIVE)
    np.testing.assert_array_equal(tokens != best, penalty > 0)
    # Counted where a row has a penalty.
    counts = np.asarray(rows.counts)
    np.testing.assert_array_equal(counts.sum(axis=1), np.where(penalty, 2, 0))
    assert (counts[every, best] == (penalty > 0)).all()
    assert (counts[every, tokens] == (penalty > 0)).all()


def test_the_first_of_equal_logits_is_greedy():
    logits = np.zeros((NUM, VOCAB), np.float32)
    logits[0, [200, 399]] = 1
    tokens, _, _ = sample(logits, make_rows(NUM, VOCAB), LENGTH, LIVE)
    assert tokens.tolist() == [200] + [0] * (NUM - 1)


def one_allowed(vocab):
    """(logits of which the first is the largest, bool of tokens: all, and only the last)."""
    logits, allowed = normal(2, vocab), np.ones((2, vocab), bool)
    logits[:, 0] = 20
    allowed[1] = np.arange(vocab) == vocab - 1
    return logits, allowed


@pytest.mark.parametrize("vocab", [31, 32, 33, 1000])
def test_bits_beyond_the_vocabulary_do_not_matter(vocab):
    logits, allowed = one_allowed(vocab)
    words = pack(allowed)
    for form in (words, words.view(np.int32)):
        edited = edit(logits, make_rows(2, vocab), LENGTH[:2], form)
        np.testing.assert_array_equal(edited, np.where(allowed, logits, -np.inf))
        assert restricted(form, vocab).tolist() == [False, True]


@pytest.mark.parametrize("vocab", [33, *cases.long(1000)])
def test_a_grammar_holds_in_its_row_alone(vocab):
    logits, allowed = one_allowed(vocab)
    rows = make_rows(2, vocab, temperature=[0.0, 1.0])
    tokens, _, _ = sample(logits, rows, LENGTH[:2], LIVE[:2], pack(allowed).view(np.int32))
    assert tokens.tolist() == [0, vocab - 1]


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-30, 1.0])
def test_a_row_whose_tokens_are_excluded_gets_one_of_the_vocabulary(temperature):
    logits = np.full((NUM, VOCAB), -np.inf, np.float32)
    logits[1::2, 7] = 3
    rows = make_rows(NUM, VOCAB, temperature=temperature, top_k=3, top_p=0.5, min_p=0.1)
    tokens, _, _ = sample(logits, rows, LENGTH, LIVE)
    assert ((tokens >= 0) & (tokens < VOCAB)).all() and (tokens[1::2] == 7).all()
    tokens, _, _ = sample(logits * np.nan, rows, LENGTH, LIVE)
    assert ((tokens >= 0) & (tokens < VOCAB)).all()


@pytest.mark.parametrize("vocab", [12, VOCAB])
def test_log_probabilities_are_of_the_raw_logits(vocab):
    logits, k, every = normal(NUM, vocab), min(config.MOST_LOGPROBS, vocab), np.arange(NUM)
    bias = np.zeros((NUM, vocab))
    bias[1, 5] = 100
    biased, asked = every == 1, every != 3
    rows = make_rows(NUM, vocab, bias=bias, biased=biased, logprobs=asked)
    tokens, found, _ = sample(logits, rows, LENGTH, LIVE)
    expected = np.log(softmax(logits))
    assert tokens[1] == 5 and found.ids.shape == found.values.shape == (NUM, k)
    np.testing.assert_allclose(found.chosen, expected[every, tokens], rtol=1e-5)
    np.testing.assert_array_equal(found.ids, np.argsort(-logits, axis=1)[:, :k])
    np.testing.assert_allclose(found.values, -np.sort(-expected, axis=1)[:, :k], rtol=1e-5)
    np.testing.assert_array_equal(found.chosen[~biased], found.values[~biased, 0])


def test_log_probabilities_that_no_live_row_asks_for_are_zero():
    asked = np.arange(NUM) == 0
    rows = make_rows(NUM, VOCAB, logprobs=asked)
    _, found, _ = sample(normal(NUM, VOCAB), rows, LENGTH, ~asked)
    assert not any(np.asarray(leaf).any() for leaf in found)


def test_log_probabilities_of_a_prompt():
    logits, ids = normal(9, 200), np.arange(9) * 20
    found = logprobs(logits, ids)
    expected = np.log(softmax(logits))
    np.testing.assert_allclose(found.chosen, expected[np.arange(9), ids], rtol=1e-5)
    for rank in range(config.MOST_LOGPROBS):  # of any of the most likely tokens: the same float
        ranked = logprobs(logits, found.ids[:, rank])
        np.testing.assert_array_equal(ranked.chosen, found.values[:, rank])


@pytest.fixture(scope="module")
def recording():
    """(`sample` that notes which of its functions run, the set of their names)."""
    ran = set()

    def recorded(name, function, *arguments):
        jax.debug.callback(functools.partial(ran.add, name))
        return function(*arguments)

    def call(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            own = [(samplers, name) for name in ("weights", "edit", "logprobs")]
            for module, name in (*own, (reductions, "bisect")):
                function = functools.partial(recorded, name, getattr(module, name))
                patch.setattr(module, name, function)
            return samplers.sample(*arguments)

    return jax.jit(call), ran


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(top_k=3, top_p=0.5, min_p=0.1), set()),
        (dict(logprobs=True), {"logprobs"}),
        (dict(temperature=1), {"weights"}),
        (dict(temperature=1, top_k=3), {"weights", "bisect"}),
        (dict(temperature=1, top_p=0.5), {"weights", "bisect"}),
        (dict(presence_penalty=1), {"edit"}),
        (dict(biased=True), {"edit"}),
        (dict(min_length=9), {"edit"}),
    ],
)
def test_what_no_live_row_asks_for_does_not_run(recording, settings, expected):
    recorded, ran = recording
    rows, allowed = make_rows(2, 40, **settings), pack(np.ones((2, 40), bool))
    for live, found in (([False, False], set()), ([False, True], expected)):
        ran.clear()
        recorded(normal(2, 40), rows, LENGTH[:2], np.array(live), allowed)
        jax.effects_barrier()
        assert ran == found


def test_state_is_updated_in_place_by_one_program():
    """Nothing of the state is copied, and no setting compiles anything."""
    num, vocab = 4, 1000
    step = jax.jit(samplers.sample, donate_argnums=1)
    logits, rows, length, allowed = mixed(num, vocab)
    live = np.ones(num, bool)
    compiled = step.lower(logits, rows, length, live, allowed).compile()
    shape = f"[{num},{vocab}]"
    copies = [line for line in compiled.as_text().splitlines()
              if " copy(" in line and shape in line.split(" copy(")[0]]  # fmt: skip
    assert len(copies) <= 1  # of the logits, where rows that draw are not edited
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(rows))
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    for some in jax.device_put((empty(num, vocab), rows)):
        step(logits, some, length, live, allowed)
    assert step._cache_size() == 1


def test_rows_that_are_not_live_keep_their_settings():
    """A request waits for the rest of its prompt while others are sampled."""
    rows, live = make_rows(NUM, VOCAB, temperature=[1.0, 0.7] * 3), np.array([True, False] * 3)
    *_, after = sample(np.zeros((NUM, VOCAB), np.float32), rows, LENGTH, live)
    jax.tree.map(np.testing.assert_array_equal, after, rows)
