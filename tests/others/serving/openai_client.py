"""Asks for everything that OpenAI's client knows, and checks what comes.

python openai_client.py MODEL    # a model with a chat template
"""

import argparse
import json
import sys

import openai
import pydantic
import server

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
ASK = [{"role": "user", "content": "What is the capital of France?"}]


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    size: int = pydantic.Field(ge=0, le=99)


def chat(client, **fields):
    fields = {"messages": ASK, "max_completion_tokens": 12, "temperature": 0, **fields}
    return client.chat.completions.create(model=client.models.list().data[0].id, **fields)


def a_chat(client):
    answer = chat(client)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length") and answer.object == "chat.completion"
    assert answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def a_stream_of_a_chat(client):
    whole = chat(client).choices[0].message.content
    chunks = [*chat(client, stream=True, stream_options={"include_usage": True})]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert whole == "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1]
    assert sum(bool(c.choices and c.choices[0].finish_reason) for c in chunks) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage and not chunks[0].usage
    assert len({c.id for c in chunks}) == 1


def the_helper_for_streams(client):
    model = client.models.list().data[0].id
    with client.chat.completions.stream(
        model=model, messages=ASK, max_completion_tokens=60, temperature=0, n=2, stop=" "
    ) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    assert len(answer.choices) == 2 and answer.choices[0].message.content


def several_choices_with_a_seed(client):
    first = chat(client, n=3, temperature=1, seed=7)
    again = chat(client, n=3, temperature=1, seed=7)
    other = chat(client, n=3, temperature=1, seed=8)
    texts = [[c.message.content for c in a.choices] for a in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and len({*texts[0]}) == 3, texts
    assert [c.index for c in first.choices] == [0, 1, 2]


def logprobs_of_a_chat(client):
    answer = chat(client, logprobs=True, top_logprobs=5)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == 5 and entry.logprob <= 0
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy
    data = bytes(byte for entry in content for byte in entry.bytes).decode()
    assert data.startswith(answer.choices[0].message.content)
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, top_logprobs=5, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert [e.token for e in streamed] == [e.token for e in content]


def completions(client):
    model = client.models.list().data[0].id
    ask = {"model": model, "temperature": 0, "max_tokens": 4}
    answer = client.completions.create(prompt=["One two", "Red green"], **ask)
    assert [c.index for c in answer.choices] == [0, 1]
    echoed = client.completions.create(prompt="One two", echo=True, logprobs=2, **ask)
    (choice,) = echoed.choices
    assert choice.text == "One two" + answer.choices[0].text
    found = choice.logprobs
    assert found.token_logprobs[0] is None and len(found.tokens) == len(found.token_logprobs)
    assert len(found.tokens) == echoed.usage.total_tokens
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        shown = token.lstrip() if offset == 0 else token
        assert choice.text[offset:].startswith(shown) or "<" in token, (token, offset)
    scored = client.completions.create(
        prompt="One two", echo=True, logprobs=1, model=model, max_tokens=0
    )
    assert scored.choices[0].text == "One two"
    assert scored.choices[0].logprobs.token_logprobs == found.token_logprobs[: len(
        scored.choices[0].logprobs.tokens)]  # fmt: skip
    streamed = [*client.completions.create(prompt="One two", stream=True, **ask)]
    assert "".join(c.choices[0].text for c in streamed if c.choices) == answer.choices[0].text
    stop = answer.choices[0].text.strip()[1:3]
    stopped = client.completions.create(prompt="One two", stop=[stop], **ask).choices[0]
    assert stopped.finish_reason == "stop" and stop not in stopped.text
    assert answer.choices[0].text.startswith(stopped.text)


def tools(client):
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = chat(client, tools=TOOLS, tool_choice=choice, max_completion_tokens=80)
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "weather" and call.id and call.type == "function"
        assert [*json.loads(call.function.arguments)] == ["city"]
        assert answer.choices[0].finish_reason == "tool_calls"
    asked = [*ASK, answer.choices[0].message, {
        "role": "tool", "tool_call_id": call.id, "content": "sunny"}]  # fmt: skip
    assert chat(client, messages=asked, tools=TOOLS, tool_choice="none").choices
    chunks = [*chat(
        client, tools=TOOLS, tool_choice="required", max_completion_tokens=80, stream=True
    )]  # fmt: skip
    calls = [c for k in chunks for x in k.choices for c in x.delta.tool_calls or ()]
    assert calls[0].index == 0 and calls[0].function.name == "weather"
    assert json.loads("".join(c.function.arguments or "" for c in calls))


def schemas(client):
    model = client.models.list().data[0].id
    answer = client.chat.completions.parse(
        model=model, messages=ASK, response_format=City, max_completion_tokens=60, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, City)
    answer = chat(client, response_format={"type": "json_object"}, max_completion_tokens=200)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


def responses(client):
    """With pydantic's own checks of the client's types, because the client checks nothing."""
    tool = {"type": "function", **TOOLS[0]["function"]}
    fields = {"model": client.models.list().data[0].id, "input": ASK, "temperature": 0}
    answer = client.responses.create(**fields, max_output_tokens=16)
    text = chat(client, max_completion_tokens=16).choices[0].message.content
    assert answer.output_text == text
    for more in (
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 16},
        {"tools": [tool], "tool_choice": "required", "max_output_tokens": 80},
    ):
        raw = client.responses.with_raw_response.create(**fields, **more)
        pydantic.TypeAdapter(openai.types.responses.Response).validate_json(raw.content)
        with client.responses.with_streaming_response.create(**fields, **more, stream=True) as raw:
            data = [line[6:] for line in raw.iter_lines() if line.startswith("data: ")]
        event = pydantic.TypeAdapter(openai.types.responses.ResponseStreamEvent)
        events = [event.validate_json(each) for each in data]
        assert events[-1].response.output and events[0].type == "response.created"
    (call,) = events[-1].response.output
    assert call.name == "weather" and [*json.loads(call.arguments)] == ["city"]
    asked = [*ASK, call.model_dump(exclude_none=True), {
        "type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]  # fmt: skip
    more = {"tools": [tool], "tool_choice": "none", "max_output_tokens": 16}
    assert client.responses.create(**fields | more | {"input": asked}).output_text
    more = {"text_format": City, "max_output_tokens": 60}
    assert isinstance(client.responses.parse(**fields, **more).output_parsed, City)
    with client.responses.stream(**fields, **more) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, City)
    for refused in ({"store": True}, {"previous_response_id": "resp_1"}):
        try:
            client.responses.create(**fields, **refused)
        except openai.BadRequestError as error:
            assert error.param in refused
        else:
            raise AssertionError(refused)


def the_errors(client):
    def refused(kind, param, **fields):
        try:
            chat(client, **fields)
        except kind as error:
            assert error.param == param and error.body["message"], (error.body, param)
            return
        raise AssertionError(fields)

    refused(openai.BadRequestError, "temperature", temperature=-1)
    refused(openai.BadRequestError, "top_logprobs", logprobs=True, top_logprobs=21)
    refused(openai.BadRequestError, "stream_options", stream_options={"include_usage": True})
    refused(openai.BadRequestError, "messages", messages=[])
    refused(openai.BadRequestError, "messages", messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}])  # fmt: skip
    refused(openai.BadRequestError, "max_tokens", max_completion_tokens=10**6)
    refused(openai.BadRequestError, "audio", extra_body={"audio": {"voice": "x"}})
    try:
        client.chat.completions.create(model="gpt-9", messages=ASK)
    except openai.NotFoundError as error:
        assert error.code == "model_not_found" and "gpt-9" in error.message
    else:
        raise AssertionError


def raw_answers(client):
    model = client.models.list().data[0].id
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=ASK, max_completion_tokens=2
    )
    assert raw.headers["x-request-id"] == raw.parse().id
    assert client.models.retrieve(model).id == model


CHECKS = (a_chat, a_stream_of_a_chat, the_helper_for_streams, several_choices_with_a_seed,
          logprobs_of_a_chat, completions, tools, schemas, responses, the_errors,
          raw_answers)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    with server.running("--model", parser.parse_args().model, "--context", 1024) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        return server.report(client, *CHECKS)


if __name__ == "__main__":
    sys.exit(main())
