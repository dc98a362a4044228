"""The sampler: transformers' values, draws, seeds, log-probabilities, and what nobody asks for."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.generation import config
from lora_jax.generation import sampling as samplers

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "sampling.npz"
sample = jax.jit(samplers.sample)


def make_rows(num, vocab, **settings):
    """Rows with settings as in Rows, of one value or one per row."""
    rows = samplers.empty(num, vocab)
    for name, value in settings.items():
        old = getattr(rows, name)
        rows = rows._replace(**{name: jnp.broadcast_to(jnp.asarray(value, old.dtype), old.shape)})
    return rows


def seeds(values):
    return jnp.stack([jax.random.key_data(jax.random.key(int(value))) for value in values])


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
    return found, rows, jnp.full(num, num_prompt + num_output), jnp.asarray(pack(found["allowed"]))


def kept_probabilities(logits, rows):
    w, least = samplers.weights(jnp.asarray(logits), rows)
    w = np.where(w >= least[:, None], np.asarray(w, np.float64), 0)
    return w / w.sum(axis=1, keepdims=True)


def softmax(logits):
    w = np.exp(np.asarray(logits, np.float64) - logits.max(axis=-1, keepdims=True))
    return w / w.sum(axis=-1, keepdims=True)


def test_logits_are_edited_as_transformers_does():
    found, rows, length, allowed = golden()
    edited = samplers.edit(jnp.asarray(found["logits"]), rows, length, allowed)
    np.testing.assert_allclose(edited, found["edited"], rtol=1e-6, atol=1e-6)


def test_tokens_are_kept_and_as_likely_as_in_transformers():
    found, rows, _, _ = golden()
    probabilities = kept_probabilities(found["edited"], rows)
    np.testing.assert_array_equal(probabilities > 0, np.isfinite(found["scores"]))
    np.testing.assert_allclose(probabilities, softmax(found["scores"]), rtol=2e-6, atol=1e-6)


def test_a_draw_of_the_whole_is_one_that_transformers_keeps():
    found, rows, length, allowed = golden()
    live = jnp.ones(len(length), bool)
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


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_p_and_ties(p):
    ties = np.repeat(normal(4, 75), 4, axis=1)
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
    return normal(num, vocab), rows, jnp.asarray(rng.integers(1, 100, num)), pack(allowed)


@pytest.mark.parametrize("vocab", [96, 1000])
def test_a_row_is_the_same_alone_and_in_any_batch(vocab):
    num = 13
    logits, rows, length, allowed = arguments = mixed(num, vocab)
    live = jnp.ones(num, bool)
    tokens, _, after = sample(logits, rows, length, live, allowed)
    assert len(set(np.asarray(tokens).tolist())) > num // 2
    order = np.random.default_rng(0).permutation(num)[:7]
    for rows_taken in ([order], [np.array([row]) for row in range(num)]):
        for taken in rows_taken:
            few = jax.tree.map(lambda x, taken=taken: x[taken], arguments)
            one, _, after_one = sample(*few[:3], live[taken], few[3])
            np.testing.assert_array_equal(one, tokens[taken])
            np.testing.assert_array_equal(after_one.counts, after.counts[taken])
    half = np.arange(num) % 2 == 0  # in company that ends
    found, _, ended = sample(logits, rows, length, jnp.asarray(half), allowed)
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
    tokens, _, _ = sample(
        np.tile(logits, (num, 1)), rows, jnp.arange(num), jnp.ones(num, bool), None
    )
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
    token = jax.jit(samplers._draw)(jnp.tile(w, (len(u), 1)), jnp.zeros(len(u)), u)
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
        token = samplers._draw(jnp.asarray(w), jnp.zeros(3), jnp.full(3, u, jnp.float32))
        assert (w[np.arange(3), token] > 0).all()


def test_a_draw_uses_the_key_of_its_seed_and_position():
    """First token whose cumulative probability exceeds the uniform number of fold_in(key, n)."""
    logits = np.zeros((6, 1000), np.float32)
    length = jnp.array([0, 1, 2, 70, 500, 500])
    own = [0, 0, 1, 2, 123456789, 2**31 - 1]
    tokens, _, _ = sample(
        logits, make_rows(6, 1000, temperature=1.0, seed=seeds(own)), length, jnp.ones(6, bool)
    )
    u = [jax.random.uniform(jax.random.fold_in(jax.random.key(seed), n))
         for seed, n in zip(own, length, strict=True)]  # fmt: skip
    np.testing.assert_array_equal(tokens, np.floor(1000 * np.array(u)))
    assert len(set(np.asarray(tokens).tolist())) == 6


def test_greedy_rows_ignore_filters_and_not_penalties():
    logits = normal(3, 50)
    best = logits.argmax(axis=1)
    logits[np.arange(3), best] = np.abs(logits[np.arange(3), best]) + 1
    rows = make_rows(3, 50, top_k=1, top_p=0.1, min_p=1.0, presence_penalty=[0, 0, 50])
    live, length = jnp.ones(3, bool), jnp.ones(3, jnp.int32)
    tokens, _, rows = sample(logits, rows, length, live)
    np.testing.assert_array_equal(tokens, best)
    tokens, _, rows = sample(logits, rows, length, live)
    assert (tokens[:2] == best[:2]).all() and tokens[2] != best[2]
    # Counted where a row has a penalty.
    np.testing.assert_array_equal(rows.counts.sum(axis=1), [0, 0, 2])
    assert rows.counts[2, best[2]] == 1 and rows.counts[2, tokens[2]] == 1


def test_the_first_of_equal_logits_is_greedy():
    logits = np.zeros((2, 400), np.float32)
    logits[0, [200, 399]] = 1
    tokens, _, _ = sample(logits, make_rows(2, 400), jnp.ones(2, jnp.int32), jnp.ones(2, bool))
    assert tokens.tolist() == [200, 0]


@pytest.mark.parametrize("vocab", [31, 32, 33, 1000])
def test_a_grammar_holds_in_its_row_alone(vocab):
    """Bits beyond the vocabulary do not matter."""
    logits = normal(2, vocab)
    logits[:, 0] = 20
    allowed = np.ones((2, vocab), bool)
    allowed[1] = np.arange(vocab) == vocab - 1
    words = pack(allowed)
    for form in (words, words.view(np.int32)):
        tokens, _, _ = sample(logits, make_rows(2, vocab, temperature=[0.0, 1.0]),
                              jnp.ones(2, jnp.int32), jnp.ones(2, bool), form)  # fmt: skip
        assert tokens.tolist() == [0, vocab - 1]
    restricted = samplers._restricted(jnp.asarray(words), vocab)
    assert restricted.tolist() == [False, True]


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-30, 1.0])
def test_a_row_whose_tokens_are_excluded_gets_one_of_the_vocabulary(temperature):
    logits = np.full((2, 50), -np.inf, np.float32)
    logits[1, 7] = 3
    rows = make_rows(2, 50, temperature=temperature, top_k=3, top_p=0.5, min_p=0.1)
    tokens, _, _ = sample(logits, rows, jnp.ones(2, jnp.int32), jnp.ones(2, bool))
    assert 0 <= tokens[0] < 50 and tokens[1] == 7
    tokens, _, _ = sample(logits * np.nan, rows, jnp.ones(2, jnp.int32), jnp.ones(2, bool))
    assert ((tokens >= 0) & (tokens < 50)).all()


@pytest.mark.parametrize("vocab", [12, 1000])
def test_log_probabilities_are_of_the_raw_logits(vocab):
    logits, k = normal(3, vocab), min(config.MOST_LOGPROBS, vocab)
    bias = np.zeros((3, vocab))
    bias[1, 5] = 100
    rows = make_rows(3, vocab, bias=bias, biased=[False, True, False], logprobs=[True, True, False])
    tokens, found, _ = sample(logits, rows, jnp.ones(3, jnp.int32), jnp.ones(3, bool))
    expected = np.log(softmax(logits))
    assert tokens[1] == 5 and found.ids.shape == found.values.shape == (3, k)
    np.testing.assert_allclose(found.chosen, expected[np.arange(3), tokens], rtol=1e-5)
    np.testing.assert_array_equal(found.ids, np.argsort(-logits, axis=1)[:, :k])
    np.testing.assert_allclose(found.values, -np.sort(-expected, axis=1)[:, :k], rtol=1e-5)
    assert found.chosen[0] == found.values[0, 0] and found.chosen[2] == found.values[2, 0]


def test_log_probabilities_that_no_live_row_asks_for_are_zero():
    rows = make_rows(2, 40, logprobs=[True, False])
    live = jnp.array([False, True])
    _, found, _ = sample(normal(2, 40), rows, jnp.ones(2, jnp.int32), live)
    assert not any(np.asarray(leaf).any() for leaf in found)


def test_log_probabilities_of_a_prompt():
    logits, ids = normal(9, 200), jnp.arange(9) * 20
    found = samplers.logprobs(jnp.asarray(logits), ids)
    expected = np.log(softmax(logits))
    np.testing.assert_allclose(found.chosen, expected[np.arange(9), ids], rtol=1e-5)
    for rank in range(config.MOST_LOGPROBS):  # of any of the most likely tokens: the same float
        ranked = samplers.logprobs(jnp.asarray(logits), found.ids[:, rank])
        np.testing.assert_array_equal(ranked.chosen, found.values[:, rank])


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(top_k=3, top_p=0.5, min_p=0.1), set()),
        (dict(logprobs=True), {"logprobs"}),
        (dict(temperature=1), {"weights"}),
        (dict(temperature=1, top_k=3), {"weights", "_bisect"}),
        (dict(temperature=1, top_p=0.5), {"weights", "_bisect"}),
        (dict(presence_penalty=1), {"edit"}),
        (dict(biased=True), {"edit"}),
        (dict(min_length=9), {"edit"}),
    ],
)
def test_what_no_live_row_asks_for_does_not_run(monkeypatch, settings, expected):
    ran = set()

    def recorded(name, function, *arguments):
        jax.debug.callback(functools.partial(ran.add, name))
        return function(*arguments)

    for name in ("weights", "_bisect", "edit", "logprobs"):
        function = functools.partial(recorded, name, getattr(samplers, name))
        monkeypatch.setattr(samplers, name, function)
    rows = make_rows(2, 40, **settings)
    for live, found in (([False, False], set()), ([False, True], expected)):
        ran.clear()
        samplers.sample(jnp.asarray(normal(2, 40)), rows, jnp.ones(2, jnp.int32), jnp.array(live),
                        jnp.asarray(pack(np.ones((2, 40), bool))))  # fmt: skip
        jax.effects_barrier()
        assert ran == found


def test_state_is_updated_in_place_by_one_program():
    """Nothing of the state is copied, and no setting compiles anything."""
    num, vocab = 4, 1000
    step = jax.jit(samplers.sample, donate_argnums=1)
    logits, rows, length, allowed = mixed(num, vocab)
    live = jnp.ones(num, bool)
    compiled = step.lower(logits, rows, length, live, allowed).compile()
    shape = f"[{num},{vocab}]"
    copies = [line for line in compiled.as_text().splitlines()
              if " copy(" in line and shape in line.split(" copy(")[0]]  # fmt: skip
    assert len(copies) <= 1  # of the logits, where rows that draw are not edited
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(rows))
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    for some in (samplers.empty(num, vocab), rows):
        step(logits, some, length, live, allowed)
    assert step._cache_size() == 1


def test_rows_that_are_not_live_keep_their_settings():
    """A request waits for the rest of its prompt while others are sampled."""
    rows = samplers.empty(2, 50)._replace(temperature=jnp.array([1.0, 0.7]))
    live = jnp.array([True, False])
    *_, after = samplers.sample(jnp.zeros((2, 50)), rows, jnp.array([3, 4]), live)
    jax.tree.map(np.testing.assert_array_equal, after, rows)
