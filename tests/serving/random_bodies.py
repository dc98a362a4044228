"""Random bodies of requests: fields that an endpoint knows, with values that fit or do not."""

import copy
import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

numbers = st.one_of(
    st.integers(-2, 40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([-(2**63), 2**31, 2**63, 10**30, 10**400, 1e308, -1e308, 5e-324, -0.0]),
)
texts = st.text(max_size=6) | st.sampled_from(
    ["", "ab", "a", "base", "one", "\x00", "\ufffd", "𝒜", "e\u0301", "</s>", "<s>", "..", "/", "{",
     "function", "assistant", "\ud800"]
)  # fmt: skip
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def fits(draw: st.DrawFn, *choices: Any) -> Any:
    """Values that a field takes, and one time in twenty something else."""
    if draw(st.integers(0, 19)) == 19:
        return draw(anything)
    chosen = draw(st.sampled_from(choices)) if len(choices) > 1 else choices[0]
    return draw(chosen) if isinstance(chosen, st.SearchStrategy) else copy.deepcopy(chosen)


@st.composite
def record(draw: st.DrawFn, needs: Mapping[str, Any] = {}, **may: Any) -> dict[str, Any]:
    """Objects that have nearly always the fields `needs`, and a few of `may`."""
    names = draw(st.lists(st.sampled_from(sorted(may)), max_size=4, unique=True)) if may else []
    fields = {name: draw(each) for name, each in needs.items() if draw(st.integers(0, 39)) < 39}
    return fields | {name: draw(may[name]) for name in names}


flags = fits(st.booleans())
words = fits(texts)
ids = fits(st.integers(0, 320), 2**31 - 1, 2**31)
schemas = st.recursive(
    fits(
        {"type": "object"}, {"type": "string"}, {"enum": ["a", 1, None]}, {"const": 3}, True, False,
        {"type": "integer", "minimum": 3}, {"pattern": "a+"}, {"pattern": "("}, {"$ref": "#"},
        {"$ref": "#/$defs/x"}, {"type": ["string", "null"]}, {"type": "no"}, {"format": "date"},
    ),
    lambda inner: record(
        {"type": fits("object", "array")}, properties=fits(st.dictionaries(texts, inner)),
        items=inner, anyOf=fits(st.lists(inner, max_size=2)), required=fits(["a"]),
        additionalProperties=inner, minItems=numbers, uniqueItems=flags,
    ),
    max_leaves=4,
)  # fmt: skip
functions = record({"name": fits("f", "g", "f_1.-")}, description=words, parameters=schemas,
                   strict=flags)  # fmt: skip
tools = fits(st.lists(record({"type": fits("function"), "function": fits(functions)}), max_size=3))
named = record({"type": fits("function"), "function": fits({"name": "f"}, {"name": "h"})})
allowed = record({"type": st.just("allowed_tools"), "allowed_tools": fits(record(
    {"mode": fits("auto", "required"), "tools": fits(st.lists(named, max_size=2))}
))})  # fmt: skip
parts = record({"type": fits("text", "refusal", "image_url", "input_text", "output_text")},
               text=words, refusal=words)  # fmt: skip
contents = fits(texts, st.lists(fits(parts), max_size=2))
called = record(
    {"function": fits(record({"name": words, "arguments": fits("{}", "{", '{"a": 1}', {"a": 1})}))},
    id=words, type=fits("function"),
)  # fmt: skip
messages = fits(st.lists(
    fits(record(
        {"role": fits("user", "assistant", "system", "tool", "developer"), "content": contents},
        tool_calls=fits(st.lists(fits(called), max_size=2)), name=words, tool_call_id=words,
        refusal=words, weight=numbers, train=flags,
    )),
    min_size=1, max_size=3,
))  # fmt: skip
formats = fits(
    {"type": "text"}, {"type": "json_object"},
    record({"type": fits("json_object")}, schema=schemas),
    record({"type": fits("json_schema")}, json_schema=fits(
        record({"schema": schemas}, name=words, strict=flags)), schema=schemas),
)  # fmt: skip
structures = fits(record(
    json=fits(schemas, '{"type": "object"}', "{"), regex=fits("a+", "(", "[a-z]{3}", "(?=a)"),
    choice=fits(["a", "b"], [], ["", "a"]), grammar=fits('start: "a"', "start: b", ""),
    json_object=flags, disable_any_whitespace=flags,
))  # fmt: skip
limits = fits(st.integers(1, 20), 0, -1)
asked = {
    "model": fits("base", "one", "two", "", None), "adapters": fits(
        st.dictionaries(fits("one", "two", "", "base").map(str), numbers, max_size=3)),
    "n": fits(st.integers(1, 3)), "max_tokens": limits, "max_completion_tokens": limits,
    "temperature": fits(0, 0.5, 1, 1e-30, 2), "top_k": limits, "top_p": fits(0, 0.5, 1, 1e-9),
    "min_p": fits(0, 0.1, 1), "repetition_penalty": fits(1, 1.3, 1e-9, 1e20),
    "presence_penalty": fits(-2, 0, 2), "frequency_penalty": fits(-2, 0, 1.5),
    "logit_bias": fits(st.dictionaries(
        fits("5", "0", "-1", "400", "0005", "9" * 10, "x").map(str), fits(-100, 3, 100, 101))),
    "seed": fits(st.integers(-(2**63), 2**63 - 1), 0), "stop": fits(
        texts, st.lists(texts, max_size=3)), "stop_token_ids": fits(st.lists(ids, max_size=3)),
    "min_tokens": limits, "ignore_eos": flags, "prompt_logprobs": limits, "stream": flags,
    "stream_options": fits(record(include_usage=flags, continuous_usage_stats=flags)),
    "truncate_prompt_tokens": limits, "add_special_tokens": flags, "return_token_ids": flags,
    "return_tokens_as_token_ids": flags, "include_stop_str_in_output": flags,
    "skip_special_tokens": flags, "structured_outputs": structures, "guided_json": schemas,
    "guided_regex": fits("a+", "("), "guided_choice": fits(["a"]), "user": words,
    "metadata": anything, "best_of": limits, "store": flags, "lora": anything, "grammar": words,
    "cache_salt": words, "bad_words": anything, "service_tier": words,
}  # fmt: skip
chats = {
    "logprobs": flags, "top_logprobs": limits, "response_format": formats, "tools": tools,
    "tool_choice": fits("none", "auto", "required", named, allowed), "parallel_tool_calls": flags,
    "chat_template_kwargs": fits({"a": 1}, {"tokenize": False}, {"messages": []}),
    "reasoning_effort": fits("low"), "continue_final_message": flags,
    "add_generation_prompt": flags, "functions": anything, "modalities": fits(["text"]),
    "verbosity": fits("medium"), "documents": anything, "chat_template": words,
}  # fmt: skip
items = fits(
    record({"role": fits("user", "assistant", "system"), "content": contents},
           type=fits("message"), id=words, status=words),
    record({"type": fits("function_call"), "name": words, "arguments": words, "call_id": words}),
    record({"type": fits("function_call_output"), "output": contents, "call_id": words}),
    record({"type": fits("item_reference", "reasoning")}),
)  # fmt: skip
flat_tools = fits(st.lists(fits(
    record({"type": fits("function"), "name": fits("f", "g")}, parameters=schemas, strict=flags,
           description=words),
    record({"type": fits("web_search", "custom")}),
), max_size=2))  # fmt: skip
prompts = fits(
    texts, st.lists(texts, min_size=1, max_size=3), st.lists(ids, min_size=1, max_size=4),
    st.lists(st.lists(ids, min_size=1, max_size=3), min_size=1, max_size=3),
)  # fmt: skip

BODIES = {
    "/v1/chat/completions": record({"messages": messages}, **asked, **chats),
    "/v1/completions": record(
        {"prompt": prompts}, **asked, logprobs=fits(limits, st.booleans()), echo=flags,
        suffix=words, tools=tools, messages=messages,
    ),
    "/v1/responses": record(
        {"input": fits(texts, st.lists(items, min_size=1, max_size=3))}, **asked,
        instructions=words, max_output_tokens=limits, tools=flat_tools, include=fits(
            ["message.output_text.logprobs"], ["reasoning.encrypted_content"]),
        tool_choice=fits("auto", "required", {"type": "function", "name": "f"}, record(
            {"type": st.just("allowed_tools")}, mode=fits("auto"),
            tools=fits([{"type": "function", "name": "f"}]))),
        text=fits(record(verbosity=words, format=fits(
            {"type": "json_object"}, record({"type": fits("json_schema"), "schema": schemas},
                                            name=words, strict=flags)))),
        top_logprobs=limits, reasoning=fits(record(effort=words, summary=words)),
        parallel_tool_calls=flags, truncation=fits("disabled", "auto"), background=flags,
        previous_response_id=words,
    ),
    "/tokenize": record(
        {}, prompt=prompts, messages=messages, model=fits("base", "one"), tools=tools,
        add_special_tokens=flags, return_token_strs=flags, add_generation_prompt=flags,
        continue_final_message=flags, truncate_prompt_tokens=limits,
    ),
    "/detokenize": record({"tokens": fits(st.lists(ids, max_size=5))}, model=fits("base", "one")),
    "/v1/load_lora_adapter": record(
        {"lora_name": fits("new", "one", "base", "a b", "ü"), "lora_path": fits("good", "bad", ".",
         "../good", "good/", "good/adapter_config.json", "x" * 300, "a\x00b")},
        load_inplace=flags,
    ),
    "/v1/unload_lora_adapter": record({"lora_name": fits("new", "one", "base", "ü")}),
}  # fmt: skip


@st.composite
def written(draw: st.DrawFn, bodies: st.SearchStrategy) -> bytes:
    """A body as bytes: mostly JSON, with fields of other names now and then, or broken."""
    body = draw(bodies)
    if draw(st.integers(0, 9)) == 0:
        body |= draw(st.dictionaries(texts, anything, max_size=2))
    text = json.dumps(body, ensure_ascii=draw(st.booleans()))
    kind = draw(st.integers(0, 59))
    if kind == 0:  # a field twice
        text = text[:-1] + ("," if body else "") + f'"model": {json.dumps(draw(anything))}}}'
    elif kind == 1:
        text = json.dumps(draw(anything))
    elif kind == 2:
        text = text.replace(
            "1", draw(st.sampled_from(["NaN", "Infinity", "1e999", "01", r"\ud800"]))
        )
    made = text.encode("utf-8", "surrogatepass")
    if kind in (3, 4):
        at = draw(st.integers(0, len(made)))
        made = made[:at] + draw(st.binary(max_size=3)) + made[at + draw(st.integers(0, 3)) :]
    return made
