"""Random requests at random times: each gets what it gets alone."""

import functools
import pathlib
import typing

import cases
import hypothesis
import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st

from lora_jax import lora, tokenizer
from lora_jax.checkpoints import loader
from lora_jax.generation import chunks, config, engine, grammar
from lora_jax.generation import pool as pools
from lora_jax.lora import config as lora_config
from lora_jax.lora.nnx import bank
from lora_jax.parallel import mesh as sharding

MODELS = pathlib.Path(__file__).parents[1] / "golden" / "models"
KINDS = {
    "qv": lora_config.LoRAConfig(rank=4, alpha=64, targets=r".*\.(q|v|qkv)_proj"),
    "all": lora_config.LoRAConfig(rank=12, alpha=96, targets="all-linear"),
    "dora": lora_config.LoRAConfig(rank=4, alpha=64, targets=("o_proj",), use_dora=True),
}


class Asked(typing.NamedTuple):
    """A request. wait: the turns before it. leaves: after so many turns; None: it stays."""

    prompt: list[int]
    given: dict[str, typing.Any]  # of config.Sampling
    adapters: dict[str, float]
    wait: int
    leaves: int | None

    @property
    def sampling(self) -> config.Sampling:
        return config.Sampling(**self.given)


def on(mesh, name):
    return loader.load(MODELS / name, dtype="float32", mesh=mesh)


@functools.cache
def adapters_of(name):
    model, adapters = on(sharding.make_mesh(sharding.ONE), name), {}
    for number, (kind, how) in enumerate(KINDS.items()):
        alone, noise = nnx.clone(model), np.random.default_rng(number)
        lora.inject(alone, how, rngs=nnx.Rngs(number))
        state = jax.tree.map(
            lambda a, noise=noise: np.asarray(a) + 0.05 * noise.normal(size=a.shape).astype("f"),
            nnx.state(alone, lora.LoRAParam),
        )
        nnx.update(alone, state)
        adapters[kind] = lora.collect(alone, how)
    return adapters


@functools.cache
def engine_of(name, slots=3, data=1, tensor=1, named=(*KINDS,), **how):
    sizes = {"data": data, "fsdp": 1, "tensor": tensor}
    mesh = sharding.make_mesh(sizes, jax.devices()[: data * tensor])
    model = on(mesh, name)
    with jax.set_mesh(mesh):
        bank.add(model, slots=4, rank=8)
        pool = pools.Pool(model)
        for kind in named:
            pool.load(kind, adapters_of(name)[kind])
    reader = tokenizer.load(MODELS / "stories260K")
    return engine.Engine(model, reader, eos_ids=(2,), slots=slots, mesh=mesh, pool=pool, **how)


rng = np.random.default_rng(0)
BEGINNINGS = [rng.integers(3, 95, 70).tolist(), [*rng.integers(3, 95, 4).tolist() * 15],
              rng.integers(3, 95, 130).tolist()]  # fmt: skip
GRAMMARS = (grammar.regex("[a-d]{3}-[x-z]{2}"), grammar.regex("(ab|c)+"), grammar.json_object())


@st.composite
def asked(draw, grammars=()):
    beginning = draw(st.sampled_from(BEGINNINGS))
    prompt = beginning[: draw(st.integers(1, len(beginning)))]
    prompt += draw(st.lists(st.integers(3, 95), max_size=3))
    some = {
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_k": st.sampled_from([0, 1, 20]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.3, 0.8]),
        "presence_penalty": st.sampled_from([0.7, -1.0]),
        "frequency_penalty": st.sampled_from([0.5, -0.5]),
        "logit_bias": st.sampled_from([((5, 3.0),), ((7, -100.0), (9, 1.0))]),
        "stop": st.sampled_from([("e",), ("never",), ("a", " th")]),
        "stop_token_ids": st.sampled_from([(40,), (7, 50, 60)]),
        "min_tokens": st.integers(0, 5),
        "ignore_eos": st.booleans(),
        "include_stop": st.booleans(),
        "logprobs": st.integers(0, 3),
        "prompt_logprobs": st.integers(0, 2),
        "grammar": st.sampled_from(grammars) if grammars else st.none(),
    }
    names = draw(st.lists(st.sampled_from(sorted(some)), max_size=4, unique=True))
    most = draw(st.integers(5, 16))
    given = {name: draw(some[name]) for name in names}
    weights = st.sampled_from([1.0, 0.5, -1.0])
    mixed = st.dictionaries(st.sampled_from([*KINDS]), weights, max_size=2)
    return Asked(
        prompt,
        {"max_new_tokens": most, "seed": draw(st.integers(0, 9)), **given},
        draw(st.just({}) | mixed),
        draw(st.integers(0, 4)),
        draw(st.none() | st.none() | st.integers(0, 8)),
    )


def fitting(own, serving):
    return own.prompt[: serving.context - own.given["max_new_tokens"]]


def together(serving, plan):
    """The result of each request."""
    requests, leaving = [], []

    def turn():
        serving.advance()
        for each in [*leaving]:
            each[0] -= 1
            if each[0] <= 0:
                each[1].abort()
                leaving.remove(each)

    for each in plan:
        for _ in range(each.wait):
            turn()
        made = serving.submit(fitting(each, serving), each.sampling, adapters=each.adapters)
        requests.append(made)
        if each.leaves is not None:
            leaving.append([each.leaves, made])
    while leaving:
        turn()
    return [made.result() for made in requests]


def check(plan, serving, alone):
    for own, found in zip(plan, together(serving, plan), strict=True):
        alone.release()
        prompt = fitting(own, serving)
        expected = alone.submit(prompt, own.sampling, adapters=own.adapters).result()
        if found.finish_reason == "abort":
            assert own.leaves is not None
            assert found.tokens == expected.tokens[: len(found.tokens)]
            assert expected.text.startswith(found.text) or own.sampling.stop
            continue
        assert found.tokens == expected.tokens
        assert (found.text, found.finish_reason, found.stop_reason) == (
            expected.text, expected.finish_reason, expected.stop_reason,
        )  # fmt: skip
        for one, other in ((found.logprobs, expected.logprobs),
                           (found.prompt_logprobs, expected.prompt_logprobs)):  # fmt: skip
            assert [each.token for each in one] == [each.token for each in other]
            values = [[each.logprob, *(v for _, v in each.top)] for each in one]
            wanted = [[each.logprob, *(v for _, v in each.top)] for each in other]
            np.testing.assert_allclose(values, wanted, atol=2e-4)
    assert serving.stats()[:2] == (0, 0)
    assert not serving.pool.leased()


GUESSING = {"slots": 8, "speculate": 4}


@pytest.mark.hypothesis  # for benchmarks/fuzz.py
@pytest.mark.long  # test_a_seed_gives_the_same_tokens_in_any_company_order_and_slot is cheaper
@pytest.mark.parametrize(
    "name, how",
    [
        ("llama_bias", {}),
        ("llama_bias", {"slots": 1}),
        ("llama_bias", GUESSING),
        ("llama_bias", {"kv_dtype": "int8"}),
        ("llama_bias", {"slots": 4, "data": 2, "tensor": 2}),
        ("llama_dynamic", GUESSING),
        ("phi3", GUESSING),
        ("phi3_longrope", GUESSING),
        ("gemma3", GUESSING),
        ("stories260K", {}),
        ("stories260K", GUESSING),
    ],
)
def test_requests_in_any_company(name, how, monkeypatch):
    """Of models whose caches differ: with windows, and with rotations that depend on the length."""
    alone = engine_of(name, kv_dtype=how.get("kv_dtype"))
    if name == "phi3":  # a cache of its window and a chunk, which sequences outgrow
        monkeypatch.setattr(chunks, "SIZES", (32,))
    serving = engine_of(name, **how)
    assert name != "phi3" or serving.batch.spans.size == 40 < alone.batch.spans.size
    grammars = GRAMMARS if name == "stories260K" else ()

    @cases.few()
    @hypothesis.given(plan=st.lists(asked(grammars), min_size=1, max_size=8))
    def check_all(plan):
        check(plan, serving, alone)

    check_all()
    if how is GUESSING and serving.batch.can_speculate:
        assert serving.stats().accepted_tokens > 0


loads = st.sampled_from([*KINDS])
asks = st.tuples(st.integers(1, 60), st.sampled_from([{"x": 1.0}, {"x": 0.5, "qv": 1.0}]))


@pytest.mark.long
@cases.few()
@hypothesis.given(st.lists(st.tuples(st.integers(0, 6), loads | asks), min_size=2, max_size=12))
def test_an_adapter_is_replaced_at_any_time(plan):
    """A request gets one that had the name while it waited, from its first token to its last."""
    serving, alone = engine_of("llama_bias", named=("qv",)), engine_of("llama_bias")
    adapters, pool = adapters_of("llama_bias"), serving.pool
    pool.load("x", adapters["all"], replace=True)
    sampling, now, waiting = config.Sampling(max_new_tokens=10), "all", []
    for turns, what in plan:
        for _ in range(turns):
            serving.advance()
        if isinstance(what, str):
            pool.load("x", adapters[what], replace=True)
            now = what
            for _, _, kinds in waiting:
                kinds.add(now)
        else:
            size, mixture = what
            made = serving.submit(BEGINNINGS[0][:size], sampling, adapters=mixture)
            waiting.append((made, mixture, {now}))
    for made, mixture, kinds in waiting:
        found, possible = made.result(), []
        for kind in kinds:
            alone.release()
            own = {kind: mixture["x"]}
            if "qv" in mixture:
                own["qv"] = own.get("qv", 0.0) + mixture["qv"]
            possible.append(alone.submit(made.prompt, sampling, adapters=own).result().tokens)
        assert found.tokens in possible
    assert not pool.leased()
