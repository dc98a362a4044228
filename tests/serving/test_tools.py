"""Calls of tools: found in text of each template's form, whole or in pieces, and forced."""

import json
import random

import pytest
import transformers

from lora_jax import assets, errors, tokenizer
from lora_jax.generation import grammar
from lora_jax.serving.requests import tool_grammar, tools

HERMES = "…within <tool_call></tool_call> XML tags…"
MISTRAL = "{{- '[TOOL_CALLS] [' }}"
LLAMA = """{{- '"parameters": ' }}"""
OTHER = "{{ message.content }}"
NAMES = ["weather", "get_time"]
PARIS = ("weather", {"city": "Paris"})
TIME = ("get_time", {})

# (template, what the model writes, the text beside the calls, the calls)
TABLE = {
    "text": (HERMES, "Hello < you > {} \n", "Hello < you > {} \n", []),
    "one": (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n'
            "</tool_call>", None, [PARIS]),
    "text and two": (HERMES, 'I look.\n\n<tool_call>{"name":"weather","arguments":{"city":"Paris"}}'
                     '</tool_call>\n<tool_call>\n{"name": "get_time"}\n</tool_call>\n',
                     "I look.", [PARIS, TIME]),
    "text after": (HERMES, '<tool_call>{"name": "get_time", "arguments": null}</tool_call>\nDone.',
                   "Done.", [TIME]),
    "list": (HERMES, '<tool_call>[{"name": "get_time", "arguments": {}}, {"name": "weather", '
             '"arguments": {"city": "Paris"}}]</tool_call>', None, [TIME, PARIS]),
    "JSON in JSON": (HERMES, '<tool_call>{"name": "weather", "arguments": "{\\"city\\": '
                     '\\"Paris\\"}"}</tool_call>', None, [PARIS]),
    "closing in a string": (HERMES, '<tool_call>{"name": "weather", "arguments": {"city": '
                            '"</tool_call>"}}</tool_call>', None,
                            [("weather", {"city": "</tool_call>"})]),
    "never closed": (HERMES, '<tool_call>\n{"name": "get_time", "arguments": {}}', None, [TIME]),
    "cut": (HERMES, 'So: <tool_call>\n{"name": "get_ti', 'So: <tool_call>\n{"name": "get_ti', []),
    "no JSON": (HERMES, "The tag <tool_call> is a tag.", "The tag <tool_call> is a tag.", []),
    "broken, then good": (HERMES, '<tool_call>{"name": }</tool_call> <tool_call>{"name": '
                          '"get_time"}</tool_call>', '<tool_call>{"name": }</tool_call>', [TIME]),
    "half an opening": (HERMES, "a <tool_cal", "a <tool_cal", []),
    "line break in a string": (HERMES, '<tool_call>{"name": "weather", "arguments": {"city": '
                               '"a\nb"}}</tool_call>', None, [("weather", {"city": "a\nb"})]),
    "JSON is text": (HERMES, '{"name": "get_time", "arguments": {}}',
                     '{"name": "get_time", "arguments": {}}', []),
    "mistral": (MISTRAL, '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, '
                '{"name": "get_time", "arguments": {}, "id": "123456789"}]', None, [PARIS, TIME]),
    "mistral, special token left out": (MISTRAL, ' [{"name": "get_time", "arguments": {}}]', None,
                                        [TIME]),
    "mistral, named": (MISTRAL, 'Yes.[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time'
                       "[CALL_ID]abc[ARGS]{}", "Yes.", [PARIS, TIME]),
    "mistral, named, special tokens left out": (MISTRAL, 'weather{"city": "Paris"}', None, [PARIS]),
    "mistral, text": (MISTRAL, "weather is fine. [1] {2}", "weather is fine. [1] {2}", []),
    "mistral, list": (MISTRAL, '[1, {"a": 2}]', '[1, {"a": 2}]', []),
    "llama": (LLAMA, '{"name": "weather", "parameters": {"city": "Paris"}}', None, [PARIS]),
    "llama, tag": (LLAMA, '<|python_tag|>{"name": "get_time", "parameters": {}}', None, [TIME]),
    "llama, two": (LLAMA, '{"name": "get_time", "parameters": {}}; {"name": "weather", '
                   '"parameters": {"city": "Paris"}}', None, [TIME, PARIS]),
    "llama, type": (LLAMA, '\n{"type": "function", "function": {"name": "get_time", '
                    '"parameters": {}}}', None, [TIME]),
    "llama, another name": (LLAMA, '{"name": "Ada", "parameters": {}}',
                            '{"name": "Ada", "parameters": {}}', []),
    "llama, JSON with the name of a tool": (LLAMA, '{"name": "weather", "wind": 3}',
                                            '{"name": "weather", "wind": 3}', []),
    "llama, JSON": (LLAMA, '{"city": "Paris", "x": {}} ok', '{"city": "Paris", "x": {}} ok', []),
    "llama, JSON later": (LLAMA, 'So {"name": "get_time", "parameters": {}}',
                          'So {"name": "get_time", "parameters": {}}', []),
    "llama, code": (LLAMA, "<|python_tag|>print({1})", "<|python_tag|>print({1})", []),
    "no tools in the template": (OTHER, '{"name": "get_time", "arguments": {}}', None, [TIME]),
}  # fmt: skip


def found(parser_calls):
    return [(call.name, json.loads(call.arguments)) for call in parser_calls]


def divided(text, source, names=None):
    """(the text beside the calls or None, the calls) of a whole output."""
    parser = tools.Parser(source, names)
    content = parser.push(text) + parser.finish()
    return content or None, parser.calls


@pytest.mark.parametrize("case", TABLE)
def test_calls_are_divided_from_text(case):
    source, text, content, calls = TABLE[case]
    said, made = divided(text, source, NAMES)
    assert (said, found(made)) == (content, calls)


@pytest.mark.parametrize("case", TABLE)
def test_pieces_give_what_the_whole_gives(case):
    source, text, content, calls = TABLE[case]
    draws = random.Random(0)
    for most in (1, 1, 2, 3, 5, 8, 13):
        parser, said, at = tools.Parser(source, NAMES), "", 0
        while at < len(text):
            size = draws.randint(1, most)
            said += parser.push(text[at : at + size])
            at += size
            assert (content or "").startswith(said)  # nothing is taken back
        assert (said + parser.finish() or None, found(parser.calls)) == (content, calls)


@pytest.mark.parametrize(
    ("source", "text", "at_once"),
    [
        (HERMES, "Hello you", "Hello you"),
        (HERMES, "a <b", "a <b"),
        (HERMES, "a <tool", "a"),  # a space before a call is no text
        (HERMES, "a <tool_call>", "a"),
        (HERMES, "a <tool_call> b", "a <tool_call> b"),
        (LLAMA, "Hello {", "Hello {"),
        (LLAMA, '{"na', ""),
        (LLAMA, '{"city', '{"city'),
        (LLAMA, "{}", "{}"),
        (MISTRAL, "weat", ""),
        (MISTRAL, "weather is", "weather is"),
        (MISTRAL, "wet", "wet"),
    ],
)
def test_only_what_may_begin_a_call_is_withheld(source, text, at_once):
    assert tools.Parser(source, NAMES).push(text) == at_once


def test_a_call_is_there_as_soon_as_it_is_complete():
    parser = tools.Parser(HERMES, NAMES)
    assert parser.push('<tool_call>{"name": "get_time", "arguments": {}}</tool_call') == ""
    assert not parser.calls
    assert parser.push("> and") == "and" and found(parser.calls) == [TIME]


def test_any_name_is_called_if_none_are_given():
    text = '{"name": "other", "parameters": {"a": 1}}'
    assert found(divided(text, LLAMA)[1]) == [("other", {"a": 1})]


def test_the_arguments_stay_readable():
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Zürich"}}</tool_call>'
    assert divided(text, HERMES)[1] == [tools.Call("weather", '{"city": "Zürich"}')]


# ---------------------------------------------------------------------- forced calls

TOOLS = [
    {"type": "function", "function": {
        "name": "weather",
        "parameters": {
            "$defs": {"city": {"enum": ["Paris", "Rome"]}},
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"], "additionalProperties": False,
        },
    }},
    {"type": "function", "function": {"name": "get_time"}},
]  # fmt: skip
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    reader = tokenizer.load(assets.FOLDER)
    return reader, grammar.Grammar(reader, len(reader), [reader.eos_token_id])


def accepts(compiled, text, forced):
    """Whether the text is one of the grammar."""
    reader, grammars = compiled
    matcher = grammars.matcher(forced)
    ids = reader(text, add_special_tokens=False).input_ids
    return all(map(matcher.accept, ids)) and matcher.accept(reader.eos_token_id)


FORMS = {HERMES: '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>',
         MISTRAL: '[{"name": "%s", "arguments": %s}]',
         LLAMA: '{"name": "%s", "parameters": %s}',
         OTHER: '{"name": "%s", "arguments": %s}'}  # fmt: skip


@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize(
    ("choice", "name", "arguments", "fits"),
    [
        ("required", "weather", '{"city": "Rome"}', True),
        ("required", "get_time", "{}", True),
        ("required", "get_time", '{"x": 1}', False),
        ("required", "weather", '{"city": "Oslo"}', False),
        ("required", "weather", "{}", False),
        ("required", "other", "{}", False),
        (NAMED, "weather", '{"city": "Paris"}', True),
        (NAMED, "get_time", "{}", False),
    ],
)
def test_a_forced_call_follows_its_parameters(compiled, source, choice, name, arguments, fits):
    text = FORMS[source] % (name, arguments)
    forced = tool_grammar.grammar(TOOLS, choice, source)
    assert accepts(compiled, text, forced) is fits
    assert not accepts(compiled, "Hello", forced)
    if fits:
        assert found(divided(text, source, NAMES)[1]) == [(name, json.loads(arguments))]


def test_only_required_calls_may_be_several(compiled):
    one = FORMS[HERMES] % ("weather", '{"city": "Rome"}')
    two = f"{one}\n{one}"
    assert accepts(compiled, two, tool_grammar.grammar(TOOLS, "required", HERMES))
    assert not accepts(
        compiled, two, tool_grammar.grammar(TOOLS, "required", HERMES, parallel=False)
    )
    assert not accepts(compiled, two, tool_grammar.grammar(TOOLS, NAMED, HERMES))
    assert len(divided(two, HERMES)[1]) == 2


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_nothing_is_forced_without_need(choice):
    assert tool_grammar.grammar(TOOLS, choice, HERMES) is None


@pytest.mark.parametrize("source", FORMS)
def test_a_call_or_else_json(compiled, source):
    """What tools beside a response_format leave."""
    text = grammar.schema_text({"properties": {"n": {"type": "integer"}}, "required": ["n"]})
    either = tool_grammar.grammar(TOOLS, "auto", source, text=text)
    call, answer = FORMS[source] % ("weather", '{"city": "Rome"}'), '{"n": 5}'
    assert accepts(compiled, call, either) and accepts(compiled, answer, either)
    assert not accepts(compiled, call.replace("Rome", "Oslo"), either)
    assert not accepts(compiled, "Hello", either) and not accepts(compiled, '{"m": 5}', either)
    assert divided(answer, source, NAMES) == (answer, [])


def test_a_tag_that_is_one_token_is_written_with_it():
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    reader = tokenizer.load(assets.FOLDER)
    tags = [transformers.AddedToken(tag, special=False) for tag in ("<tool_call>", "</tool_call>")]
    reader.add_tokens(tags)  # as Qwen's tokenizer has them
    tokens = reader.get_added_vocab()
    compiled = reader, grammar.Grammar(reader, len(reader), [reader.eos_token_id])
    text = "\n".join([FORMS[HERMES] % ("get_time", "{}")] * 2)
    assert tokens["<tool_call>"] in reader(text).input_ids
    assert accepts(compiled, text, tool_grammar.grammar(TOOLS, "required", HERMES, tokens=tokens))
    assert not accepts(compiled, text, tool_grammar.grammar(TOOLS, "required", HERMES))


def test_a_function_without_parameters_gets_no_arguments(compiled):
    for parameters in ({"type": "object", "properties": {}}, {}, None):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        forced = tool_grammar.grammar([tool], "required", HERMES)
        assert accepts(compiled, FORMS[HERMES] % ("f", "{}"), forced)
        assert not accepts(compiled, FORMS[HERMES] % ("f", '{"a": 1}'), forced)


def test_parameters_of_a_strict_tool_must_be_enforced(compiled):
    schema = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    with pytest.raises(errors.UserError, match="uniqueItems"):
        compiled[1].matcher(tool_grammar.grammar([tool], "required", HERMES))
    tool["function"]["strict"] = False
    compiled[1].matcher(tool_grammar.grammar([tool], "required", HERMES))


@pytest.mark.parametrize("tagged", [False, True])
def test_calls_of_a_strict_tool_in_free_text_follow_its_parameters(tagged):
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    reader = tokenizer.load(assets.FOLDER)
    tags = ("<tool_call>", "</tool_call>", "<think>", "</think>") if tagged else ()
    reader.add_tokens([transformers.AddedToken(tag, special=False) for tag in tags])
    tokens = reader.get_added_vocab() if tagged else {}
    compiled = reader, grammar.Grammar(reader, len(reader), [reader.eos_token_id])
    strict = [{"function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    free = tool_grammar.grammar(strict, "auto", HERMES, tokens=tokens)
    call = FORMS[HERMES] % ("weather", '{"city": "Rome"}')
    good = ["", "Hello < you >", call, f"I look.\n{call}\n{call}\nDone.",
            "<think>So: a tool.</think>" + FORMS[HERMES] % ("get_time", "{}")]  # fmt: skip
    bad = [FORMS[HERMES] % ("weather", '{"city": "Oslo"}'), FORMS[HERMES] % ("other", "{}"),
           call.removesuffix("</tool_call>"), "The tag <tool_call> is a tag."]  # fmt: skip
    assert all(accepts(compiled, text, free) for text in good)
    assert not any(accepts(compiled, text, free) for text in bad)
    for source in (MISTRAL, LLAMA, OTHER):  # where a call has no tags of its own
        assert tool_grammar.grammar(strict, "auto", source) is None
