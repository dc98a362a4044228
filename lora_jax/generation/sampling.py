"""The next token of each row from its logits, with settings of each row's own, in one program.

The order is that of transformers: bias, penalties, stop tokens excluded, grammar, temperature,
top_k, top_p, min_p. What no live row asks for is under a `cond`, and costs nothing: a batch that is
all greedy pays for an argmax. Nothing sorts the vocabulary: thresholds are bisected.

A row's token depends on nothing but its own logits, settings and length. Its draw is a number in
[0, 1) from fold_in(key(seed), length), so that the same seed gives the same text in any company.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from lora_jax.generation import config, reductions


class Rows(NamedTuple):
    """The sampling settings of all rows, and what they have to know of their text.

    Fields named as in config.Sampling mean the same. temperature 0: greedy. top_k 0: all.
    seed: jax.random.key_data of a threefry key. stops: excluded while a row's text is shorter than
    min_length, prompt included; padded with −1. biased: whether `bias` has to be added. seen:
    tokens of the prompt. counts: how often each token is in the output so far; kept up to date in
    rows that have a penalty. logprobs: whether they are asked for.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    presence_penalty: Float[Array, " B"]
    frequency_penalty: Float[Array, " B"]
    seed: UInt[Array, "B 2"]
    min_length: Int[Array, " B"]
    stops: Int[Array, "B M"]
    biased: Bool[Array, " B"]
    bias: Float[Array, "B V"]
    seen: Bool[Array, "B V"]
    counts: Int[Array, "B V"]
    logprobs: Bool[Array, " B"]


class Logprobs(NamedTuple):
    """Raw log p: of one token per row, and of the K = MOST_LOGPROBS most likely ones, in order.

    Where the token is among them, both values are the same float. A smaller vocabulary has fewer.
    """

    chosen: Float[Array, " B"]
    ids: Int[Array, "B K"]
    values: Float[Array, "B K"]


def empty(num_rows: int, vocab: int) -> Rows:
    """Settings of greedy rows that ask for nothing."""

    def full(value, dtype, *shape):
        return jnp.full((num_rows, *shape), value, dtype)

    return Rows(
        temperature=full(0, jnp.float32),
        top_k=full(0, jnp.int32),
        top_p=full(1, jnp.float32),
        min_p=full(0, jnp.float32),
        repetition_penalty=full(1, jnp.float32),
        presence_penalty=full(0, jnp.float32),
        frequency_penalty=full(0, jnp.float32),
        seed=full(0, jnp.uint32, 2),
        min_length=full(0, jnp.int32),
        stops=full(-1, jnp.int32, config.MOST_STOP_IDS),
        biased=full(False, bool),
        bias=full(0, jnp.float32, vocab),
        seen=full(False, bool, vocab),
        counts=full(0, jnp.int32, vocab),
        logprobs=full(False, bool),
    )


def row(sampling: config.Sampling, prompt: Sequence[int], stops: Sequence[int], vocab: int) -> Rows:
    """The settings of one request, without the axis B, on the host.

    stops: the tokens that end it. bias, seen and counts are None if the request needs none of them:
    then what a row has there does not matter.
    """
    bias = seen = counts = None
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    if sampling.logit_bias or penalties != (1, 0, 0):
        bias, seen = np.zeros(vocab, np.float32), np.zeros(vocab, bool)
        for token, value in sampling.logit_bias:
            bias[token] += value
        seen[list(prompt)] = True
        counts = np.zeros(vocab, np.int32)
    padded = np.full(config.MOST_STOP_IDS, -1, np.int32)
    padded[: len(stops)] = stops
    seed = sampling.seed or 0
    repetition, presence, frequency = map(np.float32, penalties)
    return Rows(
        temperature=np.float32(sampling.temperature),
        top_k=np.int32(min(sampling.top_k, vocab)),
        top_p=np.float32(sampling.top_p),
        min_p=np.float32(sampling.min_p),
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        seed=np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32),
        min_length=np.int32(len(prompt) + sampling.min_tokens if sampling.min_tokens else 0),
        stops=padded,
        biased=np.bool_(bool(sampling.logit_bias)),
        bias=bias,
        seen=seen,
        counts=counts,
        logprobs=np.bool_(sampling.logprobs is not None),
    )


def sample(
    logits: Float[Array, "B V"],
    rows: Rows,
    length: Int[Array, " B"],
    live: Bool[Array, " B"],
    allowed: Int[Array, "B W"] | UInt[Array, "B W"] | None = None,
) -> tuple[Int[Array, " B"], Logprobs, Rows]:
    """(the next token of each live row, 0 in the others; its log p; rows with it counted).

    length: of prompt and output before the token. allowed: bit i % 32 of word i // 32 says whether
    a row's grammar allows token i; all bits are set in rows without one. Log p is of the logits as
    they come, and 0 unless a live row asks for it.
    """
    stored, rows = rows, rows._replace(temperature=jnp.where(live, rows.temperature, 0))
    penalized = live & _penalized(rows)
    edited = penalized | live & (rows.biased | (length < rows.min_length))
    if allowed is not None:
        edited |= live & _restricted(allowed, logits.shape[1])
    drawn = rows.temperature > 0
    edited = edited.any()

    def choose():
        changed = jax.lax.cond(edited, lambda: edit(logits, rows, length, allowed), lambda: logits)
        return _choose(changed, rows, length)

    # Greedy rows do not go through the inner branch, which copies logits that it does not change.
    tokens = jax.lax.cond(edited | drawn.any(), choose, lambda: reductions.argmax(logits))
    tokens = jnp.where(live, tokens, 0)
    found = functools.partial(logprobs, logits, tokens)
    chosen = jax.lax.cond(
        (live & rows.logprobs).any(),
        found,
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(found)),
    )
    counts = rows.counts.at[jnp.arange(len(tokens)), tokens].add(penalized.astype(jnp.int32))
    return tokens, chosen, stored._replace(counts=counts)


def logprobs(logits: Float[Array, "T V"], ids: Int[Array, " T"]) -> Logprobs:
    """log softmax(logits) at `ids`, and its largest values: also those of a prompt's tokens."""
    values, top = jax.lax.top_k(logits, min(config.MOST_LOGPROBS, logits.shape[1]))
    own = jnp.take_along_axis(logits, ids[:, None], axis=1)
    largest = logits.max(axis=1, keepdims=True)  # XLA would sort everything for values[:, :1]
    total = reductions.total(jnp.exp(logits - largest))[:, None]
    # Side by side, so that equal logits become equal floats.
    both = jnp.concatenate([own, values], axis=1) - largest - jnp.log(total)
    return Logprobs(both[:, 0], top, both[:, 1:])


def edit(
    logits: Float[Array, "B V"],
    rows: Rows,
    length: Int[Array, " B"],
    allowed: Int[Array, "B W"] | UInt[Array, "B W"] | None = None,
) -> Float[Array, "B V"]:
    """Logits after bias and penalties; −∞ for stop tokens before min_length and by the grammar.

    l + bias; then l / r if l > 0 else l · r for tokens of the prompt or output; then
    l − frequency · count − presence · [count > 0] for tokens of the output.
    """
    logits = jnp.where(rows.biased[:, None], logits + rows.bias, logits)
    repetition = rows.repetition_penalty[:, None]
    penalty = jnp.where(logits < 0, logits * repetition, logits / repetition)
    present = rows.counts > 0
    logits = jnp.where(rows.seen | present, penalty, logits)
    logits -= rows.frequency_penalty[:, None] * rows.counts
    logits -= rows.presence_penalty[:, None] * present
    if allowed is not None:
        bits = allowed[:, :, None] >> jnp.arange(32, dtype=allowed.dtype)[None, None] & 1
        bits = bits.reshape(len(bits), -1)[:, : logits.shape[1]]
        logits = jnp.where(bits != 0, logits, -jnp.inf)
    early = (length < rows.min_length)[:, None] & (rows.stops >= 0)
    stops = jnp.where(early, rows.stops, logits.shape[1])  # out of range: dropped
    return logits.at[jnp.arange(len(logits))[:, None], stops].set(-jnp.inf, mode="drop")


def weights(
    logits: Float[Array, "B V"], rows: Rows
) -> tuple[Float[Array, "B V"], Float[Array, " B"]]:
    """(w, least): the next token is drawn in proportion to w, from the tokens whose w ≥ least.

    w = exp((logits − max) / temperature), and 0 but for the k most likely tokens and those as
    likely as the k-th. least is at least min_p, and the largest for which the tokens' w sum to
    top_p of all; so tokens that are as likely as the last one are kept, of which transformers keeps
    some. Greedy rows are not filtered.
    Sources: top_p, Holtzman et al. 2020, https://arxiv.org/abs/1904.09751, §3.1;
    min_p, Nguyen et al. 2024, https://arxiv.org/abs/2407.01082, §3.
    """
    drawn = rows.temperature > 0
    top = logits.max(axis=1)
    temperature = jnp.maximum(rows.temperature, jnp.finfo(jnp.float32).tiny)
    scale = jnp.where(drawn, temperature, 1)[:, None]

    count = jnp.where(drawn, jnp.minimum(rows.top_k, logits.shape[1]), 0)
    lowest = jnp.full_like(top, -jnp.inf)

    def surplus(t):  # in float32, in which numbers below 2²⁴ are exact and sums are faster
        return (logits >= t[:, None]).sum(axis=1, dtype=jnp.float32) - count

    kth = jax.lax.cond(
        (count > 0).any(),
        lambda: reductions.bisect(surplus, lowest, jnp.where(count > 0, top, lowest)),
        lambda: lowest,
    )
    w = jnp.where(logits >= kth[:, None], jnp.exp((logits - top[:, None]) / scale), 0)

    share = jnp.where(drawn, rows.top_p, 1)

    def mass(t):
        return reductions.total(jnp.where(w >= t[:, None], w, 0))

    def nucleus():
        goal = share * mass(jnp.zeros_like(share))
        return reductions.bisect(
            lambda t: mass(t) - goal, jnp.zeros_like(share), (share < 1).astype(jnp.float32)
        )

    least = jax.lax.cond((share < 1).any(), nucleus, lambda: jnp.zeros_like(share))
    return w, jnp.maximum(least, jnp.where(drawn, rows.min_p, 0))


def _penalized(rows: Rows) -> Bool[Array, " B"]:
    added = (rows.presence_penalty != 0) | (rows.frequency_penalty != 0)
    return added | (rows.repetition_penalty != 1)


def _restricted(allowed, vocab: int) -> Bool[Array, " B"]:
    """Whether any token's bit is not set. Bits beyond the vocabulary do not matter."""
    full = np.full(allowed.shape[1], 2**32 - 1, np.uint32)
    if vocab % 32:
        full[-1] = 2 ** (vocab % 32) - 1
    return ((~allowed).astype(jnp.uint32) & full[None]).any(axis=1)


def _choose(logits, rows: Rows, length) -> Int[Array, " B"]:
    """argmax in greedy rows, a draw in the others."""
    greedy = reductions.argmax(logits)
    drawn = rows.temperature > 0

    def draw():
        w, least = weights(logits, rows)
        return jnp.where(drawn, reductions.draw(w, least, _uniform(rows.seed, length)), greedy)

    return jax.lax.cond(drawn.any(), draw, lambda: greedy)


def _uniform(seed: UInt[Array, "B 2"], length: Int[Array, " B"]) -> Float[Array, " B"]:
    """A number in [0, 1) from each row's key and position."""

    def one(seed, length):
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, length))

    return jax.vmap(one)(seed, length)
