"""Bodies of requests: what each field means, and what is refused."""

import json

import pytest

from lora_jax.generation import config
from lora_jax.serving import refusal
from lora_jax.serving.requests import fields, protocol

MESSAGES = [{"role": "user", "content": "ab"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "f"}}


OTHER = {"type": "function", "function": {"name": "g"}}


def allowed(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def chat(**given):
    return protocol.chat({"messages": MESSAGES, **given})


def completion(**given):
    return protocol.completion({"prompt": "ab", **given})


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({}, {"temperature": 1.0, "top_p": 1.0, "seed": None, "logprobs": None}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": None}, {"temperature": 1.0}),
        ({"top_p": 0.5, "top_k": 7, "min_p": 0.1}, {"top_p": 0.5, "top_k": 7, "min_p": 0.1}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_p": 0}, {"top_k": 1, "top_p": 1.0}),  # the most likely token alone
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"presence_penalty": -2, "frequency_penalty": 2.0},
         {"presence_penalty": -2.0, "frequency_penalty": 2.0}),
        ({"logit_bias": {"5": -100, "7": 0.5}}, {"logit_bias": ((5, -100.0), (7, 0.5))}),
        ({"seed": 7}, {"seed": 7}),
        ({"seed": 7.0}, {"seed": 7}),
        ({"seed": -1}, {"seed": None}),  # as in vLLM and llama.cpp
        ({"seed": -2}, {"seed": 2**63 - 2}),  # an engine's seeds are not negative
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": ["x", "y", "x"]}, {"stop": ("x", "y")}),
        ({"stop": []}, {"stop": ()}),
        ({"stop_token_ids": [3, 4]}, {"stop_token_ids": (3, 4)}),
        ({"min_tokens": 2, "ignore_eos": True}, {"min_tokens": 2, "ignore_eos": True}),
        ({"include_stop_str_in_output": True}, {"include_stop": True}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
        ({"prompt_logprobs": 3}, {"prompt_logprobs": 3}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("read", [chat, completion])
def test_fields_of_sampling(read, given, setting):
    sampling = read(**given).asked.sampling
    assert {name: getattr(sampling, name) for name in setting} == setting


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": 1e39}, "temperature"),  # none of float32
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x", ""]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"stop_token_ids": [*range(33)]}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"model": 5}, "model"),
        ({"adapters": "path"}, "adapters"),
        ({"adapters": {"a": "1"}}, "adapters"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": 3}}, "response_format"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        ({"guided_choice": []}, "guided_choice"),
        # Known, and not to be honoured.
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"repeat_penalty": 1.1}, "repeat_penalty"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repeat_penalty"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"max_new_tokens": 5, "max_tokens": 6}, "max_new_tokens"),
        ({"typical_p": 0.9}, "typical_p"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"lora": [{"id": 0, "scale": 1}]}, "lora"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"store": True}, "store"),
        ({"suffix": "x"}, "suffix"),
    ],
)
@pytest.mark.parametrize("read", [chat, completion])
def test_what_is_wrong_is_named(read, given, param):
    with pytest.raises(refusal.Refusal) as refused:
        read(**given)
    assert refused.value.status == 400 and refused.value.param == param
    assert param in refused.value.message


@pytest.mark.parametrize("read", [chat, completion])
def test_all_problems_are_in_one_message(read):
    with pytest.raises(refusal.Refusal) as refused:
        read(temperature=-1, top_p=3, stop=[""], mirostat=2)
    for name in ("temperature", "top_p", "stop", "mirostat"):
        assert f"{name}: " in refused.value.message


@pytest.mark.parametrize("read", [chat, completion])
def test_unknown_and_neutral_fields_are_taken(read):
    read(
        user="me", metadata={"a": "b"}, foo=[1], repeat_penalty=1.0, use_beam_search=False,
        best_of=None, store=False, mirostat=0, typical_p=1, service_tier="flex", suffix="",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "most"),
    [({}, None), ({"max_tokens": 5}, 5), ({"max_completion_tokens": 6, "max_tokens": 5}, 6)],
)
def test_the_length_of_a_chats_answer(given, most):
    assert chat(**given).asked.max_tokens == most


def test_a_completion_may_have_no_tokens():
    assert completion(max_tokens=0, echo=True).asked.max_tokens == 0
    with pytest.raises(refusal.Refusal, match="max_tokens: 0 is below 1"):
        chat(max_tokens=0)


@pytest.mark.parametrize(
    ("given", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, config.MOST_LOGPROBS),
    ],
)
def test_logprobs_of_a_chat(given, logprobs):
    assert chat(**given).asked.sampling.logprobs == logprobs


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "ab"}, "messages"),
        ({"messages": None}, "messages"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"echo": True}, "echo"),
        ({"tools": ["f"]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools.0"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"tools": [TOOL], "tool_choice": allowed("any", "f")}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": allowed("auto")}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": allowed("auto", "f", "g")}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"add_generation_prompt": True, "continue_final_message": True},
         "continue_final_message"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_chat_is_named(given, param):
    with pytest.raises(refusal.Refusal) as refused:
        chat(**given)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        ({}, "none"),
        ({"tools": []}, "none"),
        ({"tools": [TOOL]}, "auto"),
        ({"tools": [TOOL], "tool_choice": "none"}, "none"),
        ({"tools": [TOOL], "tool_choice": "required"}, "required"),
        ({"tools": [TOOL], "tool_choice": NAMED}, NAMED),
        ({"tool_choice": "auto"}, "none"),
    ],
)
def test_the_choice_of_a_tool(given, choice):
    assert chat(**given).tool_choice == choice


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_the_allowed_tools_are_left(mode):
    read = chat(tools=[TOOL, OTHER], tool_choice=allowed(mode, "g"))
    assert (read.tools, read.tool_choice) == ([OTHER], mode)


def test_tools_go_with_a_response_format():
    read = chat(tools=[TOOL], response_format={"type": "json_object"})
    assert read.tool_choice == "auto" and read.asked.structure.kind == "json_object"


@pytest.mark.parametrize(
    ("given", "kind", "value", "strict"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", None, True),
        ({"response_format": {"type": "json_object", "schema": {"type": "null"}}}, "json",
         {"type": "null"}, False),
        ({"response_format": {"type": "json_schema", "schema": {"type": "null"}}}, "json",
         {"type": "null"}, False),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "object"}}}}, "json", {"type": "object"}, False),
        ({"response_format": {"type": "json_schema", "json_schema": {"strict": True, "schema": {
            }}}}, "json", {}, True),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+", False),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ["a", "b"], False),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, "json", {"type": "null"}, False),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"', False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("read", [chat, completion])
def test_what_a_text_must_follow(read, given, kind, value, strict):
    found = read(**given).asked.structure
    assert (found.kind, found.value, found.strict) == (kind, value, strict)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"structured_outputs": {}},
    ],
)
def test_a_text_is_free_by_default(given):
    assert chat(**given).asked.structure is None


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("ab", ["ab"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_prompts_of_a_completion(prompt, read):
    assert completion(prompt=prompt).prompts == read


@pytest.mark.parametrize(
    "prompt", [None, [], [[]], [5, "a"], [["a"]], [True], [-1], [5.0], {"a": 1}, [2**31]]
)
def test_a_prompt_of_another_kind_is_refused(prompt):
    with pytest.raises(refusal.Refusal, match="prompt: expected a string"):
        completion(prompt=prompt)


def test_echoed_logprobs_are_those_of_the_prompt_too():
    asked = completion(echo=True, logprobs=3).asked
    assert (asked.sampling.logprobs, asked.sampling.prompt_logprobs) == (3, 3)
    assert asked.prompt_logprobs is None  # vLLM's own form was not asked for
    assert completion(echo=True).asked.sampling.prompt_logprobs is None
    assert completion(logprobs=3).asked.sampling.prompt_logprobs is None
    assert completion(logprobs=False).asked.sampling.logprobs is None
    assert completion(best_of=2, n=2).asked.n == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "an array, not a JSON object"),
        (b"5", "a number, not a JSON object"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": ' + b"[" * 10**5, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        (rb'{"a": "\ud800"}', "half a character"),
        ('{"a": "\ud800"}'.encode("utf-8", "surrogatepass"), "can't decode byte"),
        ('{"a": "\ud800"}'.encode("utf-16", "surrogatepass"), "surrogate"),
    ],
)
def test_a_body_that_is_no_object_is_refused(body, message):
    with pytest.raises(refusal.Refusal, match=message):
        fields.parse(body)


def test_a_body_may_have_whole_characters_in_escapes():
    assert fields.parse(rb'{"a": "\ud83d\ude00"}') == {"a": "\U0001f600"}
    assert fields.parse(json.dumps({"a": {"b": [1.5, None]}}).encode()) == {"a": {"b": [1.5, None]}}
