"""Tools and grammars: what the engine is asked for, and what becomes of the text."""

import threading

import fake_engine
import pytest

TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"n": {}}}},
}
TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls }}{% endfor %}"
)
CALL = '<tool_call>{"name": "add", "arguments": {"n": 1}}</tool_call>'


def only(items):
    (item,) = items
    return item


@pytest.fixture
def says(serve, reader, monkeypatch):
    """Makes clients whose model knows tools and says these pieces."""
    monkeypatch.setattr(reader, "chat_template", TEMPLATE)
    return lambda *pieces: serve(fake_engine.saying(*pieces), context=2048)


def test_calls_of_tools(says):
    choice = only(says("ok ", CALL[:15], CALL[15:]).chat(tools=[TOOL]).json["choices"])
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"].strip() == "ok"
    call = only(choice["message"]["tool_calls"])
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "add", "arguments": '{"n": 1}'}


def test_a_call_alone_has_no_content(says):
    message = only(says(CALL).chat(tools=[TOOL]).json["choices"])["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 1


def test_calls_in_events(says):
    events = says("ok ", CALL[:15], CALL[15:], CALL).chat(tools=[TOOL], stream=True).events
    choices = [only(each["choices"]) for each in events]
    deltas = [each["delta"] for each in choices]
    assert "".join(each.get("content", "") for each in deltas).strip() == "ok"
    calls = [call for each in deltas for call in each.get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1] and calls[0]["id"] != calls[1]["id"]
    assert calls[0]["function"]["arguments"] == '{"n": 1}'
    assert [each["finish_reason"] for each in choices if each["finish_reason"]] == ["tool_calls"]


def test_one_call_at_a_time(says):
    choice = says(CALL, CALL).chat(tools=[TOOL], parallel_tool_calls=False).json["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    client = says("ok")
    for parallel in (True, False):
        client.chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=parallel)
    several, one = (each.sampling.grammar for each in client.engine.asked)
    assert several != one


def test_text_is_text_without_tools_or_with_none(says):
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        choice = only(says(CALL).chat(**fields).json["choices"])
        assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"


def test_tools_need_a_template_that_has_them_unless_a_call_is_forced(serve, reader, monkeypatch):
    monkeypatch.setattr(reader, "chat_template", "{{ messages[0].content }}")
    client = serve(context=2048)
    assert client.chat(tools=[TOOL]).error["param"] == "tools"
    assert client.chat(tools=[TOOL], tool_choice="required").status == 200


def test_an_answer_of_a_tool_is_rendered(says):
    client = says("ok")
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"n": 1}'}}
    client.chat(
        messages=[
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ]
    )
    text = client.engine.reader.decode(client.engine.asked[0].prompt)
    assert "add" in text and text.endswith("<tool>2")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        {"structured_outputs": {"regex": "a+"}},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"structured_outputs": {"grammar": 'start: "a"'}},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "response_format": {"type": "json_object"}},
        {"tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}]},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}},
    ],
)
def test_a_grammar_is_asked_for(says, fields):
    client = says("ok")
    client.chat(**fields)
    assert only(client.engine.asked).sampling.grammar
    client.chat(tools=[TOOL])
    assert client.engine.asked[1].sampling.grammar is None


def test_a_forced_call_has_no_text_for_a_response_format(says):
    client = says("ok")
    for more in ({}, {"response_format": {"type": "json_object"}}):
        client.chat(tools=[TOOL], tool_choice="required", **more)
    alone, both = (each.sampling.grammar for each in client.engine.asked)
    assert alone == both


def test_a_grammar_with_an_error_is_the_clients(says):
    for wrong in ("   ", "wrong"):  # which is seen before it is compiled, and by then
        answer = says("ok").chat(structured_outputs={"grammar": wrong})
        assert answer.status == 400 and answer.error["param"] == "structured_outputs.grammar"


def test_a_grammar_is_compiled_while_others_are_answered(says):
    client = says("ok")
    client.chat(structured_outputs={"regex": "a+"})
    grammar, thread = only(client.engine.compiled)
    assert grammar == only(client.engine.asked).sampling.grammar
    assert thread is not threading.current_thread()  # that of the event loop
