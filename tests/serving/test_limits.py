"""Who may ask, how much, and what happens when a client leaves or the server ends."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import threading
import time

import fake_engine
import pytest

from lora_jax import errors
from lora_jax.generation import config, request
from lora_jax.serving import models, run, server, settings


def waits_for_gate(engines):
    """A script that says "a", then waits until the test opens the engine's gate, then "b"."""

    def script(asked):
        yield request.Piece("a", (5,))
        engines[0].gate.wait(10)
        yield request.Piece("b", (6,), (), "stop")

    return script


def never_begins(engines):
    def script(asked):
        engines[0].gate.wait(10)
        yield request.Piece("b", (6,), (), "stop")

    return script


@pytest.fixture
def held(serve):
    """Makes clients whose engine waits for its gate."""

    def make(script, **how):
        engines = []
        client = serve(script(engines), **how)
        engines.append(client.engine)
        return client

    return make


# ---------------------------------------------------------------------- who


def test_everything_but_health_and_the_page_needs_the_key(serve):
    client = serve(api_key="secret")
    paths = {route.path for route in client._app.routes} - {"/health", "/", "/v1/models/{id:path}"}
    assert len(paths) >= 11
    for path in (*paths, "/v1/models/base", "/nothing", "//health"):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            answer = client.get(path, **headers)
            assert answer.status == 401, path
            assert answer.error["code"] == "invalid_api_key"
    assert client.get("/health").status == 200
    right = {"authorization": "Bearer secret"}
    assert client.get("/v1/models", **right).status == 200
    assert client.chat(headers=right).status == 200
    assert client.chat(headers={"authorization": "bearer secret"}).status == 200


def test_pages_of_other_sites_cannot_ask(serve):
    """Without asking the server first, a browser sends forms and text, but no JSON."""
    client = serve()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = client.complete(headers={"content-type": kind})
        assert answer.status == 415 and answer.error
    assert (
        client.complete(headers={"content-type": "application/json; charset=utf-8"}).status == 200
    )
    origin = {"origin": "https://page.example"}
    assert "access-control-allow-origin" not in client.complete(headers=origin).headers


def test_an_allowed_origin_may_read_answers(serve):
    client = serve(allow_origin=("https://page.example",), api_key="secret")
    asks = {"origin": "https://page.example", "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type"}  # fmt: skip
    answer = client.run(client.ask("OPTIONS", "/v1/completions", headers=asks))
    assert answer.status == 200  # before it has the key
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    other = {**asks, "origin": "https://other.example"}
    refused = client.run(client.ask("OPTIONS", "/v1/completions", headers=other))
    assert "access-control-allow-origin" not in refused.headers


# ---------------------------------------------------------------------- how much


def test_limits_of_a_request(serve):
    client = serve(max_body=200, max_prompt=8, max_tokens=4, max_n=2)
    large = client.complete("a" * 300)
    assert large.status == 413 and large.error["type"] == "invalid_request_error"
    announced = client.complete(headers={"content-length": "9" * 30})
    assert announced.status == 413
    assert client.complete([5] * 9).error["code"] == "context_length_exceeded"
    assert client.complete([5] * 8).status == 200
    assert client.complete(max_tokens=5).error["param"] == "max_tokens"
    assert client.complete(n=3).error["param"] == "n"
    client.chat()
    assert client.engine.asked[-1].sampling.max_new_tokens == 4


def test_a_full_queue_is_refused_for_a_while(held):
    client = held(never_begins, slots=1, max_queue=1)

    async def ask():
        body = json.dumps({"prompt": "ab"}).encode()
        ask = lambda: client.ask("POST", "/v1/completions", body)  # noqa: E731
        first = [asyncio.ensure_future(ask()) for _ in range(2)]
        while len(client.engine.asked) < 2:
            await asyncio.sleep(0.001)
        third = await ask()
        client.engine.gate.set()
        return await asyncio.gather(*first), third, await ask()

    first, third, later = client.run(ask())
    assert [each.status for each in first] == [200, 200] and later.status == 200
    assert third.status == 429 and third.headers["retry-after"] == "1"
    assert third.error["type"] == "rate_limit_error"
    assert len(client.engine.asked) == 3


def test_of_a_burst_as_many_are_served_as_there_is_room_for(held):
    client = held(waits_for_gate, slots=1, max_queue=2)
    encode, encoded = client.server._prompts.completion, threading.Event()

    def together(completion):
        encoded.wait(10)
        return encode(completion)

    client.server._prompts.completion = together

    async def ask():
        body = json.dumps({"prompt": "ab"}).encode()
        asked = [asyncio.ensure_future(client.ask("POST", "/v1/completions", body))
                 for _ in range(9)]  # fmt: skip
        while sum(each.done() for each in asked) < 5:
            await asyncio.sleep(0.001)
        encoded.set()
        time.sleep(0.05)  # until all are encoded, while the loop looks at none
        while sum(each.done() for each in asked) < 6:
            await asyncio.sleep(0.001)
        client.engine.gate.set()
        return [each.status for each in await asyncio.gather(*asked)]

    assert sorted(client.run(ask())) == [200] * 3 + [429] * 6


def test_an_idle_engine_is_told_of_requests_before_they_come(serve):
    client = serve()
    assert client.complete().status == client.chat().status == 200
    assert client.engine.unexpected == client.engine.expected == 0


def test_more_choices_than_there_is_ever_room_for(serve):
    client = serve(slots=1, max_queue=2)
    answer = client.complete(["a"] * 4)  # 429 would be tried again for ever
    assert answer.status == 400 and not client.engine.asked
    assert client.complete(["a"] * 3).status == 200


def test_a_request_that_takes_too_long(held):
    client = held(waits_for_gate, timeout=0.05)
    answer = client.chat()
    assert answer.status == 504 and answer.headers["x-should-retry"] == "false"
    assert only_aborted(client)
    streamed = client.chat(stream=True, n=2)
    assert "longer than 0.05 seconds" in streamed.body.decode()
    assert only_aborted(client) and ended(client) == {"timeout": 3}


def ended(client):
    """How many choices ended, by the reason."""
    text = client.get("/metrics").body.decode()
    return {reason: int(count) for reason, count in
            re.findall(r'^lora_jax_choices_total{reason="(\w+)"} (\d+)$', text, re.M)}  # fmt: skip


def only_aborted(client):
    return all(each.aborted.is_set() for each in client.engine.asked)


# ---------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [never_begins, waits_for_gate])
def test_a_client_that_leaves_ends_its_requests(held, stream, script):
    client = held(script)

    async def leave():
        leaves, arrived = asyncio.Event(), []
        fields = {"messages": [{"role": "user", "content": "ab"}], "stream": stream, "n": 2}
        ask = asyncio.ensure_future(
            client.ask("POST", "/v1/chat/completions", json.dumps(fields).encode(),
                       leaves=leaves, arrived=arrived)
        )  # fmt: skip
        while len(client.engine.asked) < 2:
            await asyncio.sleep(0.001)
        if stream and script is waits_for_gate:
            while not any(b"content" in each.get("body", b"") for each in arrived):
                await asyncio.sleep(0.001)
        assert not any(each.aborted.is_set() for each in client.engine.asked)
        leaves.set()
        await asyncio.wait_for(ask, 5)

    client.run(leave())
    assert len(client.engine.asked) == 2 and only_aborted(client)
    assert ended(client) == {"abort": 2}


def test_a_request_that_is_refused_halfway_leaves_nothing_behind(serve):
    client = serve()
    submit = client.engine.submit

    def picky(prompt, *given, **named):
        if [*prompt] == [6]:
            raise errors.UserError(expected="another prompt", found="6")
        return submit(prompt, *given, **named)

    client.engine.submit = picky
    answer = client.complete([[5], [6]])
    assert answer.status == 400
    assert len(client.engine.asked) == 1 and only_aborted(client)


def test_what_has_ended_is_not_aborted(serve):
    client = serve()
    client.chat()
    client.chat(stream=True)
    assert not any(each.aborted.is_set() for each in client.engine.asked)
    assert ended(client) == {"stop": 2}


def test_pieces_wake_the_loop_up_once(serve):
    """All that a step of the engine gives is delivered together."""
    client = serve(fake_engine.saying(*"abcdefgh"))
    link, wakes = client.server.link, []
    deliver = link._deliver
    link._deliver = lambda: (wakes.append(len(link._arrived)), deliver())

    async def ask():
        made = request.Piece("x", (5,))
        inbox = []
        asked = link.submit((5,), config.Sampling(), {}, inbox.append)
        while not (inbox and inbox[-1].finish_reason):
            await asyncio.sleep(0)
        wakes.clear()
        for _ in range(5):
            asked.emit(made)
        await asyncio.sleep(0.01)

    client.run(ask())
    assert wakes == [5]


# ---------------------------------------------------------------------- the end


def test_a_signal_lets_requests_end(reader):
    """Serving from a socket: after SIGTERM a running stream ends as it should, and then serving."""
    engines = []
    engine = fake_engine.Engine(reader, waits_for_gate(engines))
    engines.append(engine)
    engine.start()
    limits = settings.ServeSettings(port=0, drain=5)
    serving = server.Server(engine, models.Models(engine.pool, "base", 64, limits), limits)
    before = signal.getsignal(signal.SIGTERM)
    asking, answers = [], []

    def ask(url):
        host, port = url.removeprefix("http://").split(":")
        asking.append(threading.Thread(target=_ask, args=(host, int(port), engine, answers)))
        asking[0].start()

    run.run(serving, run.bind("127.0.0.1", 0), ask)
    asking[0].join(5)
    engine.close()
    whole, after = answers
    assert b'"content":"a"' in whole and b'"content":"b"' in whole and b"[DONE]" in whole
    assert after is ConnectionRefusedError
    assert signal.getsignal(signal.SIGTERM) is before  # and the process goes on


def _ask(host, port, engine, answers):
    """Streams a chat, sends SIGTERM in the middle, and lets the engine go on."""
    connection = http.client.HTTPConnection(host, port, timeout=10)
    body = json.dumps({"messages": [{"role": "user", "content": "ab"}], "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    whole = b""
    while b'"content":"a"' not in whole:
        whole += answer.read1(1000)
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(200):
        time.sleep(0.02)
        try:
            socket.create_connection((host, port), 1).close()
        except OSError as error:
            refused = type(error)
            break
    engine.gate.set()
    answers += [whole + answer.read(), refused]
    connection.close()


def test_an_address_of_another_machine():
    with pytest.raises(errors.UserError, match=r"--host 192\.0\.2\.1") as raised:
        run.bind("192.0.2.1", 0)
    assert "127.0.0.1" in raised.value.do and "--port" not in raised.value.do


def test_an_address_that_is_taken(serve):
    with run.bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(errors.UserError, match=f"--port {port}"):
            run.bind("127.0.0.1", port)
    # Two servers that load at the same time: the second one to listen cannot.
    with run.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        second = run.bind("127.0.0.1", port)
        first.listen()
        serving = serve(port=port).server
        with pytest.raises(errors.UserError, match=f"--port {port}"):
            run.run(serving, second, lambda url: pytest.fail("it listens"))


def test_an_error_of_the_server_is_no_traceback_for_the_client(serve, monkeypatch, capsys):
    client = serve()
    monkeypatch.setattr(client.engine, "stats", lambda: 1 / 0)

    async def ask():
        arrived = []
        with pytest.raises(ZeroDivisionError):  # which uvicorn logs
            await client.ask("POST", "/v1/completions", b"{}", arrived=arrived)
        return arrived

    start, body = client.run(ask())
    assert start["status"] == 500 and "division" not in body["body"].decode()
    assert "division" in capsys.readouterr().err
