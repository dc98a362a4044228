"""Bodies as programs send them that many people use: each is answered, none is refused.

Abridged. Those of the AI SDK, AutoGen, Cline, Codex, Continue, Dify, LangChain.js, LobeChat, Open
WebUI and SillyTavern follow their sources; the others are reconstructed from what the programs do.
"""

import json

import pytest

USER = [{"role": "user", "content": "ab"}]
SYSTEM = [{"role": "system", "content": "be brief"}, *USER]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "ab"}]}]
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Where"}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "The weather", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Milan"}'},
}
CALLED = [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}

CHATS = {
    "Open WebUI": {"messages": SYSTEM, **USAGE},
    "Open WebUI, a title": {
        "messages": USER, "stream": False, "max_completion_tokens": 1000,
    },
    "Open WebUI, its parameters": {
        "messages": USER, **USAGE, "temperature": 0.8, "top_p": 0.9, "min_p": 0.0, "seed": 0,
        "stop": ["END"], "frequency_penalty": 1.1, "presence_penalty": 0.0, "max_tokens": 128,
        "logit_bias": {"7": -100},
    },
    "LibreChat": {
        "messages": PARTS, **USAGE, "temperature": 1, "top_p": 1, "presence_penalty": 0,
        "frequency_penalty": 0, "user": "68906998cc83815dd7244885",
    },
    "Continue": {
        "messages": [*USER, {"role": "assistant", "content": " "}, *USER], "max_tokens": 2048,
        "stream": True, "stop": ["<fim_prefix>", "<fim_suffix>", "<|endoftext|>", "/src/", "```"],
    },
    "aider by litellm": {
        "messages": [
            {"role": "system", "content": [
                {"type": "text", "text": "ab", "cache_control": {"type": "ephemeral"}}]},
            *USER, {"role": "assistant", "content": "Ok."}, *USER],
        "temperature": 0, "stream": True,
    },
    "Cline": {"messages": [SYSTEM[0], *PARTS], "temperature": 0, **USAGE},
    "Cline, a reasoning model": {
        "messages": [{"role": "developer", "content": "be brief"}, *PARTS], **USAGE,
    },
    "LobeChat": {
        "messages": SYSTEM, **USAGE, "temperature": 1, "top_p": 1, "frequency_penalty": 0,
        "presence_penalty": 0, "user": "u1", "tools": TOOLS,
    },
    "n8n by LangChain.js": {
        "messages": SYSTEM, "temperature": 0.7, "n": 1, "stream": False, "tools": TOOLS,
        "parallel_tool_calls": True,
    },
    "AI SDK": {
        "messages": [*CALLED[:-1], {"role": "assistant", "content": "", "tool_calls": [CALL]},
                     {**RESULT, "content": '{"sky":"clear"}'}],
        "temperature": 0, "tools": TOOLS, "tool_choice": "auto", "stream": True,
    },
    "AI SDK, after thoughts": {
        "messages": [*USER, {"role": "assistant", "content": "cd", "reasoning_content": "hm"},
                     *USER],
    },
    "AI SDK, an object": {
        "messages": SYSTEM,
        "response_format": {"type": "json_schema", "json_schema": {
            "schema": SCHEMA, "strict": True, "name": "response"}},
    },
    "LlamaIndex": {"messages": USER, "temperature": 0.1, "stream": False, "max_tokens": None},
    "LlamaIndex, a call": {
        "messages": USER,
        "tools": [{"type": "function", "function": {**FUNCTION, "strict": False}}],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "parallel_tool_calls": False,
    },
    "Haystack": {"messages": [{**SYSTEM[0], "name": None}, *USER], "n": 1, "stream": False},
    "DSPy": {
        "messages": SYSTEM, "temperature": 0.0, "max_tokens": 4000,
        "response_format": {"type": "json_schema", "json_schema": {
            "name": "DSPyProgramOutputs", "strict": True, "schema": {
                "title": "DSPyProgramOutputs", "type": "object", "additionalProperties": False,
                "properties": {"answer": {"title": "Answer", "type": "string"}},
                "required": ["answer"]}}},
    },
    "AutoGen": {
        "messages": [SYSTEM[0], {**USER[0], "name": "user"},
                     {"role": "assistant", "content": "cd", "name": "helper"},
                     {**CALLED[1], "name": "helper"}, RESULT],
        "stream": False, "tools": [{"type": "function", "function": {**FUNCTION, "strict": False}}],
    },
    "CrewAI": {"messages": SYSTEM, "stop": ["\nObservation:"]},
    "Semantic Kernel": {
        "messages": SYSTEM, **USAGE, "tools": TOOLS, "tool_choice": "auto",
        "max_completion_tokens": 256, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0,
    },
    "LangChain4j": {
        "messages": USER, "temperature": 0.7, "stream": False,
        "response_format": {"type": "json_object"},
    },
    "Zed": {
        "messages": PARTS, "stream": True, "stop": [], "temperature": 1.0, "tools": [],
        "max_completion_tokens": 512, "parallel_tool_calls": False, "prompt_cache_key": "thread-1",
    },
    "OpenHands": {
        "messages": [*CALLED, {**RESULT, "name": "get_weather",
                               "content": [{"type": "text", "text": "sunny"}]}],
        "tools": TOOLS, "temperature": 0.0, "max_completion_tokens": 1024, "seed": None,
    },
    "smolagents": {"messages": PARTS, "stop": ["Observation:", "Calling tools:"]},
    "AnythingLLM": {"messages": [SYSTEM[0], *PARTS], "stream": True, "temperature": 0.7,
                    "max_tokens": 1024},
    "Dify": {
        "messages": SYSTEM, "stream": True, "user": "u1", "stop": ["Observation"],
        "tool_choice": "auto", "tools": TOOLS, "enable_thinking": False,
    },
    "Copilot with an own key": {
        "messages": SYSTEM, "temperature": 0.1, "top_p": 1, "max_tokens": 1024, "n": 1, **USAGE,
        "intent": False, "tools": TOOLS, "tool_choice": "auto",
    },
    "a model that thinks, told not to": {
        "messages": USER, "reasoning_effort": "none",
        "chat_template_kwargs": {"enable_thinking": False},
    },
}  # fmt: skip
COMPLETIONS = {
    "Continue, while typing": {
        "prompt": "<fim_prefix>ab<fim_suffix>cd<fim_middle>", "max_tokens": 1024,
        "temperature": 0.01, "stream": True, "stop": ["<|endoftext|>", "\n\n", "/src/", "```"],
    },
    "LlamaIndex": {"prompt": "ab", "temperature": 0.1, "max_tokens": 256, "stream": False},
    "SillyTavern": {
        "prompt": "ab", "max_new_tokens": 250, "max_tokens": 250, "temperature": 1, "top_p": 1,
        "typical_p": 1, "typical": 1, "sampler_seed": -1, "seed": -1, "min_p": 0.1, "top_k": -1,
        "repetition_penalty": 1.1, "repeat_penalty": 1.1, "repeat_last_n": -1, "n_predict": 250,
        "frequency_penalty": 0, "presence_penalty": 0, "min_tokens": 0, "length_penalty": 1,
        "early_stopping": False, "add_bos_token": True,
        "smoothing_factor": 0, "smoothing_curve": 1, "dry_multiplier": 0, "dry_base": 1.75,
        "xtc_probability": 0, "n": 1, "ignore_eos": False, "stream": True,
        "spaces_between_special_tokens": True, "truncation_length": 4096, "ban_eos_token": False,
        "skip_special_tokens": True, "top_a": 0, "tfs": 1, "mirostat_mode": 0, "grammar": "",
        "stopping_strings": ["\nUser:"], "stop": ["\nUser:"], "logit_bias": {},
        "dynatemp_range": 0, "custom_token_bans": "", "banned_strings": [],
    },
    "Open WebUI, the rest of a line": {"prompt": "ab", "stream": False, "max_tokens": 50},
}  # fmt: skip
RESPONSES = {
    "Codex": {
        "instructions": "be brief",
        "input": [
            {"type": "message", "role": "developer",
             "content": [{"type": "input_text", "text": "ab"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "cd"}]}],
        "tools": [{"type": "function", "name": "shell", "description": "Runs a command",
                   "strict": False, "parameters": {"type": "object", "properties": {
                       "command": {"type": "array", "items": {"type": "string"}}},
                       "required": ["command"], "additionalProperties": False}}],
        "tool_choice": "auto", "parallel_tool_calls": False, "reasoning": None, "store": False,
        "stream": True, "include": [], "prompt_cache_key": "0199-ab",
    },
    "Home Assistant": {
        "input": [{"type": "message", "role": "developer", "content": "be brief"},
                  {"type": "message", "role": "user", "content": "ab"}],
        "max_output_tokens": 512, "top_p": 1.0, "temperature": 1.0, "user": "01J", "store": False,
        "stream": True,
    },
    "OpenAI Agents SDK": {
        "input": USER, "instructions": "be brief", "include": [],
        "tools": [{**FUNCTION, "type": "function", "strict": True}],
    },
}  # fmt: skip
BODIES = [
    *(pytest.param("/v1/chat/completions", body, id=name) for name, body in CHATS.items()),
    *(pytest.param("/v1/completions", body, id=name) for name, body in COMPLETIONS.items()),
    *(pytest.param("/v1/responses", body, id=name) for name, body in RESPONSES.items()),
]
HEADERS = {
    "accept": "*/*", "accept-charset": "utf-8", "api-key": "none", "authorization": "Bearer none",
    "content-type": "application/json; charset=utf-8", "http-referer": "https://app.example",
    "x-stainless-lang": "js", "x-stainless-retry-count": "0", "x-title": "app",
}  # fmt: skip


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_it_is_answered(serve, path, body):
    client = serve(context=8192)
    answer = client.post(path, headers=HEADERS, model="base", **body)
    assert answer.status == 200, answer.error
    if not body.get("stream"):
        assert "Hel" in json.dumps(answer.json)
    elif path.endswith("responses"):
        assert answer.body.count(b"event: response.completed") == 1
    else:
        ends = [each["finish_reason"] for event in answer.events for each in event["choices"]]
        assert ends[-1] == "stop" and not any(ends[:-1])
