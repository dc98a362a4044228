"""Answers of the endpoints, whole and as events, with an engine whose output is known."""

import json

import fake_engine
import pytest

from lora_jax.generation import request
from lora_jax.serving.replies import generating


def only(items):
    (item,) = items
    return item


# ---------------------------------------------------------------------- whole answers


def test_a_chat(serve):
    client = serve()
    answer = client.chat(temperature=0)
    body = answer.json
    assert answer.status == 200 and answer.headers["x-request-id"] == body["id"]
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
    assert body["model"] == "base" and isinstance(body["created"], int)
    choice = only(body["choices"])
    assert choice["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    asked = only(client.engine.asked)
    text = "<user>ab_<assistant>"
    assert list(asked.prompt) == [
        1,
        *client.engine.reader(text, add_special_tokens=False).input_ids,
    ]
    assert asked.sampling.max_new_tokens == 64 - len(asked.prompt)  # up to the context
    assert body["usage"] == {
        "prompt_tokens": len(asked.prompt),
        "completion_tokens": 2,
        "total_tokens": len(asked.prompt) + 2,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_completion(serve):
    client = serve()
    body = client.complete(max_tokens=5).json
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"
    choice = only(body["choices"])
    assert choice == {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop",
                      "stop_reason": None}  # fmt: skip
    assert only(client.engine.asked).sampling.max_new_tokens == 5


def test_the_paths_without_v1(serve):
    client = serve()
    chat = {"messages": [{"role": "user", "content": "ab"}]}
    for path, fields in (("/completions", {"prompt": "ab"}), ("/chat/completions", chat)):
        answer = client.post(path, **fields)
        assert answer.status == 200 and answer.json["choices"][0]["finish_reason"] == "stop"
    assert client.get("/models").json == client.get("/v1/models").json
    assert client.get("/models/base").json["id"] == "base"


def test_prompts_in_every_form_and_n_choices_of_each(serve):
    client = serve()
    ids = client.post("/tokenize", prompt="ab").json["tokens"]
    body = client.complete(["ab", "cd"], n=2, seed=7).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    first, second, third, fourth = client.engine.asked
    assert first.prompt == second.prompt == tuple(ids) != third.prompt == fourth.prompt
    assert first.sampling.seed == third.sampling.seed == 7
    assert second.sampling.seed == fourth.sampling.seed == generating.seed_of(7, 1) != 7
    assert body["usage"]["prompt_tokens"] == len(first.prompt) + len(third.prompt)  # each once
    assert body["usage"]["completion_tokens"] == 8
    client.complete(ids)
    client.complete([ids, [5]])
    assert [each.prompt for each in client.engine.asked[4:]] == [tuple(ids), tuple(ids), (5,)]


def test_logprobs_of_a_chat(serve):
    body = serve().chat(logprobs=True, top_logprobs=2).json
    first, second = only(body["choices"])["logprobs"]["content"]
    assert first["logprob"] == -0.5 and len(first["top_logprobs"]) == 2
    assert first["top_logprobs"][0] == {name: first[name] for name in ("token", "logprob", "bytes")}
    assert bytes(second["bytes"]).decode() == second["token"]
    content = only(serve().chat(logprobs=True).json["choices"])["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in content] == [[], []]


def test_echo_with_logprobs_as_evaluation_harnesses_ask_for_it(serve):
    client = serve()
    ids = [1, *client.engine.reader(" ab", add_special_tokens=False).input_ids]
    body = client.complete([ids], echo=True, logprobs=1, max_tokens=1).json
    choice = only(body["choices"])
    found = choice["logprobs"]
    count = len(ids) + 1
    assert {len(found[name]) for name in found} == {count}
    assert found["token_logprobs"] == [None] + [-0.5] * (count - 1)
    assert found["top_logprobs"][0] is None
    for value, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True):
        assert value == max(top.values())  # the greedy token is recognized by an equal float
    assert choice["text"] == client.engine.reader.decode(ids, skip_special_tokens=True) + "Hel"
    assert choice["finish_reason"] == "length" and "prompt_logprobs" not in choice


def test_text_offsets_count_characters_of_the_text(serve):
    found = only(serve().complete("abcd", echo=True, logprobs=0).json["choices"])["logprobs"]
    assert found["tokens"][:3] == ["<s>", " ab", "cd"]
    assert found["text_offset"][:4] == [0, 0, 2, 4]  # <s> and SentencePiece's space are not in it
    assert [len(top) for top in found["top_logprobs"][1:]] == [1] * (len(found["tokens"]) - 1)


def test_tokens_that_look_alike_share_the_larger_logprob(serve):
    def script(asked):
        half = [asked_id for asked_id in (200, 201)]  # halves of characters
        top = ((half[0], -0.1), (half[1], -0.2))
        entry = request.Logprob(half[0], -0.1, top)
        yield request.Piece("�", (half[0],), (entry,), "stop")

    found = only(serve(script).complete(logprobs=2).json["choices"])["logprobs"]
    assert found["top_logprobs"] == [{"�": -0.1}] and found["tokens"] == ["�"]
    content = only(serve(script).chat(logprobs=True).json["choices"])["logprobs"]["content"]
    assert content[0]["bytes"] == [200 - 3]  # the byte itself


def test_no_tokens_but_the_prompts_logprobs(serve):
    body = serve().complete("ab", echo=True, logprobs=1, max_tokens=0).json
    choice = only(body["choices"])
    assert choice["text"] == "ab" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["<s>", " ab"]
    assert body["usage"]["completion_tokens"] == 0


def test_logprobs_of_minus_infinity_are_a_number(serve):
    def script(asked):
        entry = request.Logprob(5, float("-inf"), ((6, 0.0), (5, float("-inf"))))
        yield request.Piece("x", (5,), (entry,), "stop")

    content = only(serve(script).chat(logprobs=True, top_logprobs=2).json["choices"])["logprobs"]
    assert content["content"][0]["logprob"] == -9999.0


def test_extensions_of_vllm(serve):
    client = serve()
    body = client.complete("ab", return_token_ids=True, prompt_logprobs=1).json
    choice = only(body["choices"])
    asked = only(client.engine.asked)
    assert choice["prompt_token_ids"] == list(asked.prompt)
    assert choice["token_ids"] == [asked.prompt[-1], asked.prompt[-1] + 1]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second == {str(asked.prompt[1]): {"logprob": -0.5, "rank": 1, "decoded_token": " ab"}}
    chat = client.chat(return_token_ids=True, prompt_logprobs=0).json
    assert chat["prompt_token_ids"] == list(client.engine.asked[1].prompt)
    assert len(chat["prompt_logprobs"]) == len(chat["prompt_token_ids"])
    named = client.complete("ab", logprobs=0, return_tokens_as_token_ids=True).json
    assert only(named["choices"])["logprobs"]["tokens"][0] == f"token_id:{asked.prompt[-1]}"


def test_the_reason_to_stop(serve):
    def script(_):
        yield request.Piece("x", (5,), (), "stop", "END")

    assert only(serve(script).chat().json["choices"])["stop_reason"] == "END"


def test_a_completion_has_sixteen_tokens_or_what_the_context_has_room_for(serve):
    client = serve(context=20)
    client.complete([5, 5])
    client.complete([5] * 15)
    client.complete([5, 5], max_tokens=18)
    assert [each.sampling.max_new_tokens for each in client.engine.asked] == [16, 5, 18]


# ---------------------------------------------------------------------- streams


def test_a_chat_in_events(serve):
    client = serve()
    answer = client.chat(stream=True, n=3, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, usage = answer.events
    assert {(each["object"], each["id"]) for each in (*events, usage)} == {
        ("chat.completion.chunk", answer.headers["x-request-id"])
    }
    for index in range(3):
        own = [only(e["choices"]) for e in events if only(e["choices"])["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(each["delta"].get("content", "") for each in own) == "Hello"
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + ["stop"]
        assert own[-1]["delta"] == {}
    assert all(each["usage"] is None for each in events)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 6


def test_a_completion_in_events(serve):
    events = serve().complete("ab", stream=True, echo=True, logprobs=1).events
    choices = [only(each["choices"]) for each in events]
    assert "".join(each["text"] for each in choices) == "abHello"
    assert choices[0]["text"] == "ab" and choices[0]["logprobs"]["token_logprobs"] == [None, -0.5]
    assert [each["finish_reason"] for each in choices].count("stop") == 1
    assert choices[-1]["finish_reason"] == "stop"
    offsets = [n for each in choices for n in each["logprobs"]["text_offset"]]
    assert offsets == sorted(offsets) and offsets[:3] == [0, 0, 2]
    assert not any("usage" in each for each in events)


def test_usage_in_every_event(serve):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = serve().chat(stream=True, stream_options=options).events
    assert events[-1]["usage"] == last["usage"] and last["usage"]["completion_tokens"] == 2


def test_a_stream_and_a_whole_answer_have_the_same_logprobs(serve):
    client = serve(fake_engine.saying("a", "", "b", "c"))
    whole = only(client.chat(logprobs=True, top_logprobs=3).json["choices"])["logprobs"]["content"]
    events = client.chat(logprobs=True, top_logprobs=3, stream=True).events
    parts = [only(each["choices"])["logprobs"] for each in events]
    assert [entry for part in parts if part for entry in part["content"]] == whole
    assert len(whole) == 4


def test_an_error_of_the_engine(serve):
    def script(_):
        yield request.Piece("x", (5,))
        yield request.Piece(finish_reason="error", error="out of memory")

    client = serve(script)
    answer = client.chat()
    assert answer.status == 500 and answer.error["message"] == "out of memory"
    assert answer.headers["x-should-retry"] == "false"
    users = request.Piece(finish_reason="error", error="grammar: too complex", is_users=True)
    assert serve(lambda _: iter([users])).chat().error["type"] == "invalid_request_error"
    streamed = client.chat(stream=True)
    last = streamed.body.decode().strip().split("\n\n")[-1]
    assert streamed.status == 200
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "out of memory"


# ---------------------------------------------------------------------- prompts


def prompt_text(client):
    return client.engine.reader.decode(client.engine.asked[-1].prompt)


def test_the_ids_of_a_chat_are_those_of_the_template(serve):
    client = serve()
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "be"}]},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "cd"},
    ]
    plain = [{**messages[0], "content": "be"}, *messages[1:]]
    expected = client.engine.reader.apply_chat_template(
        plain, add_generation_prompt=True, return_dict=True
    )
    client.chat(messages=messages)
    assert list(client.engine.asked[-1].prompt) == expected["input_ids"]
    client.chat(messages=messages, add_generation_prompt=False)
    assert "<assistant>cd_" in prompt_text(client)
    client.chat(messages=messages, continue_final_message=True)
    assert prompt_text(client).endswith("<assistant>cd")
    client.chat(messages=[*messages[:2], {"role": "assistant", "content": None}])
    assert prompt_text(client).endswith("<assistant><assistant>")
    refused = (
        {"content": None, "refusal": "cd"},
        {"content": [{"type": "refusal", "refusal": "cd"}]},
    )
    for each in refused:  # as OpenAI's models do
        client.chat(messages=[*messages[:2], {"role": "assistant", **each}])
        assert prompt_text(client).endswith("<assistant>cd<assistant>")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user"}, "has no content"),
        ({"content": "ab"}, "has no role"),
        ({"role": "robot", "content": "ab"}, "unknown role 'robot'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "image_url"),
        ({"role": "user", "content": 5}, "not text"),
        ("ab", "not an object"),
    ],
)
def test_a_message_that_cannot_be_rendered(serve, message, said):
    error = serve().chat(messages=[message]).error
    assert error["param"] == "messages" and said in error["message"]


def test_what_is_the_templates_own_cannot_be_given(serve):
    client = serve()
    for name in ("chat_template", "tokenize", "tools", "continue_final_message"):
        error = client.chat(chat_template_kwargs={name: "x"}).error
        assert error["param"] == "chat_template_kwargs" and name in error["message"]
    assert client.chat(chat_template_kwargs={"enable_thinking": False}).status == 200
    assert client.chat(reasoning_effort="low").error["param"] == "reasoning_effort"


def test_a_prompt_is_cut_from_the_left(serve):
    client = serve(context=16)
    client.complete("abcdabcdabcd", truncate_prompt_tokens=3)
    whole = client.post("/tokenize", prompt="abcdabcdabcd").json["tokens"]
    assert list(client.engine.asked[-1].prompt) == whole[-3:]
    client.complete("ab" + "cdab" * 5000, truncate_prompt_tokens=3)  # of which the end is encoded
    assert list(client.engine.asked[-1].prompt) == [whole[-2], whole[-3], whole[-2]]
    assert client.complete([5] * 40).error["code"] == "context_length_exceeded"
    assert "characters" in client.complete("ab" * 5000).error["message"]  # not encoded
    client.complete([5] * 40, truncate_prompt_tokens=-1, max_tokens=1)
    assert len(client.engine.asked[-1].prompt) == 15


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [5] * 30, "max_tokens": 5}, "max_tokens"),
        ({"prompt": [5] * 32}, "prompt"),
        ({"prompt": "", "add_special_tokens": False}, "prompt"),
        ({"prompt": [5], "min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"prompt": [10**6]}, "prompt"),
    ],
)
def test_what_the_context_has_no_room_for(serve, fields, param):
    answer = serve(context=32).post("/v1/completions", **fields)
    assert answer.status == 400 and answer.error["param"] == param
    assert answer.error["type"] == "invalid_request_error"


def test_tokenize_and_detokenize(serve):
    client = serve()
    found = client.post("/tokenize", prompt="abcd", return_token_strs=True).json
    assert found["token_strs"] == ["<s>", " ab", "cd"] and found["count"] == 3
    assert found["max_model_len"] == 64
    bare = client.post("/tokenize", prompt="abcd", add_special_tokens=False).json
    assert bare["tokens"] == found["tokens"][1:] and bare["token_strs"] is None
    chat = client.post("/tokenize", messages=[{"role": "user", "content": "ab"}]).json
    client.chat("ab")
    assert chat["tokens"] == list(client.engine.asked[-1].prompt)
    assert client.post("/detokenize", tokens=found["tokens"]).json == {"prompt": "<s> abcd"}
    assert client.post("/detokenize", tokens=[]).json == {"prompt": ""}
    unknown = [len(client.engine.reader)]
    assert client.post("/detokenize", tokens=unknown).error["param"] == "tokens"
    assert client.post("/detokenize", tokens=["a"]).error["param"] == "tokens"
    assert client.post("/detokenize").error["param"] == "tokens"
    assert client.post("/tokenize").error["param"] == "prompt"
    assert client.post("/tokenize", prompt="ab", model="x").status == 404
    info = client.get("/tokenizer_info").json
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>") and info["chat_template"]


def test_a_model_without_a_chat_template(serve, reader, monkeypatch):
    monkeypatch.setattr(reader, "chat_template", None)
    error = serve().chat().error
    assert "no chat template" in error["message"] and error["type"] == "invalid_request_error"


# ---------------------------------------------------------------------- the rest


def test_health_version_metrics(serve):
    client = serve(adapters=("a",))
    client.chat(model="a")
    client.complete(temperature=-1)
    assert client.get("/health").status == client.get("/ping").status == 200
    assert client.post("/ping").status == 200
    assert client.get("/version").json["version"]
    client.engine.failure = "the device is lost"
    assert client.get("/health").status == 503
    text = client.get("/metrics").body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values["lora_jax_generation_tokens_total"] == "2"
    assert values['lora_jax_http_responses_total{status="400"}'] == "1"
    assert values['lora_jax_choices_total{reason="stop"}'] == "1"
    assert values['lora_jax_time_to_first_token_seconds_bucket{le="+Inf"}'] == "1"
    assert values["lora_jax_slots"] == "2" and values["lora_jax_adapters_loaded"] == "1"
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


def test_other_paths_and_methods(serve):
    client = serve()
    assert client.get("/v1/nothing").status == 404
    assert "/v1/chat/completions" in client.post("/v1/embeddings", input="ab").error["message"]
    assert client.get("/v1/nothing").error["type"] == "not_found_error"
    assert client.get("/v1/chat/completions").status == 405
    assert client.get("/v1/chat/completions").error
