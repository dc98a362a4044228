"""/v1/responses: the chat that is asked, the object, and the events of its stream."""

import json

import fake_engine
import pytest

from lora_jax.generation import request
from lora_jax.serving import refusal
from lora_jax.serving.requests import protocol, responses_body

TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"n": {}}}},
}
CALL = '<tool_call>{"name": "add", "arguments": {"n": 1}}</tool_call>'
FUNCTION = {"type": "function", **TOOL["function"]}


def respond(client, **fields):
    return client.post("/v1/responses", **({"input": "ab"} | fields))


def events(answer):
    frames = [each.split("\n", 1) for each in answer.body.decode().strip().split("\n\n")]
    found = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [kind.removeprefix("event: ") for kind, _ in frames] == [e["type"] for e in found]
    assert [each["sequence_number"] for each in found] == [*range(len(found))]
    return found


def test_a_response(serve):
    client = serve()
    answer = respond(client, temperature=0, instructions="cd", max_output_tokens=9)
    body = answer.json
    assert answer.status == 200 and answer.headers["x-request-id"] == body["id"]
    assert body["object"] == "response" and body["status"] == "completed"
    assert (body["model"], body["temperature"], body["top_p"]) == ("base", 0, 1)
    assert body["store"] is False and body["instructions"] == "cd"
    (item,) = body["output"]
    (part,) = item["content"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert (part["type"], part["text"]) == ("output_text", "Hello")
    (asked,) = client.engine.asked
    assert client.engine.reader.decode(asked.prompt) == "<s> <system>cd_<user>ab_<assistant>"
    assert asked.sampling.max_new_tokens == 9
    usage = body["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (len(asked.prompt), 2)


def test_a_response_in_events(serve):
    answer = respond(serve(), stream=True, include=["message.output_text.logprobs"], top_logprobs=1)
    found = events(answer)
    kinds = [each["type"].removeprefix("response.") for each in found]
    assert [*dict.fromkeys(kinds)] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert found[0]["response"]["output"] == found[2]["item"]["content"] == []
    deltas = [each for each in found if each["type"].endswith(".delta")]
    assert "".join(each["delta"] for each in deltas) == "Hello"
    last = found[-1]["response"]
    part = last["output"][0]["content"][0]
    assert part == found[-3]["part"] and part["text"] == "Hello"
    assert part["logprobs"] == [entry for each in deltas for entry in each["logprobs"]]
    assert len(part["logprobs"]) == 2 and last["usage"]["output_tokens"] == 2


def test_a_response_that_is_cut(serve):
    client = serve(fake_engine.saying("Hel", "lo", "!"))
    for stream in (False, True):
        answer = respond(client, max_output_tokens=2, stream=stream)
        body = events(answer)[-1]["response"] if stream else answer.json
        assert body["status"] == body["output"][0]["status"] == "incomplete"
        assert body["incomplete_details"] == {"reason": "max_output_tokens"}


def test_calls_in_a_response(serve, reader, monkeypatch):
    monkeypatch.setattr(reader, "chat_template", "{{ tools }}<tool_call>")
    client = serve(fake_engine.saying("ok", CALL), context=2048)
    whole = respond(client, tools=[FUNCTION]).json["output"]
    found = events(respond(client, tools=[FUNCTION], stream=True))
    for message, call in (whole, found[-1]["response"]["output"]):
        assert message["content"][0]["text"] == "ok"
        assert (call["type"], call["name"], call["status"]) == ("function_call", "add", "completed")
        assert json.loads(call["arguments"]) == {"n": 1}
    done = [each for each in found if each["type"] == "response.output_item.done"]
    assert [each["output_index"] for each in done] == [0, 1]
    alone, asked = serve(fake_engine.saying(*CALL), context=2048), {"top_logprobs": 1}
    found = events(respond(alone, tools=[FUNCTION], stream=True, **asked))
    (call,) = found[-1]["response"]["output"]  # and no message of the log-probabilities alone
    assert call["type"] == "function_call"
    named = {"type": "function", "name": "add"}
    respond(client, tools=[FUNCTION], tool_choice=named)
    assert '"add' in client.engine.asked[-1].sampling.grammar.replace("\\", "")


def test_an_error_of_the_engine(serve):
    def script(_):
        yield request.Piece("x", (5,))
        yield request.Piece(finish_reason="error", error="out of memory")

    client = serve(script)
    assert respond(client).status == 500
    *_, failed, error = events(respond(client, stream=True))
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["message"] == error["error"]["message"] == "out of memory"


def test_items_of_the_input_are_messages():
    text = [{"type": "input_text", "text": "a"}]
    call = {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"}
    chat = responses_body.read({"input": [
        {"role": "user", "content": text},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        call,
        {**call, "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "3"},
    ]})  # fmt: skip
    user, assistant, tool = chat.messages
    assert user == {"role": "user", "content": [{"type": "text", "text": "a"}]}
    assert assistant["content"] == [{"type": "text", "text": "b"}]
    assert [each["id"] for each in assistant["tool_calls"]] == ["1", "2"]
    assert tool == {"role": "tool", "tool_call_id": "1", "content": "3"}


def test_a_response_is_asked_as_a_chat_is():
    schema = {"type": "object", "properties": {}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [
        {"type": "function", "name": "add"}]}  # fmt: skip
    own = responses_body.read({
        "input": "a", "text": {"format": form}, "max_output_tokens": 5, "top_p": 0.5, "top_k": 3,
        "tools": [FUNCTION, {**FUNCTION, "name": "b"}], "tool_choice": allowed,
        "reasoning": {"effort": None}, "store": False, "include": ["reasoning.encrypted_content"],
    })  # fmt: skip
    messages = [{"role": "user", "content": "a"}]
    assert own == protocol.chat({
        "messages": messages, "max_tokens": 5, "top_p": 0.5, "top_k": 3, "tools": [TOOL],
        "tool_choice": "required",
        "response_format": {"type": "json_schema", "json_schema": {
            "type": "json_schema", "name": "x", "schema": schema, "strict": True}},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": {"id": "c"}}, "conversation"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "verbosity"),
        ({"text": "json"}, "text"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tool_choice": {"type": "function", "name": "b"}, "tools": [FUNCTION]}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5]}, "input.0"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input.0"),
        ({"instructions": 5}, "instructions"),
    ],
)
def test_what_cannot_be_done_is_refused(given, param):
    with pytest.raises(refusal.Refusal) as raised:
        responses_body.read({"input": "a", **given})
    assert raised.value.status == 400 and raised.value.param == param


def test_errors_have_the_names_of_the_request(serve):
    client = serve(context=48)
    image = [{"type": "input_image", "image_url": "file:///etc/passwd"}]
    for fields, param in (
        ({"input": [{"role": "user", "content": image}]}, "input"),
        ({"input": "a" * 5000}, "input"),
        ({"max_output_tokens": 48}, "max_output_tokens"),
    ):
        error = respond(client, **fields).error
        assert error["param"] == param and "messages" not in error["message"]
