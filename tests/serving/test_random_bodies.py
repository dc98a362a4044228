"""Any body gets an answer or an error in OpenAI's form, and the next request is answered."""

import asyncio
import json
import pathlib

import fake_engine
import hypothesis
import jax
import numpy as np
import pytest
import random_bodies
import served
from flax import nnx
from hypothesis import strategies as st

from lora_jax import lora, tokenizer
from lora_jax.checkpoints import loader
from lora_jax.generation import engine
from lora_jax.generation import pool as pools
from lora_jax.lora import config as lora_config
from lora_jax.lora import peft
from lora_jax.lora.nnx import bank
from lora_jax.parallel import mesh as sharding
from lora_jax.serving import settings

STORIES = pathlib.Path(__file__).parents[1] / "golden" / "models" / "stories260K"

SETTINGS = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def strict(text):
    """JSON of valid text, without what JSON does not have."""

    def wrong(name):
        raise AssertionError(f"{name} in an answer")

    found = json.loads(text, parse_constant=wrong)
    json.dumps(found, ensure_ascii=False).encode()
    return found


def check(path, body, answer):
    if answer.status != 200:
        assert 400 <= answer.status < 500
        strict(answer.body)
        assert answer.error["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        frames = [each for each in answer.body.decode().split("\n\n") if each[:1] not in ("", ":")]
        data = [each.rpartition("data: ")[2] for each in frames]
        is_response = path.endswith("responses")
        events = [strict(each) for each in data if each != "[DONE]"]
        assert all("error" not in each or each["error"] is None for each in events), events
        assert data[-1] == "[DONE]" or (is_response and "response" in events[-1])
    elif answer.headers["content-type"].startswith("application/json"):
        found = strict(answer.body)
        assert "error" not in found or found["error"] is None
        if "choices" in found:
            check_choices(json.loads(body), found)
    else:
        assert answer.body.startswith(b"Success")


def check_choices(asked, found):
    prompt = asked.get("prompt")
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    count = int(asked.get("n") or 1) * (len(prompt) if several else 1)
    choices = found["choices"]
    assert [each["index"] for each in choices] == [*range(count)]
    assert {each["finish_reason"] for each in choices} <= {"stop", "length", "tool_calls"}
    most = asked.get("max_completion_tokens") or asked.get("max_tokens")
    assert most is None or found["usage"]["completion_tokens"] <= most * count


def ask(client, path, body, leaves=None):
    """leaves: after so many milliseconds."""

    async def asked():
        async with asyncio.timeout(30):
            left = None if leaves is None else asyncio.Event()
            asking = asyncio.ensure_future(client.ask("POST", path, body, leaves=left))
            if leaves is not None:
                await asyncio.sleep(leaves / 1000)
                left.set()
            return await asking

    return client.run(asked())


def folders(under):
    """Folders for /v1/load_lora_adapter: the settings alone, nothing."""
    for name in ("good", "bad"):
        (under / name).mkdir()
    (under / "good" / "adapter_config.json").write_text("{}")
    return under


def exchange(client, data, good, text):
    """Asks with a random body, then with a good one. Nothing is left of the first."""
    path = data.draw(st.sampled_from(sorted(random_bodies.BODIES)))
    body = data.draw(random_bodies.written(random_bodies.BODIES[path]))
    leaves = data.draw(st.sampled_from([None] * 5 + [0, 1, 4]))
    answer = ask(client, path, body, leaves)
    if leaves is None:
        check(path, body, answer)
    else:
        assert answer is None or answer.status < 500
    found = ask(client, "/v1/completions", json.dumps(good).encode())
    assert found.json["choices"][0]["text"] == text
    assert client.server.link.open == client.server._preparing == 0
    assert not client.server.link.by_adapter


@pytest.fixture
def scripted(serve, tmp_path):
    return serve(
        fake_engine.saying("é", "\x00", "{", '"a', '": 1}'), adapters=("one", "two"),
        adapters_dir=folders(tmp_path), allow_runtime_lora=True, max_n=4,
    )  # fmt: skip


@pytest.fixture
def real(tmp_path):
    """A server of a real model with two adapters, and greedy tokens for a prompt."""
    one = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    base = loader.load(STORIES, dtype="float32", mesh=one)
    reader = tokenizer.load(STORIES)
    reader.chat_template = served.TEMPLATE
    for name in ("one", "two", "good"):
        own = nnx.clone(base)
        how = lora_config.LoRAConfig(rank=2, targets=("q_proj",), alpha=4)
        lora.inject(own, how, rngs=nnx.Rngs(0))
        state = nnx.state(own, lora.LoRAParam)
        nnx.update(own, jax.tree.map(lambda x: x + 0.1, state))
        peft.save(tmp_path / name, own, how)
    (tmp_path / "bad").mkdir()
    bank.add(base, slots=3, rank=2)
    pool = pools.Pool(base)
    for name in ("one", "two"):
        pool.load(name, tmp_path / name)
    serving = engine.Engine(base, reader, eos_ids=(2,), slots=2, pool=pool, context=64)
    limits = settings.ServeSettings(adapters_dir=tmp_path, allow_runtime_lora=True, max_n=4)
    with serving:
        serving.start()
        with served.Served(serving, limits) as client:
            yield client


@SETTINGS
@hypothesis.given(data=st.data())
def test_any_body_is_answered_or_refused(scripted, data):
    exchange(scripted, data, {"prompt": "ab", "max_tokens": 2}, "é\x00")


@pytest.mark.long
@SETTINGS
@hypothesis.given(data=st.data())
def test_any_body_is_answered_or_refused_by_a_real_engine(real, data):
    with np.load(STORIES.parents[1] / "stories260K.npz") as golden:
        prompt, ids = golden["prompt0_ids"].tolist(), golden["gen0_ids"].tolist()
    good = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
    text = tokenizer.continuation(real.engine.reader, prompt, ids[len(prompt) : len(prompt) + 8])
    exchange(real, data, good, text)
    assert real.engine.stats()[:2] == (0, 0) and not real.engine.pool.leased()
