"""The engine's step alone: slots that all have a greedy request, each of which gets a new token."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.generation import steps
from lora_jax.lora.nnx import bank, model_state


def split(model) -> tuple[nnx.GraphDef, steps.Weights]:
    """(graphdef, the arrays) of a model, as the engine has them on one device."""
    kinds = bank.BankParam, model_state.LoRAParam, model_state.DropoutKey
    graphdef, *parts = nnx.split(model, *kinds, ...)
    adapters, trained, keys, base = map(nnx.to_pure_dict, parts)
    return graphdef, steps.Weights(base, trained, keys, adapters)


def compile_timed(function, *arguments):
    """(the compiled function, its compile_s and temp_mb: XLA's memory beyond the arguments)."""
    start = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return compiled, {"compile_s": seconds, "temp_mb": temporaries / 2**20}


class Steps:
    """The compiled step of B slots, which have random prompts in the cache.

    form: of the weights, as generation.weights.choose. room: for tokens after the prompt. mixture
    [B, X]: of the adapters in the bank. compiling: see compile_timed.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        weights: steps.Weights,
        form: str | None,
        *,
        slots: int,
        prompt: int,
        room: int,
        mixture: np.ndarray | None = None,
    ):
        programs = steps.Programs(graphdef, form)
        if mixture is None:
            mixture = np.zeros((slots, 0), np.float32)
        self._live, self._prompt = np.ones(slots, bool), prompt
        state = programs.empty(weights, slots, prompt + room, mixture.shape[1])
        state = state._replace(mixture=jnp.asarray(mixture))
        vocab = state.rows.counts.shape[1]
        ids = np.random.default_rng(0).integers(3, vocab, (slots, prompt), np.int32)
        one = np.ones(1, np.int32)
        for row, own in enumerate(ids):
            chunk = steps.Chunk(
                own[None], 0 * one, prompt * one, prompt * one, row * one, mixture[row][None]
            )
            state = programs.prefill(weights, state, chunk)
        self._state = state._replace(tokens=jnp.asarray(ids[:, -1]))
        if form:
            weights = weights._replace(forms=programs.derive(weights, slots))
        if form == "dense":
            weights = weights._replace(adapters=programs.spread(weights.adapters))
        self._weights = weights
        self._step, self.compiling = compile_timed(
            programs.decode, weights, self._begin(), self._live
        )

    def _begin(self) -> steps.State:
        return self._state._replace(lengths=jnp.full(len(self._live), self._prompt, jnp.int32))

    def run(self, number: int) -> None:
        """So many steps from the end of the prompts; waits for the last one."""
        state = self._begin()
        for _ in range(number):
            state, tokens, _ = self._step(self._weights, state, self._live)
        self._state = state
        jax.block_until_ready(tokens)
