"""Adapters by name: what is loaded, what is in the bank's slots, and what is refused."""

import dataclasses
import functools
import pathlib
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import errors
from lora_jax.checkpoints import loader
from lora_jax.cli import opening
from lora_jax.generation import pool as pools
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config
from lora_jax.lora import peft
from lora_jax.lora.nnx import bank
from lora_jax.parallel import mesh as sharding

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
RANK = 2


def model(slots=3, rank=RANK):
    """y = x W with a bank, W [4, 6]."""
    found = nnx.Dict(a=nnx.Linear(4, 6, rngs=nnx.Rngs(0)), b=nnx.Linear(4, 6, rngs=nnx.Rngs(1)))
    bank.add(found, slots=slots, rank=rank, targets=("a",))
    return found


def adapter(value=1.0, *, rank=RANK, name="a", **settings):
    config = lora_config.LoRAConfig(rank=rank, alpha=rank, targets=(name,), **settings)
    A, B = np.ones((4, rank), np.float32), np.full((rank, 6), value / rank, np.float32)
    magnitude = np.ones(6, np.float32) if config.use_dora else None
    return lora_adapter.Adapter(config, {name: lora_adapter.Factors(A, B, magnitude)})


@pytest.fixture
def pool():
    own = pools.Pool(model())
    for number, name in enumerate("pqrst"):
        own.load(name, adapter(float(number + 1)))
    return own


def changes(pool, *leases):
    """What each lease adds to y for x of ones: 4 · value · weight."""
    x = jnp.ones((len(leases), 4))
    module = pool._model.a
    with bank.mixture(np.stack([lease.row for lease in leases])):
        found = module(x)
    return [round(float(own), 4) for own in (found - module(x))[:, 0]]


def test_leases_hold_their_adapters_whatever_else_is_acquired(pool):
    p, q = pool.acquire({"p": 1}), pool.acquire({"q": 0.5})
    assert changes(pool, p, q) == [4, 4]
    r = pool.acquire({"r": 1})
    assert pool.acquire({"s": 1}) is None and pool.acquire({"s": 1, "p": 1}) is None
    again = pool.acquire({"p": 2, "q": 1, "r": 0})  # resident ones always
    assert changes(pool, p, q, r, again) == [4, 4, 12, 16]
    assert sorted(pool.leased()) == ["p", "q", "r"]
    pool.release(p)
    assert pool.acquire({"s": 1}) is None  # `again` has p
    pool.release(again)
    s = pool.acquire({"s": 1})
    assert changes(pool, s, q, r) == [16, 4, 12]


def test_the_least_recently_used_adapter_leaves_its_slot(pool):
    for name in ("p", "q", "r", "p"):
        pool.release(pool.acquire({name: 1}))
    before = {name: np.flatnonzero(pool.acquire({name: 1}).row).item() for name in ("p", "r")}
    s = pool.acquire({"s": 1})  # in place of q
    assert {*before.values(), np.flatnonzero(s.row).item()} == {0, 1, 2}
    assert changes(pool, pool.acquire({"p": 1, "r": 1}), s) == [16, 16]


def test_an_adapter_in_the_bank_is_not_written_again(pool, monkeypatch):
    pool.release(pool.acquire({"p": 1}))
    monkeypatch.setattr(pool, "_write", None)
    for _ in range(3):
        pool.release(pool.acquire({"p": 1}))


def test_the_base_takes_no_slot(pool):
    held = [pool.acquire({name: 1}) for name in "pqr"]
    lease = pool.acquire({})
    assert not lease.row.any() and changes(pool, lease) == [0]
    assert lease.key == pool.acquire({"s": 0.0}).key == ()
    assert len({own.key for own in held} | {lease.key}) == 4


def test_keys_follow_content_and_weights(pool):
    key = pool.acquire({"p": 1}).key
    assert key == pool.acquire({"p": 1.0}).key and hash(key) is not None
    assert key != pool.acquire({"p": 0.5}).key
    pool.load("alias", adapter(1.0))
    assert pool.acquire({"alias": 1}).key == key and pool.digest("alias") == pool.digest("p")
    assert pool.acquire({"alias": 0.25, "p": 0.75}).key == key
    both, other = pool.acquire({"p": 1, "q": 2}), pool.acquire({"q": 2, "p": 1})
    assert both.key == other.key
    pool.load("p", adapter(9.0), replace=True)
    assert pool.acquire({"p": 1}).key != key == pool.acquire({"alias": 1}).key
    pool.load("p", adapter(1.0), replace=True)
    assert pool.acquire({"p": 1}).key == key


def test_one_that_is_replaced_or_unloaded_stays_until_its_last_lease_ends(pool):
    old = pool.acquire({"p": 1})
    second = pool.acquire({"p": 1})
    pool.load("p", adapter(10.0), replace=True)
    new = pool.acquire({"p": 1})
    assert changes(pool, old, second, new) == [4, 4, 40]
    pool.unload("p")
    assert "p" not in pool.names()
    assert changes(pool, old, second, new) == [4, 4, 40]
    q = pool.acquire({"q": 1})
    assert pool.acquire({"r": 1}) is None
    pool.release(old)
    assert pool.acquire({"r": 1}) is None
    pool.release(second)
    r = pool.acquire({"r": 1})
    assert changes(pool, new, q, r) == [40, 8, 12]
    for lease in (new, q, r):
        pool.release(lease)
    assert len(pool._free) == 1  # q and r may be asked for again, the two versions of p may not


def test_a_replaced_adapter_never_meets_its_old_content(pool):
    """Also if it was idle in the bank when it was replaced."""
    for value in (6.0, 7.0, 8.0, 9.0, 10.0):
        pool.load("p", adapter(value), replace=True)
        lease = pool.acquire({"p": 1})
        assert changes(pool, lease) == [4 * value]
        pool.release(lease)
    assert len(pool._resident) == 1


def test_large_adapters_take_several_slots(pool):
    pool.load("large", adapter(3.0, rank=5))
    q = pool.acquire({"q": 1})
    assert pool.acquire({"large": 1}) is None
    pool.release(q)
    large = pool.acquire({"large": 0.5})
    assert (large.row == 0.5).all() and changes(pool, large) == [6]
    assert pool.acquire({"q": 1}) is None
    pool.release(large)
    assert changes(pool, pool.acquire({"q": 1})) == [8]


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({"z": 1}, "expected: an adapter among p, q, r, s, t\n  found:    z"),
        ({"p": float("nan")}, "p: nan"),
        ({"p": 1e39}, "p: 1e[+]39"),
        (dict.fromkeys("pqrs", 1), "p, q, r, s, which take 4"),
    ],
)
def test_weights_that_can_never_be_acquired_are_errors(pool, weights, match):
    for ask in (pool.check, pool.acquire):
        with pytest.raises(errors.UserError, match=match):
            ask(weights)
    assert len(pool._free) == 3
    pool.check({"p": 1, "q": 1, "r": 1, "s": 0})


def test_names_are_unique(pool):
    before = pool.digest("p")
    for name in ("p", ""):
        with pytest.raises(errors.UserError, match="a name that no adapter has"):
            pool.load(name, adapter(7.0))
    with pytest.raises(errors.UserError, match="among p, q, r, s, t"):
        pool.unload("z")
    assert pool.digest("p") == before and pool.names() == list("pqrst")
    pool.unload("p")
    pool.load("p", adapter(7.0))
    assert pool.names() == list("qrstp")


def test_main_memory_is_bounded():
    each = pools.banked.Bank(model()).contents(adapter(), "").num_bytes
    pool = pools.Pool(model(), most_adapters=3, most_bytes=2 * each)
    pool.load("p", adapter(1.0))
    pool.load("q", adapter(2.0))
    with pytest.raises(errors.UserError, match=f"{3 * each:,} bytes .* of {2 * each:,}"):
        pool.load("r", adapter(3.0))
    pool.load("q", adapter(3.0), replace=True)
    pool.load("r", adapter(3.0))  # the same content
    with pytest.raises(errors.UserError, match="3 adapters, the most"):
        pool.load("s", adapter(3.0))
    assert pool.names() == ["p", "q", "r"]


REFUSED = {
    "another shape": (
        lambda: lora_adapter.Adapter(
            adapter().config, {"a": lora_adapter.Factors(np.ones((5, 2)), np.ones((2, 7)))}
        ),
        [r"a.lora_A has shape \(2, 5\), expected \(2, 4\)", r"a.lora_B has shape \(7, 2\)"],
    ),
    "no such layer": (lambda: adapter(name="c"), ["c.lora_A has no layer in this model"]),
    "no bank": (
        lambda: adapter(name="b"),
        ["it is on b, which has none", "on a, which have a bank", "merge"],
    ),
    "no effect": (lambda: adapter(0.0), ["A or B is zero in each"]),
    "rank": (lambda: adapter(rank=7), ["at most 6.*3 slots of rank 2", "7, which takes 4 slots"]),
    "NaN": (lambda: adapter(float("nan")), ["NaN or infinity in a"]),
    "saved": (
        lambda: dataclasses.replace(
            adapter(modules_to_save=("b",)), saved={"b.weight": np.ones((6, 4), np.float32)}
        ),
        ["b in modules_to_save", "lora-jax merge"],
    ),
    "unmentioned": (  # by its config, as of an adapter alone
        lambda: dataclasses.replace(
            adapter(),
            saved={
                "b.weight": np.ones((6, 4), np.float32),
                "a.token_adapter.trainable_tokens_delta": np.ones((1, 4), np.float32),
                "b.base_layer.weight": np.ones((6, 4), np.float32),
            },
        ),
        [
            "b.weight has no module in this model, or the config does not save it",
            "a.token_adapter.trainable_tokens_delta has no module",
            "weights of b that differ from the base's",
        ],
    ),
    "all": (
        lambda: dataclasses.replace(
            adapter(0.0, name="b", rank=7, modules_to_save=("a",)), saved={"a.weight": np.ones(1)}
        ),
        ["a in modules_to_save", "on b, which has none", "takes 4 slots"],
    ),
    "no folder": (lambda: GOLDEN / "lora_qw", ["no such folder", "did you mean .*lora_qv"]),
    "no adapter": (lambda: str(GOLDEN), ["no adapter_config.json"]),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_refused_with_every_reason(pool, why):
    make, expected = REFUSED[why]
    own, digest, before = make(), pool.digest("p"), pool.state
    with pytest.raises(errors.UserError) as caught:
        pool.load("p", own, replace=True)
    text = str(caught.value)
    for match in expected:
        assert re.search(match, text), text
    assert pool.digest("p") == digest and pool.state is before


@functools.cache
def parts(name):
    one = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    return nnx.split(loader.load(GOLDEN / "models" / name, dtype="float32", mesh=one))


def llama(name="llama", **how):
    found = nnx.merge(*parts(name), copy=True)
    bank.add(found, **{"slots": 3, "rank": 4, **how})
    return found


def test_heads_and_vocabularies_are_refused_by_name():
    pool = pools.Pool(llama("llama_tied_hd16"))
    head = "the head, which the base ties to its embedding"
    for folder, found in {
        "plain_99": ["a vocabulary of 99 tokens instead of 96"],
        "save_both": ["embed_tokens in modules_to_save", "lm_head in modules_to_save", head],
        "target_head": [head],
        "tied_target": [head],
        "tokens": ["embed_tokens in trainable_token_indices", head],
        "tokens_of_head": ["lm_head in trainable_token_indices"],
    }.items():
        with pytest.raises(errors.UserError, match="lora-jax merge") as caught:
            pool.load(folder, GOLDEN / "tied_heads" / folder)
        assert all(text in str(caught.value) for text in found)
        assert "no layer in this model" not in str(caught.value)
    assert pool.names() == []
    model = nnx.merge(*parts("llama_tied_hd16"), copy=True)  # of a command, which makes the bank
    with pytest.raises(errors.UserError, match=head):
        opening.pool(model, {"target_head": str(GOLDEN / "tied_heads/target_head")})


def test_rows_of_tokens_must_fit_the_base():
    pool = pools.Pool(llama(targets=("embed_tokens", "lm_head", "q_proj", "v_proj")))
    own = pools.peft.read(GOLDEN / "lora_tokens_head" / "final_adapter")
    shape = r"trainable_tokens_delta \(\d, 32\)"
    for tokens, problem in (
        ({"embed_tokens": (77, 5, 96)}, "97 rows in the adapter, 96 in the base"),
        ({"embed_tokens": (5,)}, shape),
        ({"lm_head": (1,)}, shape),
    ):
        config = dataclasses.replace(own.config, trainable_token_indices=tokens)
        other = dataclasses.replace(own, config=config)
        with pytest.raises(errors.UserError, match=problem):
            pool.load("tokens", other)
    dora = dataclasses.replace(own, config=dataclasses.replace(own.config, use_dora=True))
    with pytest.raises(errors.UserError, match="embed_tokens in trainable_token_indices"):
        pool.load("tokens", dora)
    pool.load("tokens", own)


def test_saved_base_weights_must_be_those_of_the_model():
    """PEFT saves those of an embedding or a head that it adapts."""
    pool = pools.Pool(llama(targets=("embed_tokens", "lm_head", "v_proj")))
    folder = GOLDEN / "lora_embedding" / "final_adapter"
    own = pools.peft.read(folder)
    assert [name for name in own.saved if "base_layer" in name]
    pool.load("same", folder)
    other = {name: array + 1 for name, array in own.saved.items()}
    with pytest.raises(errors.UserError, match=r"weights of model\.embed_tokens that differ"):
        pool.load("other", dataclasses.replace(own, saved=other))
    assert pool.names() == ["same"]


def test_the_adapters_of_a_command_are_read_once(monkeypatch):
    names, read = ("lora_qv", "lora_plus"), []
    folders = {name: str(GOLDEN / name / "final_adapter") for name in names}
    monkeypatch.setattr(peft, "_arrays", lambda *of, own=peft._arrays: read.append(of) or own(*of))
    pool = opening.pool(nnx.merge(*parts("llama"), copy=True), folders)
    assert {name: pool.source(name) for name in pool.names()} == folders
    assert len(read) == 2


def test_twenty_loads_compile_nothing():
    pool = pools.Pool(llama(), most_adapters=3)
    graphdef, _, rest = nnx.split(pool._model, bank.BankParam, ...)
    ids = jnp.ones((2, 4), jnp.int32)

    @jax.jit
    def call(state, rest, row):
        with bank.mixture(jnp.stack([row, row])):
            return nnx.merge(graphdef, state, rest)(ids)

    runs = ("lora_qv", "lora_all_rslora", "lora_plus", "lora_pissa")  # pissa: of two slots
    pool.load("own", GOLDEN / runs[0] / "final_adapter")
    for number in range(20):
        pool.load("own", GOLDEN / runs[number % 4] / "final_adapter", replace=True)
        lease = pool.acquire({"own": 1 + number / 20})
        call(pool.state, rest, lease.row)
        pool.release(lease)
    assert pool._write._cache_size() == call._cache_size() == 1


def test_threads_load_and_unload_while_another_runs_requests(pool):
    failures = []

    def load(name):
        try:
            for number in range(40):
                pool.load(name, adapter(float(number % 5 + 10)), replace=True)
                if number % 3 == 0:
                    pool.unload(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load, args=(name,)) for name in ("t", "u", "v")]
    for thread in threads:
        thread.start()
    leases = []
    while any(thread.is_alive() for thread in threads):
        for name in pool.names():
            try:
                leases.append(pool.acquire({name: 1}))
            except errors.UserError:  # unloaded meanwhile
                continue
            if leases[-1] is None or len(leases) > 2:
                for lease in filter(None, leases):
                    pool.release(lease)
                leases = []
    for lease in filter(None, leases):
        pool.release(lease)
    assert not failures
    assert len(pool._free) + len(pool._resident) == 3
    assert changes(pool, pool.acquire({"p": 1}), pool.acquire({"q": 1})) == [4, 8]
