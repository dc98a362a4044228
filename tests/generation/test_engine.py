"""The engine: Hugging Face's greedy tokens, seeds, stopping, reuse of prefixes, compilations."""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import re
import threading
import time
import types

import cases
import eager
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src import monitoring

from lora_jax import errors, lora, tokenizer
from lora_jax.checkpoints import loader
from lora_jax.generation import (
    chunks,
    config,
    engine,
    grammar,
    limits,
    lockstep,
    masks,
    progress,
    scheduler,
    slots,
)
from lora_jax.generation import pool as pools
from lora_jax.lora import config as lora_config
from lora_jax.lora.nnx import bank
from lora_jax.parallel import mesh as sharding

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
STORIES = GOLDEN / "models" / "stories260K"
SMALL = "llama_bias"  # two layers and 96 tokens, for what does not need text: half the compiling
EOS = {"stories260K": (2,)}
LOOPING = "qwen3"  # it repeats itself
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
NUM_NEW = 12
GREEDY = config.Sampling(max_new_tokens=NUM_NEW)
SAMPLED = config.Sampling(max_new_tokens=NUM_NEW, temperature=1.0)


@functools.cache
def model(name, quantization="none"):
    one = sharding.make_mesh(ONE)
    folder = GOLDEN / "models" / name
    return loader.load(folder, dtype="float32", quantization=quantization, mesh=one)


@functools.cache
def reader():
    return tokenizer.load(STORIES)


@functools.cache
def shared(name="stories260K", quantization="none", slots=3):
    """An engine that tests share: its programs are compiled once."""
    eos_ids = EOS.get(name, ())
    return engine.Engine(model(name, quantization), reader(), eos_ids=eos_ids, slots=slots)


def fresh(name=SMALL, slots=3, **how):
    """An engine of its own; with as many slots as `shared`, XLA has compiled its programs."""
    return engine.Engine(model(name), reader(), slots=slots, **{"eos_ids": ()} | how)


def golden(name):
    """[(prompt, the tokens that follow)] of every stored generation."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        count = sum(key.startswith("gen") and key.endswith("_ids") for key in arrays)
        prompts = [arrays[f"prompt{i}_ids"].tolist() for i in range(count)]
        return [
            (prompt, tuple(arrays[f"gen{i}_ids"][len(prompt) :].tolist()))
            for i, prompt in enumerate(prompts)
        ]


def tokens(serving, prompts, sampling, **how):
    return [result.tokens for result in serving.generate(prompts, sampling, **how)]


@contextlib.contextmanager
def compilations():
    """A list to which an entry is added whenever XLA compiles a program, as it does for users."""
    found = []

    def note(event, _, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    monitoring.register_event_duration_secs_listener(note)
    try:
        with eager.compiled():
            yield found
    finally:
        monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize(
    "name",
    [pytest.param("llama", marks=[pytest.mark.device, pytest.mark.long]), "phi3_longrope",
     *cases.long("cwm", "exaone4", "gemma2", "gemma3", "llama_bias", "llama_dynamic", "ministral3",
                 "olmo3", "qwen2_window", "qwen3", "smollm3")],
)  # fmt: skip
def test_greedy_tokens_equal_hugging_faces(name):
    """More prompts than slots, of unequal length."""
    prompts, following = zip(*golden(name), strict=True)
    assert len({len(prompt) for prompt in prompts}) > 1
    found = tokens(shared(name), prompts, GREEDY)
    assert found == [own[:NUM_NEW] for own in following]


@pytest.mark.long
def test_a_hundred_greedy_tokens_of_a_real_model():
    prompts, following = zip(*golden("stories260K"), strict=True)
    assert tokens(shared(), prompts, config.Sampling(max_new_tokens=100)) == [*following]


@pytest.mark.device
@pytest.mark.parametrize("quantization", ["int4", *cases.long("int8", "nf4")])
def test_a_quantized_base_generates(quantization):
    """Its tokens are nearly those of the float model."""
    prompts, following = zip(*golden("stories260K"), strict=True)
    found = tokens(shared(quantization=quantization), prompts, GREEDY)
    assert tokens(shared(quantization=quantization), prompts, GREEDY) == found
    expected = [own[:NUM_NEW] for own in following]
    agreement = np.mean(np.array(found) == np.array(expected))
    assert agreement > (0.9 if quantization == "int8" else 0.3)


@pytest.mark.long
@pytest.mark.parametrize("name", ["gemma2", "olmo3", "phi3"])
def test_relatives_in_int4_generate_what_the_whole_forward_pass_does(name):
    prompts = [prompt for prompt, _ in golden(name)]
    whole = jax.jit(model(name, "int4"))
    for prompt, own in zip(prompts, tokens(shared(name, "int4"), prompts, GREEDY), strict=True):
        logits = whole(np.array([[*prompt, *own]], np.int32))[0]
        assert tuple(logits.argmax(axis=-1)[len(prompt) - 1 : -1].tolist()) == own


@pytest.mark.long  # as `generate` and `chat` do
def test_an_adapter_of_the_model_changes_what_is_generated_and_dropout_does_not():
    own = nnx.clone(model(SMALL))
    targets = lora_config.LoRAConfig(targets=("q_proj", "down_proj"), dropout=0.5)
    lora.inject(own, targets, rngs=nnx.Rngs(0))
    own.train()
    serving = engine.Engine(own, reader(), eos_ids=(), slots=3)
    prompts, following = zip(*golden(SMALL), strict=True)
    expected = [own[:NUM_NEW] for own in following]
    assert tokens(serving, prompts, GREEDY) == expected
    _, trained, frozen = lora.split(own)
    serving.use(jax.tree.map(lambda x: x + 0.3, trained), frozen)
    assert tokens(serving, prompts, GREEDY) != expected
    serving.use(trained, frozen)
    assert tokens(serving, prompts, GREEDY) == expected


def test_a_text_ends_before_its_eos():
    prompts, following = zip(*golden(SMALL), strict=True)
    eos = following[0][4]
    serving = fresh(eos_ids=(eos, 9999))
    results = [*serving.generate(prompts, GREEDY)]
    ends = [own.index(eos) if eos in own[:NUM_NEW] else None for own in following]
    assert len(set(ends)) > 1
    for prompt, own, end, result in zip(prompts, following, ends, results, strict=True):
        kept = own[:NUM_NEW] if end is None else own[:end]
        assert result.text == tokenizer.continuation(reader(), prompt, kept)
        assert result.finish_reason == ("length" if end is None else "stop")
        assert result.tokens == (own[:NUM_NEW] if end is None else own[: end + 1])


def test_stop_ids_and_strings_of_a_request():
    prompt, following = golden("stories260K")[0]
    serving = shared()
    text = tokenizer.continuation(reader(), prompt, following[:NUM_NEW])
    stop = text[5:9]

    def result(**how):
        return serving.submit(prompt, config.Sampling(max_new_tokens=NUM_NEW, **how)).result()

    found = result(stop=("never", stop))
    assert (found.text, found.finish_reason, found.stop_reason) == (
        text[: text.index(stop)], "stop", stop,
    )  # fmt: skip
    assert result(stop=(stop,), include_stop=True).text == text[: text.index(stop) + len(stop)]
    found = result(stop_token_ids=(following[3],))
    first = following.index(following[3])
    assert found.tokens == following[: first + 1] and found.stop_reason == following[3]
    assert result(stop_token_ids=(following[0],), min_tokens=5).tokens[0] != following[0]
    assert len(result(stop_token_ids=(following[0],), min_tokens=5).tokens) >= 5


def test_a_seed_gives_the_same_tokens_in_any_company_order_and_slot():
    """32 requests alone, together, and in another order, with all kinds of settings."""
    rng = np.random.default_rng(0)
    settings = [
        config.Sampling(
            max_new_tokens=int(rng.integers(3, 14)), temperature=float(rng.choice([0, 0.7, 1.3])),
            top_k=int(rng.choice([0, 20])), top_p=float(rng.choice([1, 0.9])),
            repetition_penalty=float(rng.choice([1, 1.3])), frequency_penalty=float(i % 3 == 0),
            seed=i,
        )
        for i in range(32)
    ]  # fmt: skip
    prompts = [rng.integers(3, 95, rng.integers(1, 40)).tolist() for _ in settings]
    serving = shared(SMALL)

    def together(order):
        requests = {i: serving.submit(prompts[i], settings[i]) for i in order}
        return [requests[i].result().tokens for i in range(32)]

    alone = [serving.submit(*each).result().tokens for each in zip(prompts, settings, strict=True)]
    assert together(range(32)) == alone
    assert together(rng.permutation(32).tolist()) == alone
    other = [serving.submit(prompt, SAMPLED).result().tokens for prompt in prompts[:4]]
    assert other != [serving.submit(prompt, SAMPLED).result().tokens for prompt in prompts[:4]]


def test_a_prefix_is_reused_within_a_slot_and_by_copying():
    serving = shared(SMALL)
    serving.release()
    long = np.random.default_rng(1).integers(3, 95, 60).tolist()
    first = serving.submit(long, GREEDY).result()
    again = serving.submit(long, GREEDY).result()
    assert (again.tokens, again.cached_tokens) == (first.tokens, 59)
    chat = [*long, *first.tokens, 7]  # the next turn
    turn = serving.submit(chat, GREEDY).result()
    assert turn.cached_tokens == 60 + NUM_NEW - 1
    both = [serving.submit([*chat, last], GREEDY) for last in (9, 10)]
    results = [each.result() for each in both]
    assert [result.cached_tokens for result in results] == [len(chat), len(chat)]
    for prompt, result in zip(([*chat, 9], [*chat, 10]), results, strict=True):
        serving.release()
        alone = serving.submit(prompt, GREEDY).result()
        assert (alone.tokens, alone.cached_tokens) == (result.tokens, 0)


def test_a_slot_whose_first_tokens_are_overwritten_has_no_key(monkeypatch):
    monkeypatch.setattr(chunks, "SIZES", (32,))
    batch = fresh("phi3", slots=2).batch
    work = object.__new__(progress.Work)
    work.slot, work.request = slots.Slot(0, key=()), types.SimpleNamespace(prompt=range(38))
    work.sent = 2
    batch._span_of_step([work])
    assert work.slot.key == ()
    batch._span_of_step([work], 1)  # with a token that is guessed
    assert work.slot.key is None


@pytest.mark.long
def test_a_sequence_that_outgrew_its_window_lends_no_prefix(monkeypatch):
    """The cache has 8 places for the window and 32 for a chunk."""
    monkeypatch.setattr(chunks, "SIZES", (32,))
    serving = fresh("phi3", slots=2)
    assert serving.batch.spans.size == 40
    long = np.random.default_rng(1).integers(3, 95, 60).tolist()
    serving.submit(long, config.Sampling(max_new_tokens=30))
    serving.advance()
    assert serving.stats().running == 1
    found = serving.submit([*long[:20], 7], GREEDY).result()
    serving.release()
    alone = serving.submit([*long[:20], 7], GREEDY).result()
    assert (alone.tokens, alone.cached_tokens) == (found.tokens, 0)


def test_longrope_reuses_what_was_rotated_alike():
    """24 tokens at most have the short factors; whoever gets longer is computed again."""
    serving = shared("phi3_longrope")
    serving.release()
    prompt, following = golden("phi3_longrope")[1]
    both = [*prompt, *following]  # 32 tokens
    scored = config.Sampling(max_new_tokens=16, prompt_logprobs=0)
    grown = serving.submit(prompt, scored).result()
    assert grown.tokens == following and len(grown.prompt_logprobs) == len(prompt) - 1

    def found(num_tokens):
        result = serving.submit(both[:num_tokens], config.Sampling(max_new_tokens=2)).result()
        assert result.tokens == tuple(both[num_tokens : num_tokens + 2])
        return result.cached_tokens

    assert [found(30), found(20), found(21), found(29)] == [29, 0, 20, 28]


def test_logprobs_are_those_of_the_whole_forward_pass():
    prompt, following = golden(SMALL)[1]
    sampling = config.Sampling(max_new_tokens=4, logprobs=3, prompt_logprobs=2)
    result = shared(SMALL).submit(prompt, sampling).result()
    ids = [*prompt, *following[:4]]
    logits = np.asarray(jax.jit(model(SMALL))(np.array([ids], np.int32))[0])
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = [*result.prompt_logprobs, *result.logprobs]
    assert [each.token for each in found] == ids[1:]
    for at, each in enumerate(found):
        top = 2 if at < len(prompt) - 1 else 3
        best = np.argsort(-expected[at])[:top]
        assert [id_ for id_, _ in each.top] == best.tolist()
        assert abs(each.logprob - expected[at, each.token]) < 1e-4
        assert np.abs([value for _, value in each.top] - expected[at, best]).max() < 1e-4
    assert result.logprobs[0].logprob == result.logprobs[0].top[0][1]  # the same float


def test_an_aborted_request_ends_and_frees_its_slot():
    serving = fresh()
    prompt = golden(SMALL)[0][0][:1]
    long = config.Sampling(max_new_tokens=100)
    others = [serving.submit(prompt, long) for _ in range(2)]
    first = serving.submit(prompt, long)
    second = serving.submit(prompt, GREEDY)
    pieces = iter(first)
    next(pieces)
    assert serving.stats()[:2] == (1, 3)
    first.abort()
    assert [*pieces][-1].finish_reason == "abort"
    assert second.result().finish_reason == "length"
    assert serving.stats()[:2] == (0, 2)
    for each in others:
        each.abort()
    queued = [serving.submit(prompt, GREEDY) for _ in range(2)]
    queued[1].abort()  # before it has begun
    assert [each.result().finish_reason for each in queued] == ["length", "abort"]
    assert serving.stats()[:2] == (0, 0)


def test_long_prompts_do_not_stall_the_others():
    serving = shared(SMALL)
    short = serving.submit([1, 5], config.Sampling(max_new_tokens=40))
    long = serving.submit(np.random.default_rng(0).integers(3, 95, 240).tolist(), GREEDY)
    next(iter(short))
    order = []
    while len(order) < 2:
        serving.advance()
        for name, each in (("short", short), ("long", long)):
            if name not in order and not each._pieces.empty():
                order.append(name)
    assert order == ["short", "long"]


def test_a_thread_serves_many_callers():
    expected = tokens(shared(SMALL), [own for own, _ in golden(SMALL)], GREEDY)
    found = {}
    with fresh() as serving:
        serving.start()

        def call(number, prompt):
            found[number] = serving.submit(prompt, GREEDY).result().tokens

        threads = [
            threading.Thread(target=call, args=(number, prompt))
            for number, (prompt, _) in enumerate(golden(SMALL) * 4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[number] for number in range(len(found))] == expected * 4
    assert serving.submit([1], GREEDY).emit is not None
    with pytest.raises(RuntimeError, match="closed"):
        serving.submit([1], GREEDY).result()


def test_a_request_that_breaks_a_turn_does_not_end_the_service(monkeypatch, capsys):
    (prompt, _), *_ = golden(SMALL)
    (expected,) = tokens(shared(SMALL), [prompt], GREEDY)
    with fresh() as serving:
        admit = serving.batch.admit

        def broken(work, eos_ids):
            if work.request.sampling.top_k == 7 or fails:
                raise ValueError("unforeseen")
            return admit(work, eos_ids)

        fails = False
        monkeypatch.setattr(serving.batch, "admit", broken)
        serving.start()
        with pytest.raises(RuntimeError, match="unforeseen"):
            serving.submit(prompt, dataclasses.replace(SAMPLED, top_k=7)).result()
        end = time.monotonic() + 60
        while serving.failure and time.monotonic() < end:  # it makes its state anew
            time.sleep(0.01)
        assert serving.submit(prompt, GREEDY).result().tokens == expected
        fails = True
        for _ in range(2):  # it cannot go on, and says so
            with pytest.raises(RuntimeError, match="unforeseen"):
                serving.submit(prompt, GREEDY).result()
        assert "unforeseen" in serving.failure and "unforeseen" in capsys.readouterr().err


def test_a_turn_that_fails_ends_all_processes(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(lockstep, "leader", lockstep.Leader)
    monkeypatch.setattr(lockstep.processes, "end", lambda *about, sure: ended.append(about))
    with fresh() as serving:
        monkeypatch.setattr(serving._loop, "turn", lambda _: 1 / 0)
        serving.start()
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            serving.submit([1], GREEDY).result()
    ((code, message),) = ended
    assert code == 1 and "ZeroDivisionError: division by zero. Start all processes" in message
    assert "Traceback" in capsys.readouterr().err


def test_an_idle_engine_begins_requests_together_that_are_prepared_together(monkeypatch):
    prompt, _ = golden(SMALL)[0]
    monkeypatch.setattr(engine, "_GATHERS", 60)
    with fresh() as serving:
        begun, take = [], serving._scheduler.take

        def noted(followers):
            take(followers)
            begun.append(len(serving._scheduler.waiting))

        monkeypatch.setattr(serving._scheduler, "take", noted)
        serving.start()
        with serving.expecting():
            first = serving.submit(prompt, GREEDY)
            time.sleep(0.05)  # in which it would have begun
            both = [first, serving.submit(prompt, GREEDY)]
        assert both[0].result().tokens == both[1].result().tokens
    assert begun[0] == 2


def test_pieces_make_the_text_and_never_change():
    prompt, following = golden("stories260K")[0]
    text = ""
    for piece in shared().submit(prompt, GREEDY):
        text += piece.text
    assert text == tokenizer.continuation(reader(), prompt, following[:NUM_NEW])


def test_what_cannot_be_served_is_refused_at_once():
    serving = shared()
    sampling = config.Sampling(
        max_new_tokens=500, min_tokens=501, logit_bias=((512, 1.0),), stop_token_ids=(513,)
    )
    with pytest.raises(errors.UserError) as raised:
        serving.submit([1, 600] * 10, sampling, adapters="pirate")
    for problem in ("context of 512", "600", "pirate", "logit_bias", "stop_token_ids",
                    "min_tokens"):  # fmt: skip
        assert problem in str(raised.value)


def test_a_prompt_that_leaves_no_room_is_an_error():
    limits.check_length(54, 10, 64)
    with pytest.raises(errors.UserError, match=r"(?s)64 tokens.*55 tokens.*--max-new-tokens 9"):
        limits.check_length(55, 10, 64)
    with pytest.raises(errors.UserError, match="shorten the prompt") as raised:
        limits.check_length(64, 10, 64)
    assert "--max-new-tokens 0" not in str(raised.value)


def test_all_invalid_settings_are_named():
    with pytest.raises(errors.UserError) as raised:
        config.Sampling(
            max_new_tokens=0, temperature=1e39, top_k=-2, top_p=0.0, min_p=1.5,
            repetition_penalty=1e-300,
        )  # fmt: skip
    for problem in ("max_new_tokens 0", "temperature 1e+39", "top_k -2", "top_p 0.0", "min_p 1.5",
                    "repetition_penalty 1e-300"):  # fmt: skip
        assert problem in str(raised.value)


def test_the_cache_is_updated_in_place():
    """No program copies it: none has room for a second one."""
    batch, live = shared().batch, np.ones(3, bool)
    state = batch.state
    with batch.on_devices():
        lowered = batch.programs.decode.lower(batch.weights, state, live, span=512)
    compiled = lowered.compile()
    cache = state.cache.k.nbytes + state.cache.v.nbytes
    uses = compiled.memory_analysis()
    assert uses.alias_size_in_bytes > cache
    assert uses.temp_size_in_bytes < cache / 4


def test_a_grammar_beside_requests_without_one():
    pytest.importorskip("llguidance")
    serving = shared()
    prompt, following = golden("stories260K")[0]
    date = config.Sampling(
        max_new_tokens=40, temperature=1.0, seed=3, grammar=grammar.regex(r"[a-d]{3}-[x-z]{2}")
    )
    both = [serving.submit(prompt, date), serving.submit(prompt, GREEDY)]
    found, plain = (each.result() for each in both)
    assert re.fullmatch(r"[a-d]{3}-[x-z]{2}", found.text) and found.finish_reason == "stop"
    assert plain.tokens == following[:NUM_NEW]
    with pytest.raises(errors.UserError, match="grammar"):
        serving.submit(prompt, config.Sampling(grammar=grammar.regex("(")))
    # One that turns out to be too complex ends its own request, as an error of its user.
    many = grammar.regex("(?:(?:a?){60}){60}" + "a{60}")
    both = [serving.submit(prompt, config.Sampling(grammar=many)), serving.submit(prompt, GREEDY)]
    *_, last = both[0]
    assert last.finish_reason == "error" and last.is_users and "too many" in last.error
    assert both[1].result().tokens == following[:NUM_NEW]


def work_long():
    end = time.thread_time() + 3 * masks._LONG
    while time.thread_time() < end:
        pass


def test_a_slow_grammar_stalls_no_other_request(monkeypatch):
    pytest.importorskip("llguidance")
    serving = shared()
    prompt, following = golden("stories260K")[0]
    letters = dataclasses.replace(SAMPLED, seed=3, grammar=grammar.regex(r"[a-d]{3}"))
    expected = serving.submit(prompt, letters).result()
    known, calls, mask = threading.Event(), itertools.count(), grammar.Matcher.mask

    def slow(matcher, out):
        known.wait(5) if next(calls) else work_long()
        mask(matcher, out)

    monkeypatch.setattr(grammar.Matcher, "mask", slow)
    both = [serving.submit(prompt, letters), serving.submit(prompt, GREEDY)]
    assert both[1].result().tokens == following[:NUM_NEW]
    assert both[0]._pieces.qsize() == 1  # the first mask showed that its masks take long
    known.set()
    assert both[0].result().tokens == expected.tokens


def test_several_processes_wait_for_a_slow_grammar(monkeypatch):
    """None of them knows which mask is late in another."""
    pytest.importorskip("llguidance")
    serving, together = shared(), []
    choose, mask = serving.batch.choose, grammar.Matcher.mask

    def slow(matcher, out):
        work_long()
        mask(matcher, out)

    def noted(works, *about):
        together.append(len(works))
        return choose(works, *about)

    monkeypatch.setattr(grammar.Matcher, "mask", slow)
    monkeypatch.setattr(serving.batch, "choose", noted)
    prompt, _ = golden("stories260K")[0]
    letters = dataclasses.replace(SAMPLED, seed=3, grammar=grammar.regex(r"[a-d]{3}"))
    for waits in (True, False):
        own = masks.Masks(3, serving.vocab_size, waits=waits)
        monkeypatch.setattr(serving._loop, "_masks", own)
        both = [serving.submit(prompt, letters), serving.submit(prompt, GREEDY)]
        assert all(each.result().tokens for each in both)
        assert (together[:2] == [2, 2]) == waits  # its own end may come with the third
        together.clear()


def disturbed(array, *, noise):
    return np.asarray(array) + np.float32(0.05) * noise.normal(size=array.shape).astype(np.float32)


@functools.cache
def pooled():
    """An engine of three slots on a model with three adapters, and the adapters."""
    own = nnx.clone(model(SMALL))
    kinds = {
        "a": lora_config.LoRAConfig(rank=4, alpha=64, targets=("q_proj", "v_proj")),
        "b": lora_config.LoRAConfig(rank=12, alpha=96, targets="all-linear"),
        "dora": lora_config.LoRAConfig(rank=4, alpha=64, targets=("o_proj",), use_dora=True),
    }
    adapters = {}
    for number, (name, kind) in enumerate(kinds.items()):
        alone = nnx.clone(model(SMALL))
        lora.inject(alone, kind, rngs=nnx.Rngs(number))
        state = nnx.state(alone, lora.LoRAParam)
        change = functools.partial(disturbed, noise=np.random.default_rng(number))
        nnx.update(alone, jax.tree.map(change, state))
        adapters[name] = lora.collect(alone, kind)
    bank.add(own, slots=4, rank=8)
    pool = pools.Pool(own)
    for name, adapter in adapters.items():
        pool.load(name, adapter)
    return engine.Engine(own, reader(), eos_ids=(), slots=3, pool=pool), adapters


def greedily(alone, prompt):
    """The tokens that follow by the whole forward pass, which ignores what comes later."""
    whole = jax.jit(alone)
    ids = np.zeros((1, len(prompt) + NUM_NEW), np.int32)
    ids[0, : len(prompt)] = prompt
    for at in range(len(prompt), ids.shape[1]):
        ids[0, at] = whole(ids)[0, at - 1].argmax()
    return tuple(ids[0, len(prompt) :].tolist())


def test_adapters_in_one_batch_give_the_tokens_of_each_alone():
    serving, adapters = pooled()
    prompt = golden(SMALL)[0][0][:1]
    expected = {}
    for name, adapter in adapters.items():
        alone = nnx.clone(model(SMALL))
        lora.attach(alone, adapter)
        expected[name] = [greedily(alone, prompt)]
    expected[None] = tokens(shared(SMALL), [prompt], GREEDY)
    assert len({str(own) for own in expected.values()}) == 4
    asked = [(name, serving.submit(prompt, GREEDY, adapters=name)) for name in [*expected] * 2]
    for name, request in asked:
        assert [request.result().tokens] == expected[name]


def test_a_replaced_adapter_meets_no_prefix_of_the_old_one_and_nothing_compiles():
    serving, adapters = pooled()
    prompt = np.random.default_rng(0).integers(3, 95, 40).tolist()
    old = serving.submit(prompt, GREEDY, adapters="a").result()
    assert serving.submit(prompt, GREEDY, adapters="a").result().cached_tokens == 39
    running = serving.submit(prompt, config.Sampling(max_new_tokens=30), adapters="a")
    serving.advance()
    assert serving.stats().running == 1
    with compilations() as found:
        serving.pool.load("a", adapters["b"], replace=True)
        new = serving.submit(prompt, GREEDY, adapters="a").result()
        assert (new.tokens != old.tokens, new.cached_tokens) == (True, 0)
        assert running.result().tokens[:NUM_NEW] == old.tokens  # it keeps what it began with
        same = serving.submit(prompt, GREEDY, adapters="b").result()
        assert (same.tokens, same.cached_tokens) == (new.tokens, 39)  # known by its content
        mixed = serving.submit(prompt, GREEDY, adapters={"b": 0.5, "dora": 0.5}).result()
        assert mixed.cached_tokens == 0
    assert not found
    serving.pool.load("a", adapters["a"], replace=True)


def test_more_adapters_than_slots_take_turns():
    """b takes two of the four slots, and each request waits until its adapter has room."""
    serving, _ = pooled()
    prompt = golden(SMALL)[0][0][:1]
    names = ["a", "b", "dora", "b", "a", "dora"] * 3
    asked = [serving.submit(prompt, GREEDY, adapters={name: 1.0, "b": 0.5}) for name in names]
    assert {request.result().finish_reason for request in asked} == {"length"}


@functools.cache
def guessing():
    """An engine with slots for more requests than guesses are for."""
    return fresh(LOOPING, slots=8, speculate=4)


def test_guessed_tokens_are_those_that_come_without_guesses():
    """In texts with repetitions, and beside a request that samples."""
    prompts, following = zip(*golden(LOOPING), strict=True)
    prompts = [[*prompts[2], *following[2]], *prompts[1:]]
    long = config.Sampling(max_new_tokens=40)
    random = dataclasses.replace(long, temperature=1.0, seed=1)
    expected = tokens(shared(LOOPING), prompts, long)
    drawn = shared(LOOPING).submit(prompts[0], random).result()
    serving = guessing()
    before = np.array(serving.stats())
    other = serving.submit(prompts[0], random)
    assert tokens(serving, prompts, long) == expected
    assert other.result().tokens == drawn.tokens
    stats = scheduler.Stats(*np.array(serving.stats()) - before)
    assert 20 < stats.accepted_tokens < stats.guessed_tokens
    assert stats.generated_tokens == 4 * 40


@pytest.mark.long
def test_guesses_end_where_longrope_turns():
    prompts = [[28, 78] * 10, [60, 7] * 10, [14, 6] * 10, [46] * 20]  # they go on with repetitions
    long = config.Sampling(max_new_tokens=16)
    expected = tokens(shared("phi3_longrope"), prompts, long)
    serving = fresh("phi3_longrope", slots=8, speculate=4)
    assert tokens(serving, prompts, long) == expected
    assert serving.stats().accepted_tokens > 5


def test_requests_that_end_guessing_do_not_change_the_others():
    """With more requests than guesses are for."""
    repeated = golden(LOOPING)[2][0] * 2
    long = config.Sampling(max_new_tokens=40)
    (expected,) = tokens(shared(LOOPING), [repeated], long)
    serving = guessing()
    before = serving.stats().accepted_tokens
    first = serving.submit(repeated, long)
    for _ in range(15):  # fewer turns than tokens: the request goes on
        serving.advance()
    assert serving.stats().accepted_tokens > before and serving.stats().running == 1
    others = [serving.submit(repeated, long) for _ in range(6)]
    assert [each.result().tokens for each in (first, *others)] == [expected] * 7


def test_a_cache_in_int8_gives_nearly_the_same_logits():
    sampling = config.Sampling(max_new_tokens=20, prompt_logprobs=0, logprobs=0)
    prompt, following = golden(SMALL)[2]
    ids = [*prompt, *following]
    serving = fresh(kv_dtype="int8")
    found, expected = (
        [each.logprob for each in engine_.submit(ids, sampling).result().prompt_logprobs]
        for engine_ in (serving, shared(SMALL))
    )
    assert 0 < np.abs(np.subtract(found, expected)).max() < 0.1
    cache = serving.batch.state.cache
    assert cache.k.dtype == jnp.int8 and cache.k_scale.shape == cache.k.shape[:-1]
    with pytest.raises(errors.UserError, match="int8"):
        fresh(kv_dtype="fp8").submit([1], GREEDY).result()


def test_a_follower_does_what_the_leader_does(monkeypatch):
    """What process 0 sends is enough for the same tokens, with aborts, in every turn."""
    sent = []
    leading, following = fresh(), fresh(seed=7)
    leading._followers = lockstep.Leader()
    monkeypatch.setattr(lockstep.processes, "broadcast", lambda value: sent.append(value))
    prompts = [own for own, _ in golden(SMALL)]
    asked = [leading.submit(prompt, SAMPLED) for prompt in prompts * 2]
    asked[1].abort()
    found = [each.result() for each in asked]
    leading.close()
    assert sent.pop() is None
    messages = iter([*map(json.loads, map(json.dumps, sent)), None])
    monkeypatch.setattr(lockstep.processes, "broadcast", lambda _: next(messages))
    taken = []
    submit = following.submit
    monkeypatch.setattr(
        following, "submit", lambda *args, **how: taken.append(submit(*args, **how)) or taken[-1]
    )
    following.follow()
    results = [each.result() for each in taken]
    assert [each.tokens for each in results] == [each.tokens for each in found]
    assert [each.finish_reason for each in results] == [each.finish_reason for each in found]
