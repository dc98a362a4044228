"""The programs of generation: one token for all slots, a piece of a prompt, a copy of a prefix.

Everything that differs between requests is a value in an array, so that no request compiles one.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lora_jax.generation import sampling
from lora_jax.generation import weights as decode_weights
from lora_jax.kernels import platform
from lora_jax.lora.nnx import bank
from lora_jax.models import cache
from lora_jax.parallel import mesh as sharding

_SCORED = 32  # prompt tokens whose logits are in memory at a time


class Weights(NamedTuple):
    """The arrays of a model that generation reads.

    adapters: the bank, which many requests share; trained: an adapter that is part of the model.
    forms: as generation.weights derives them.
    """

    base: Any
    trained: Any
    keys: Any
    adapters: Any
    forms: Any = None


class State(NamedTuple):
    """The state of B slots, on the devices.

    lengths: of each sequence, prompt and output. tokens: the last one of each, which is not in the
    cache yet. mixture: the weights of X adapters. rows: how to sample.
    """

    cache: cache.KVCache
    lengths: Int[Array, " B"]
    tokens: Int[Array, " B"]
    mixture: Float[Array, "B X"]
    rows: sampling.Rows


class Chunk(NamedTuple):
    """T tokens of a prompt in one slot of each of G groups; or in all slots, which are G then.

    start: the position of the first. num_real: how many are real, 0 where there is no prompt.
    length: of the whole prompt. row: the slot's number within its group; None: all slots. mixture:
    the weights of X adapters; None: those of the slots.
    """

    ids: Int[Array, "G T"]
    start: Int[Array, " G"]
    num_real: Int[Array, " G"]
    length: Int[Array, " G"]
    row: Int[Array, " G"] | None = None
    mixture: Float[Array, "G X"] | None = None


class Programs:
    """The jitted functions for one model; those that change the state take over its memory.

    Each is compiled once for every span, the part of the cache that is read, and for every number
    of tokens in a chunk.
    """

    def __init__(self, graphdef: nnx.GraphDef, form: str | None = None):
        self._graphdef, self._form = graphdef, form
        jit = functools.partial(jax.jit, compiler_options=platform.compiler_options())
        self.empty = jit(self._empty, static_argnums=(1, 2, 3, 4))
        self.derive = jit(self._derive, static_argnums=1)
        self.spread = jit(decode_weights.spread)
        self.decode = jit(self._decode, donate_argnums=1, static_argnames="span")
        self.forward = jit(self._forward, donate_argnums=1, static_argnames="span")
        self.choose = jit(self._choose, donate_argnums=0)
        self.verify = jit(self._verify, donate_argnums=1, static_argnames="span")
        self.prefill = jit(self._prefill, donate_argnums=1, static_argnames="span")
        self.score = jit(self._score, donate_argnums=1, static_argnames="span")
        self.copy = jit(functools.partial(_copy), donate_argnums=0)
        self.admit = jit(functools.partial(_admit), donate_argnums=0)

    def _model(self, weights: Weights) -> nnx.Module:
        model = nnx.merge(
            self._graphdef, weights.adapters, weights.trained, weights.keys, weights.base
        )
        model.eval()
        return model

    def _extend(self, model, weights, ids, kv, place, mixture):
        forms = None
        if weights.forms is not None and (self._form == "dense" or ids.shape[1] == 1):
            # Other forms are for as many rows as there are slots.
            forms = decode_weights.forms(model, self._form, weights.forms)
        mixed = bank.mixture(mixture) if mixture.shape[1] else contextlib.nullcontext()
        with mixed:
            return model.extend(ids, kv, place, forms=forms)

    def _empty(self, weights, num_slots, max_length, num_adapters, kv_dtype=None):
        """The state without requests."""
        model = self._model(weights)
        return _placed(State(
            model.empty_cache(num_slots, max_length, kv_dtype),
            jnp.zeros(num_slots, jnp.int32),
            jnp.zeros(num_slots, jnp.int32),
            jnp.zeros((num_slots, num_adapters), jnp.float32),
            sampling.empty(num_slots, model.config.vocab_size),
        ))  # fmt: skip

    def _derive(self, weights, num_rows):
        return decode_weights.derive(self._model(weights), self._form, num_rows)

    def _decode(self, weights, state, live, *, span=None):
        """(state with a new token in each live slot [B], the new tokens [B], Logprobs)."""
        state, logits = self._forward(weights, state, live, span=span)
        return self._choose(state, logits, live)

    def _forward(self, weights, state, live, *, span=None):
        """(state with the last tokens in the cache, logits [B, V] of the next): half of a step."""
        model = self._model(weights)
        place = cache.Place(state.lengths - 1, live.astype(jnp.int32), state.lengths, span=span)
        hidden, kv = self._extend(
            model, weights, state.tokens[:, None], state.cache, place, state.mixture
        )
        return _placed(state._replace(cache=kv)), _logits(model, hidden[:, 0])

    def _choose(self, state, logits, live, allowed=None):
        """As `_decode`, from logits. allowed: bits of the tokens that grammars allow."""
        tokens, found, rows = sampling.sample(logits, state.rows, state.lengths, live, allowed)
        state = state._replace(
            lengths=state.lengths + live,
            tokens=jnp.where(live, tokens, state.tokens),
            rows=rows,
        )
        return _placed(state), *_everywhere((tokens, found))

    def _verify(self, weights, state, live, drafts, num_drafts, *, span=None):
        """(state, tokens [B, 1 + D], how many of them are new [B], Logprobs of the first).

        drafts [B, D]: guesses at the next tokens, num_drafts [B] of them in each slot. They are
        computed together, and those before the first wrong one are new tokens; so is the right one
        in its place. Source: Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, for greedy
        decoding.
        """
        model = self._model(weights)
        num_real = live * (1 + num_drafts)
        place = cache.Place(state.lengths - 1, num_real, state.lengths, span=span)
        ids = jnp.concatenate([state.tokens[:, None], drafts], axis=1)
        hidden, kv = self._extend(model, weights, ids, state.cache, place, state.mixture)
        logits = _logits(model, hidden)
        first, found, rows = sampling.sample(logits[:, 0], state.rows, state.lengths, live)
        rest = jnp.argmax(logits[:, 1:], axis=-1).astype(jnp.int32)
        tokens = jnp.concatenate([first[:, None], rest], axis=1)
        right = (tokens[:, :-1] == drafts) & (
            jnp.arange(drafts.shape[1])[None] < num_drafts[:, None]
        )
        num_right = jnp.cumprod(right.astype(jnp.int32), axis=1).sum(axis=1)
        counts = live * (1 + num_right)
        last = jnp.take_along_axis(tokens, num_right[:, None], axis=1)[:, 0]
        state = state._replace(
            cache=kv,
            lengths=state.lengths + counts,
            tokens=jnp.where(live, last, state.tokens),
            rows=rows,
        )
        return _placed(state), *_everywhere((tokens, counts, found))

    def _prefill(self, weights, state, chunk, *, span=None):
        """The state with the chunk's keys and values."""
        _, state = self._hidden(self._model(weights), weights, state, chunk, span)
        return state

    def _score(self, weights, state, chunk, following, *, span=None):
        """The same, and the Logprobs of the tokens `following` [G, T] each token."""
        model = self._model(weights)
        hidden, state = self._hidden(model, weights, state, chunk, span)

        def score(pair):
            hidden, following = pair
            return sampling.logprobs(_logits(model, hidden), following)

        parts = jax.tree.map(lambda a: a.reshape(-1, _SCORED, *a.shape[2:]), (hidden, following))
        found = lax.map(score, parts)
        found = jax.tree.map(lambda a: a.reshape(*following.shape, *a.shape[2:]), found)
        return state, _everywhere(found)

    def _hidden(self, model, weights, state, chunk, span):
        place = cache.Place(chunk.start, chunk.num_real, chunk.length, chunk.row, span)
        mixture = state.mixture if chunk.mixture is None else chunk.mixture
        hidden, kv = self._extend(model, weights, chunk.ids, state.cache, place, mixture)
        return hidden, _placed(state._replace(cache=kv))


def _copy(state, source: Int[Array, " G"], target: Int[Array, " G"]):
    """The state with the cache of slot `source` of each group in slot `target`."""

    def each(stored):
        groups = stored.reshape(stored.shape[0], len(source), -1, *stored.shape[2:])
        copied = jax.vmap(
            lambda own, source, target: own.at[:, target].set(
                lax.dynamic_index_in_dim(own, source, 1, keepdims=False)
            ),
            in_axes=(1, 0, 0),
            out_axes=1,
        )(groups, source, target)
        return copied.reshape(stored.shape)

    return _placed(state._replace(cache=jax.tree.map(each, state.cache)))


def _admit(state, slot, token, length, mixture, row: sampling.Rows):
    """The state with a request in a slot; what is None in `row` stays as it is."""

    def put(own, new):
        return own if new is None else own.at[slot].set(new)

    rows = [put(own, new) for own, new in zip(state.rows, row, strict=True)]
    return _placed(state._replace(
        lengths=state.lengths.at[slot].set(length),
        tokens=state.tokens.at[slot].set(token),
        mixture=state.mixture.at[slot].set(mixture),
        rows=sampling.Rows(*rows),
    ))  # fmt: skip


def num_groups(num_slots: int, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Into how many groups of slots a mesh splits the cache."""
    shards = sharding.batch_shards(mesh.shape)
    return 1 if num_slots % shards else shards


def _placed(state: State) -> State:
    """The cache split over the ambient mesh, all else whole on every device.

    Every program returns it so; else the next one would be compiled again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return state
    where = sharding.cache(state.cache.k.shape[1], state.cache.k.shape[2], mesh)
    kv = jax.tree.map(lambda a: lax.with_sharding_constraint(a, where), state.cache)
    return _everywhere(state._replace(cache=None))._replace(cache=kv)


def _logits(model: nnx.Module, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """model.logits(hidden), whole on every device, of which each computes its part of the head.

    Told only that the result is whole, the compiler gathers the head's weight first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return model.logits(hidden)
    lead = (None,) * (hidden.ndim - 1)
    d, v = sharding.partition(("lm_head",)).stored()
    hidden = lax.with_sharding_constraint(hidden, NamedSharding(mesh, PartitionSpec(*lead, d)))
    logits = model.logits(hidden)
    parts = NamedSharding(mesh, PartitionSpec(*lead, v))
    return _everywhere(lax.with_sharding_constraint(logits, parts))


def _everywhere(tree: Any) -> Any:
    """Whole on every device of the ambient mesh, so that every process can read it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    where = PartitionSpec()
    return jax.tree.map(lambda a: lax.with_sharding_constraint(a, NamedSharding(mesh, where)), tree)
