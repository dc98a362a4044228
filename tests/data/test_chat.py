"""Chats: rendered by the template, with the assistant's turns trained."""

import datetime
import itertools
import json
import pathlib

import numpy as np
import pytest
import tiny_tokenizer
from test_encoding import EOS, dataset, trained_text, write

from lora_jax import errors, tokenizer
from lora_jax.data import encoding, sources
from lora_jax.data.chats import chat, clock

CHATML = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
GENERATION = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "ab cd"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "no ab"},
]


def chat_tokenizer(tmp_path, template):
    return tokenizer.load(tiny_tokenizer.save(tmp_path / "chat", chat_template=template))


@pytest.mark.parametrize("template", [CHATML, GENERATION], ids=["prefix", "generation"])
def test_chats_train_the_assistant_only(tmp_path, template):
    tok = chat_tokenizer(tmp_path, template)
    ((ids, trained),) = encoding.encode(dataset({"messages": CHAT}), tok, 256, EOS).rows
    whole = tok.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert ids.tolist() == whole
    spans = np.split(ids, np.flatnonzero(np.diff(trained)) + 1)
    assert [tok.decode(span) for span in spans[1::2]] == ["yes</s>", "no ab</s>"]
    assert "yes" not in "".join(tok.decode(span) for span in spans[0::2])


def test_optional_fields_of_a_message_stay_absent(tmp_path):
    # In Arrow the second example's `name` exists in the first one too, as None.
    template = "{% for m in messages %}{{ m.keys() | list | length }}{% endfor %}"
    tok = chat_tokenizer(tmp_path, "{% generation %}" + template + "{% endgeneration %}")
    examples = [
        {"messages": [{"role": "user", "content": "a"}] * 2},
        {"messages": [{"role": "user", "content": "a", "name": "b"}] * 2},
    ]
    encoded = encoding.encode(dataset(*examples), tok, 64, EOS)
    assert [trained_text(tok, example) for example in encoded.rows] == ["22", "33"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] | urlencode }}{% endfor %}", "changes the text"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        (None, "chat template"),
    ],
)
def test_chats_that_cannot_be_masked_are_named(tmp_path, template, message):
    tok = chat_tokenizer(tmp_path, template)
    path = write(tmp_path / "x.jsonl", json.dumps({"messages": CHAT}))
    with pytest.raises(errors.UserError) as caught:
        encoding.encode(sources.load(path), tok, 256, EOS)
    assert message in str(caught.value)
    if template:
        assert "x.jsonl:1" in str(caught.value)


# What published templates do, in short: think only in the last answer, as Qwen3; end the last turn
# otherwise, as Phi-3; open a block in the prompt that answers lack, as R1; put the system message
# into the last turn, as Mistral; have no tokens of their own around a turn.
THINK_LAST = (
    "{% for m in messages %}{% if m.role == 'assistant' %}[a]{% if loop.last %}<think></think>"
    "{% endif %}{{ m.content + eos_token }}{% else %}[u]{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
OTHER_END = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}"
)
OPENS_THINK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '[a]' + m.content.split('</think>')[-1] + eos_token }}{% else %}{{ '[u]' + m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[a]<think>\n' }}{% endif %}"
)
SYSTEM_LAST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ '[I] ' + (system + ' ' if loop.last and system "
    "is defined else '') + m.content + '[/I]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TOOLS = (
    "{% if tools %}TOOLS{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ '[' + m.role + ']' + (m.content or '') }}{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SYSTEM = {"role": "system", "content": "be"}


def marked(tok, example):
    """The text of an example, with what is trained in brackets."""
    ids, trained = example
    text, before, at = "", "", 0
    for end in [*np.flatnonzero(np.diff(trained)) + 1, len(ids)]:
        upto = tok.decode(ids[:end])
        for special in ("<s>", "</s>"):  # the space that the tokenizer puts before a word
            upto = upto.replace(f"{special} ", special)
        part = upto[len(before) :]
        text, before, at = text + (f"⟦{part}⟧" if trained[at] else part), upto, end
    return text


def encoded(tmp_path, template, *rows, pairs=False):
    """(the marked examples of rows in a file, what encode returns)."""
    tok = chat_tokenizer(tmp_path, template)
    path = write(tmp_path / "rows.jsonl", *map(json.dumps, rows))
    encode = encoding.encode_pairs if pairs else encoding.encode
    found = encode(sources.load(path), tok, 512, EOS)
    return [marked(tok, example) for example in found.rows], found


@pytest.mark.parametrize(
    ("template", "chat", "text"),
    [
        (THINK_LAST, CHAT, "[u]ab cd[a]⟦yes</s>⟧[u]and?[a]⟦<think></think>no ab</s>⟧"),
        (OTHER_END, CHAT, "<user>ab cd<end><assistant>⟦yes<end>⟧<user>and?<end><assistant>"
                          "⟦no ab<end></s>⟧"),
        (OPENS_THINK, CHAT, "<s>[u]ab cd[a]⟦yes</s>⟧[u]and?[a]⟦no ab</s>⟧"),
        (SYSTEM_LAST, [SYSTEM, *CHAT[:3]], "<s>[I] ab cd[/I]⟦ yes</s>⟧[I] be and?[/I]"),
        (PLAIN, CHAT, "user: ab cd\nassistant:⟦ yes\n⟧user: and?\nassistant:⟦ no ab\n⟧"),
        (CHATML, CHAT[1:], "[assistant]⟦yes</s>⟧[user]and?</s>[assistant]⟦no ab</s>⟧"),
        (CHATML, [CHAT[0] | {"content": "yes"}, CHAT[1]], "[user]yes</s>[assistant]⟦yes</s>⟧"),
        (CHATML, [CHAT[0], CHAT[1] | {"content": "[assistant]</s>"}],
         "[user]ab cd</s>[assistant]⟦[assistant]</s></s>⟧"),
    ],
)  # fmt: skip
def test_answers_are_found_in_one_rendering(tmp_path, template, chat, text):
    (found,), _ = encoded(tmp_path, template, {"messages": chat})
    assert found == text


def test_answers_are_trained_unless_their_author_says_no(tmp_path):
    chat = [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[2], CHAT[3] | {"train": True}]
    parts = [{"type": "text", "value": "no ab"}]  # of LLaMA-Factory
    as_parts = [*chat[:3], {"role": "assistant", "content": parts, "loss_weight": 1.0}]
    as_parts[1] = CHAT[1] | {"loss_weight": 0.0}
    swift = [CHAT[0], CHAT[1] | {"loss": False}, CHAT[2], CHAT[3] | {"loss": 0.7}]
    for template, messages in (
        (CHATML, chat), (GENERATION, chat), (CHATML, as_parts), (CHATML, swift)
    ):  # fmt: skip
        (found,), _ = encoded(tmp_path, template, {"messages": messages})
        assert [part.partition("⟧")[0] for part in found.split("⟦")[1:]] == ["no ab</s>"]


CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}]
AS_TEXT = [{"type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}]


@pytest.mark.parametrize("calls", [CALLS, AS_TEXT], ids=["object", "text"])
@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_tool_calls_are_trained(tmp_path, calls, content):
    chat = [CHAT[0], {"role": "assistant", "tool_calls": calls} | content,
            {"role": "tool", "content": "4"}, CHAT[3]]  # fmt: skip
    (found,), _ = encoded(tmp_path, TOOLS, {"messages": chat})
    assert found == '[user]ab cd</s>[assistant]⟦{"n": 1}</s>⟧[tool]4</s>[assistant]⟦no ab</s>⟧'


NO_PROMPT = SYSTEM_LAST.replace("{{ bos_token }}", "")


@pytest.mark.parametrize(
    ("template", "answers", "text"),
    [
        (CHATML, ["", "no"], "[user]a</s>[assistant]⟦</s>⟧[user]a</s>[assistant]⟦no</s>⟧"),
        (CHATML, ["no", ""], "[user]a</s>[assistant]⟦no</s>⟧[user]a</s>[assistant]⟦</s>⟧"),
        (THINK_LAST, [""], "[u]a[a]⟦<think></think></s>⟧"),
        (OTHER_END, ["", ""], "<user>a<end><assistant>⟦<end>⟧<user>a<end><assistant>⟦<end></s>⟧"),
        (OPENS_THINK, ["", "no"], "<s>[u]a[a]⟦</s>⟧[u]a[a]⟦no</s>⟧"),
        (OPENS_THINK, ["<ab>"], "<s>[u]a[a]⟦<ab></s>⟧"),
        (NO_PROMPT, ["", "no"], "[I] a[/I]⟦ </s>⟧[I] a[/I]⟦ no</s>⟧"),
        (GENERATION, ["", "no"], "[user]a[assistant]⟦</s>⟧[user]a[assistant]⟦no</s>⟧"),
        (CHATML.replace("in messages", "in messages if m['content']"), ["", "no"],
         "[user]a</s>[user]a</s>[assistant]⟦no</s>⟧"),
    ],
)  # fmt: skip
def test_the_end_of_an_empty_answer_is_trained(tmp_path, template, answers, text):
    pairs = [({"role": "user", "content": "a"}, {"role": "assistant", "content": answer})
             for answer in answers]  # fmt: skip
    (found,), _ = encoded(tmp_path, template, {"messages": [*itertools.chain(*pairs)]})
    assert found == text


ONLY_PARTS = (  # as SmolVLM
    "{% for m in messages %}{{ '[' + m.role + ']' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_an_answer_of_spaces_does_not_hide_that_the_others_are_left_out(tmp_path):
    chat = [*CHAT[:3], {"role": "assistant", "content": " "}]
    (found,), _ = encoded(tmp_path, ONLY_PARTS, {"messages": chat})
    assert found == "[user]ab cd</s>[assistant]⟦yes</s>⟧[user]and?</s>[assistant]⟦ </s>⟧"


ASKS = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
# A template prints what a tool answered as JSON or as Python does, or has no place for what is no
# text.
PRINTS = (
    "{% for m in messages %}{{ '[' + m.role + ']' }}{% for c in m.tool_calls %}"
    "{{ c.function.name }}{% endfor %}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
AS_JSON = PRINTS.replace("m.content }}", "m.content | tojson if m.role == 'tool' else m.content }}")
ADDS = PRINTS.replace("{{ m.content }}", "{{ m.content + '' }}")
LOSES = PRINTS.replace("m.content }}", "m.content if m.content is string else '' }}")


@pytest.mark.parametrize(
    ("template", "content", "printed"),
    [
        (AS_JSON, {"sky": "b[user]"}, '{"sky": "b[user]"}'),
        (PRINTS, {"sky": "b"}, "{'sky': 'b'}"),
        (PRINTS, [{"n": 1}, {"n": 2}], "[{'n': 1}, {'n': 2}]"),
        (PRINTS, ["a", "b"], "['a', 'b']"),
        (PRINTS, 20, "20"),
        (PRINTS, [], "[]"),
        (PRINTS, [{"type": "hit", "text": "b"}], "[{'type': 'hit', 'text': 'b'}]"),
        (PRINTS, [{"text": "b", "score": 1}], "[{'text': 'b', 'score': 1}]"),
        (ADDS, {"sky": "b"}, '{"sky": "b"}'),
        (ADDS, 20, "20"),
        (LOSES, {"sky": "b"}, '{"sky": "b"}'),
        (LOSES, [{"type": "text", "text": "b"}, {"text": "c"}], "bc"),
    ],
)
def test_what_a_tool_answers_may_be_data(tmp_path, template, content, printed):
    chat = [CHAT[0], ASKS, {"role": "tool", "content": content}, *CHAT[1:]]
    text = f"[user]ab cd</s>[assistant]⟦f</s>⟧[tool]{printed}</s>[assistant]⟦yes</s>⟧[user]and?"
    (found,), _ = encoded(tmp_path, template, {"messages": chat})
    assert found.startswith(text)


REASONS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<{{ m.reasoning_content }}>"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
)
READS_THINKING = (  # as Magistral
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'thinking' %}({{ part.thinking }}){% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "parts", "text"),
    [
        (REASONS, [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "no"}],
         "<hm>no"),
        (REASONS, [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "no"}],
         "<hm>no"),
        (REASONS, [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, "no"],
         "<hm>no"),
        (REASONS, [{"type": "reasoning", "value": "hm"},
                   {"type": "tool_call", "value": '{"name": "f", "arguments": {"n": 1}}'}],
         '<hm>f{"n": 1}'),
        (READS_THINKING, [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "no"}],
         "(hm)no"),
    ],
)  # fmt: skip
def test_parts_with_reasoning_and_calls_become_fields(tmp_path, template, parts, text):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": parts}]
    (found,), _ = encoded(tmp_path, template, {"messages": chat})
    assert found.replace("⟦", "").replace("⟧", "") == f"[user]a</s>[assistant]{text}</s>"
    assert found.endswith(f"{text}</s>⟧") and "user" not in found.partition("⟦")[2]


@pytest.mark.parametrize("template", [REASONS, REASONS.replace(" | tojson", " + ''")])
def test_arguments_that_json_does_not_have_are_taken(tmp_path, template):
    call = {"function": {"name": "f", "arguments": {"day": datetime.date(2026, 1, 2)}}}
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    dataset({"messages": chat}).to_parquet(tmp_path / "x.parquet")
    tok = chat_tokenizer(tmp_path, template)
    (found,) = encoding.encode(sources.load(str(tmp_path / "x.parquet")), tok, 512, EOS).rows
    assert 'f{"day": "' in marked(tok, found)


def test_messages_may_be_written_as_python_and_numpy_print_them(tmp_path):
    chats = [*CHAT[:1], {"role": "assistant", "content": "it's\n} {\n"}], CHAT[2:]
    numpy = [str(np.array(chat)) for chat in chats]  # without commas between the messages
    for texts in (map(str, chats), numpy):
        rows = [{"messages": text} for text in texts]
        (first, second), _ = encoded(tmp_path, CHATML, *rows)
        assert first == "[user]ab cd</s>[assistant]⟦it's\n} {\n</s>⟧"
        assert second == "[user]and?</s>[assistant]⟦no ab</s>⟧"
    pair = {"prompt": str(CHAT[:1]), "completion": str(CHAT[1:2])}
    expected = "[user]ab cd</s>[assistant]⟦yes</s>⟧"
    assert encoded(tmp_path, CHATML, pair)[0] == [expected]
    best, worst = str(CHAT[:2]), str([CHAT[0], CHAT[3]])
    found, _ = encoded(tmp_path, CHATML, {"chosen": best, "rejected": worst}, pairs=True)
    assert found == [expected, "[user]ab cd</s>[assistant]⟦no ab</s>⟧"]
    for text in ("[{'n': 1}]", "[{'n': 1, []: 2}]"):  # the second is no value
        (found,), _ = encoded(tmp_path, CHATML, {"prompt": text, "completion": text})
        assert found == f"<s>{text}⟦{text}</s>⟧"


def test_a_turn_goes_on_behind_the_answer_of_a_tool(tmp_path):
    template = (  # as Gemma 4: no header, and no end, between a call and what follows it
        "{% for m in messages %}{% if m.role == 'tool' %}<o>{{ m.content }}</o>{% else %}"
        "{% if m.role == 'user' or messages[loop.index0 - 1].role == 'user' %}[{{ m.role }}]"
        "{% endif %}{{ m.content }}{% for c in m.tool_calls %}"
        "<c>call:{{ c.function.name + bos_token }}{% endfor %}"
        "{% if not m.tool_calls %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    answer = {"role": "tool", "content": "4"}
    chat = [CHAT[0], ASKS, answer, ASKS, answer, CHAT[1]]
    (found,), _ = encoded(tmp_path, template, {"messages": chat})
    one = "⟦<c>call:f<s>⟧<o>4</o>"
    assert found == f"[user]ab cd</s>[assistant]{one}{one}⟦yes</s>⟧"


def test_a_tool_call_without_a_letter_is_trained(tmp_path):
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    chat = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": call}]
    expected = "[user]ab cd</s>[assistant]⟦{}</s>⟧"
    assert encoded(tmp_path, TOOLS, {"messages": chat})[0] == [expected]
    chat += [{"role": "tool", "content": "4"}, CHAT[3]]
    expected += "[tool]4</s>[assistant]⟦no ab</s>⟧"
    assert encoded(tmp_path, TOOLS, {"messages": chat})[0] == [expected]


@pytest.mark.parametrize(
    "tools",
    [
        [{"name": "f"}],
        {"name": "f"},
        ['{"name": "f"}'],
        '{"name": "f"}',
        '["{\\"name\\": \\"f\\"}"]',
    ],
)
def test_tools_are_objects_or_their_json_text(tmp_path, tools):
    expected = 'TOOLS[{"name": "f"}][user]ab cd</s>[assistant]⟦yes</s>⟧'
    assert encoded(tmp_path, TOOLS, {"messages": CHAT[:2], "tools": tools})[0] == [expected]
    expected = "[user]ab cd</s>[assistant]⟦yes</s>⟧"
    assert encoded(tmp_path, TOOLS, {"messages": CHAT[:2], "tools": " "})[0] == [expected]


def test_tools_and_options_reach_the_template(tmp_path):
    template = "{{ before }}" + TOOLS
    row = {"messages": CHAT[:2], "tools": [{"name": "f"}], "chat_template_kwargs": {"before": "!"}}
    expected = '!TOOLS[{"name": "f"}][user]ab cd</s>[assistant]⟦yes</s>⟧'
    assert encoded(tmp_path, template, row)[0] == [expected]
    as_text = {name: json.dumps(value) for name, value in row.items()}  # as in CSV files
    assert encoded(tmp_path, template, as_text)[0] == [expected]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "cd"}]},
        {"messages": [{"role": "User", "content": "ab", "tool_calls": ""},
                      {"role": "Chatbot", "content": "cd", "tool_calls": "[]"}]},
        {"messages": [{"role": "user", "content": "ab"}, {"role": "model", "content": "cd"}]},
        {"messages": [{"role": "User", "content": "ab"}, {"role": " ASSISTANT", "content": "cd"}]},
        {"prompt": [{"role": "user", "content": "ab"}],
         "completion": [{"role": "assistant", "content": "cd"}]},
        {"prompt": [{"role": "user", "content": "ab"}], "completion": "cd"},
        {"prompt": '[{"role": "user", "content": "ab"}]',
         "completion": '[{"from": "gpt", "value": "cd"}]'},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"},
                                                   {"type": "text", "text": "b"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "cd"}]}]},
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}],
         "system": " ", "tools": ""},
    ],
    ids=["sharegpt", "cohere", "gemma", "capitals", "prompt-completion", "completion-text",
         "json-text", "parts", "blank-system"],
)  # fmt: skip
def test_chats_as_others_write_them(tmp_path, row):
    assert encoded(tmp_path, CHATML, row)[0] == ["[user]ab</s>[assistant]⟦cd</s>⟧"]


@pytest.mark.parametrize(
    ("row", "begin"),
    [
        ({"messages": CHAT[:2], "system": "Be"}, "[system]Be</s>"),
        ({"messages": [{"role": "system", "content": "I"}, *CHAT[:2]], "system": "Be"},
         "[system]I</s>"),
        ({"messages": [{"role": "developer", "content": "I"}, *CHAT[:2]], "system": "Be"},
         "[system]I</s>"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:2], "system": "Be"}, "[system]Be</s>"),
        ({"messages": CHAT[:2], "system": 5}, ""),
    ],
    ids=["system", "own", "developer", "prompt-completion", "number"],
)  # fmt: skip
def test_the_field_system_begins_a_chat_without_a_system_message(tmp_path, row, begin):
    expected = f"{begin}[user]ab cd</s>[assistant]⟦yes</s>⟧"
    assert encoded(tmp_path, CHATML, row)[0] == [expected]


def test_the_field_system_belongs_to_the_prompt_of_a_preference(tmp_path):
    row = {"system": "Be", "prompt": [TWO], "chosen": [GOOD], "rejected": [BAD]}
    begin = "[system]Be</s>[user]two</s>[assistant]"
    found, _ = encoded(tmp_path, CHATML, row, pairs=True)
    assert found == [f"{begin}⟦good</s>⟧", f"{begin}⟦bad</s>⟧"]


CALLS = (
    "{% for m in messages %}[{{ m.role }}]{% for call in m.tool_calls %}"
    "{{ call.function.name if call.function else call.name }}{% endfor %}{{ m.content or '' }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}{# 'tool' #}"
)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [CHAT[0], {"role": "assistant", "content": None,
                                "function_call": {"name": "add", "arguments": "{}"}},
                      {"role": "function", "name": "add", "content": "4"}]},
        {"conversations": [{"from": "human", "value": "ab cd"},
                           {"from": "function_call", "value": '{"name": "add", "arguments": {}}'},
                           {"from": "observation", "value": "4"}]},
        {"messages": [CHAT[0] | {"role": "prompter"},
                      {"role": "tool_call", "content": '{"name": "add", "arguments": {}}'},
                      {"role": "tool_response", "content": "4"}]},
        {"conversations": [{"from": "human", "value": CHAT[0]["content"]},
                           {"from": "function_call", "value": '{"name": "add", "arguments": {}}'},
                           {"from": "function_response", "value": "4"}]},
    ],
    ids=["openai", "sharegpt", "ms-swift", "function_response"],
)  # fmt: skip
def test_calls_of_functions_as_they_were_before_tools(tmp_path, row):
    found, counts = encoded(tmp_path, CALLS, row)
    assert found == ["[user]ab cd</s>[assistant]⟦add</s>⟧[tool]4</s>"]
    assert counts.num_lost == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user", "content": 5}]}, "int, not text"),
        ({"messages": [{"role": "user"}]}, "no content"),
        ({"messages": [{"content": "a"}]}, "no role"),
        ({"messages": [{"role": "critic", "content": "a"}]}, "unknown role"),
        ({"messages": "hello"}, "text that is not JSON, not a list"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, "not a list of objects"),
        ({"messages": [*CHAT, {**CHAT[1], "train_detail": []}]}, "has train_detail"),
        ({"messages": [*CHAT, {**CHAT[1], "weight": 0.5}]}, "neither 0 nor 1"),
        ({"messages": [*CHAT, {**CHAT[1], "weight": "0"}]}, "has weight '0', which is text"),
        (
            {
                "messages": [
                    CHAT[0],
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "text", "text": "a", "train": False},
                            {"type": "text", "text": "b"},
                        ],
                    },
                ]
            },
            "a part that is not trained",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "no text: image"),
        ({"messages": CHAT, "tools": "f"}, "tools is not a list"),
        ({"prompt": "a", "completion": float("nan")}, "completion is a float"),
    ],
)
def test_what_is_no_chat_is_named(tmp_path, row, message):
    with pytest.raises(errors.UserError, match=message) as caught:
        encoded(tmp_path, CHATML, {"messages": CHAT} if "messages" in row else row, row)
    assert "rows.jsonl:2" in str(caught.value)


def test_answers_that_the_template_leaves_out_are_counted(tmp_path):
    template = CHATML.replace("in messages %}", "in messages if m.content != 'yes' %}")
    (found,), counts = encoded(tmp_path, template, {"messages": CHAT})
    assert "⟦no ab</s>⟧" in found and counts.num_lost == 1


@pytest.mark.parametrize(
    "content",
    ["m.content if m.content is string else m.content | tojson", "m.content + ''"],
    ids=["lists in JSON", "no lists"],
)
def test_a_call_that_the_template_has_no_place_for_is_counted(tmp_path, content):
    """It is no reason to refuse the chat, nor to give the template lists that it would print."""
    template = CHATML.replace("m['content']", content)
    call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    rows = {"messages": [CHAT[0], call]}, {"messages": CHAT[:2]}
    found, counts = encoded(tmp_path, template, *rows)
    assert found == ["[user]ab cd</s>[assistant]⟦yes</s>⟧"]
    assert (counts.num_lost, counts.num_skipped) == (1, 1)
    parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in CHAT[:2]]
    assert encoded(tmp_path, template, {"messages": parts})[0] == found


@pytest.mark.parametrize(
    "content",
    ["m.content[0].text", "m.content[0]['text']", "m.content[0].get('text')",
     "m.content | map(attribute='text') | join"],
)  # fmt: skip
def test_a_template_for_lists_of_parts_gets_them(tmp_path, content):
    template = CHATML.replace("m['content']", content)
    found, _ = encoded(tmp_path, template, {"messages": CHAT[:2]})
    assert found == ["[user]ab cd</s>[assistant]⟦yes</s>⟧"]


NO_REASONS = CHATML.replace("m['content'] }}", "m['content'].split('</think>')[-1] }}")
WITH_REASONS = CHATML.replace("{{ m['content']", "{{ m['reasoning_content'] }}{{ m['content']")


@pytest.mark.parametrize(
    ("template", "change", "number"),
    [
        (CHATML, {"reasoning_content": "so"}, 1),
        (WITH_REASONS, {"reasoning_content": "so"}, 0),
        (CHATML, {"content": "<think>so</think>no"}, 0),
        (NO_REASONS, {"content": "<think>so</think>no"}, 1),
        (NO_REASONS, {"content": "<think></think>no"}, 0),
        (CHATML, {"reasoning_content": "so", "weight": 0}, 0),
    ],
)
def test_reasoning_that_the_template_leaves_out_is_counted(tmp_path, template, change, number):
    chat = [*CHAT[:3], CHAT[3] | change]
    _, counts = encoded(tmp_path, template, {"messages": chat}, {"messages": CHAT})
    assert counts.num_no_reasons == number and counts.num_lost == 0
    assert len(counts.losses) == number and all("in 1 of them" in each for each in counts.losses)
    # Templates leave the reasoning of earlier answers out.
    earlier = [CHAT[0], CHAT[1] | {"reasoning_content": "so"}, *CHAT[2:]]
    assert encoded(tmp_path, template, {"messages": earlier})[1].num_no_reasons == 0


ONE, TWO = ({"role": "user", "content": text} for text in ("one", "two"))
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))
LONG = "[user]one</s>[assistant]yes</s>[user]two</s>[assistant]"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": [ONE, CHAT[1], TWO], "chosen": [GOOD], "rejected": [BAD]}, LONG),
        ({"chosen": [ONE, CHAT[1], TWO, GOOD], "rejected": [ONE, CHAT[1], TWO, BAD]}, LONG),
        ({"prompt": "two", "chosen": [TWO, GOOD], "rejected": [TWO, BAD]},
         "[user]two</s>[assistant]"),
        ({"prompt": "two ", "chosen": [TWO, GOOD], "rejected": [TWO, BAD]},
         "[user]two</s>[assistant]"),
        ({"prompt": "two", "chosen": [ONE, CHAT[1], TWO, GOOD],
          "rejected": [ONE, CHAT[1], TWO, BAD]}, LONG),
        ({"prompt": [TWO], "chosen": [TWO, GOOD], "rejected": [TWO, BAD]},
         "[user]two</s>[assistant]"),
        ({"prompt": [TWO], "chosen": "good", "rejected": "bad"}, "[user]two</s>[assistant]"),
        ({"messages": [ONE, CHAT[1], TWO], "chosen": GOOD, "rejected": BAD}, LONG),
        ({"conversations": [{"from": "human", "value": "two"}],
          "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
         "[user]two</s>[assistant]"),
        ({"messages": [TWO, GOOD], "chosen": [TWO, GOOD], "rejected": [TWO, BAD]},
         "[user]two</s>[assistant]"),
        ({"input": {"messages": [TWO], "tools": [], "parallel_tool_calls": True},
          "preferred_output": [GOOD], "non_preferred_output": [BAD]}, "[user]two</s>[assistant]"),
    ],
    ids=["prompt-with-answer", "whole-chats", "prompt-as-text", "with-a-space",
         "last-message", "prompt-twice", "answers-as-text",
         "axolotl", "sharegpt", "messages-of-chosen", "openai"],
)  # fmt: skip
def test_preferences_train_the_answers_alone(tmp_path, row, prompt):
    found, _ = encoded(tmp_path, CHATML, row, pairs=True)
    assert found == [f"{prompt}⟦good</s>⟧", f"{prompt}⟦bad</s>⟧"]


def test_tools_of_an_openai_preference_reach_the_template(tmp_path):
    template = "{% if tools %}TOOLS{{ tools | tojson }}{% endif %}" + CHATML
    row = {"input": {"messages": [TWO], "tools": [{"name": "f"}]},
           "preferred_output": [GOOD], "non_preferred_output": [BAD]}  # fmt: skip
    found, _ = encoded(tmp_path, template, row, pairs=True)
    assert found[0] == 'TOOLS[{"name": "f"}][user]two</s>[assistant]⟦good</s>⟧'
    row["input"] = {"messages": "two"}
    with pytest.raises(errors.UserError, match=r"rows\.jsonl:1"):
        encoded(tmp_path, template, row | {"preferred_output": 5}, pairs=True)


def test_an_instruction_is_the_prompt_of_a_preference(tmp_path):
    row = {"instruction": "ab", "input": "cd", "chosen": "good", "rejected": "bad"}
    found, _ = encoded(tmp_path, CHATML, row, pairs=True)
    (as_answer,), _ = encoded(tmp_path, CHATML, {**row, "output": "good"})
    assert found[0] == as_answer and "### Input:\ncd" in as_answer
    assert found[1] == as_answer.replace("good", "bad")
    with pytest.raises(errors.UserError, match="input is a float"):
        encoded(tmp_path, CHATML, row | {"input": float("nan")}, pairs=True)


def test_an_answer_in_json_is_text(tmp_path):
    row = {"prompt": "ab", "chosen": '{"from": "a"}', "rejected": '[{"role": "b"}]'}
    found, _ = encoded(tmp_path, CHATML, row, pairs=True)
    assert found == ['<s>ab⟦{"from": "a"}</s>⟧', '<s>ab⟦[{"role": "b"}]</s>⟧']
    answer = '[{"role": "user", "content": "a"}]'
    found, _ = encoded(tmp_path, CHATML, {"prompt": "ab", "completion": answer})
    assert found == [f"<s>ab⟦{answer}</s>⟧"]


def test_texts_without_a_prompt_share_their_beginning(tmp_path):
    row = {"chosen": "ab ab yes", "rejected": "ab ab no"}
    found, _ = encoded(tmp_path, CHATML, row, pairs=True)
    assert found == ["<s>ab ab⟦ yes</s>⟧", "<s>ab ab⟦ no</s>⟧"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "two", "chosen": "good", "rejected": "bad"}, "begin differently"),
        ({"conversation": [TWO], "chosen": GOOD, "rejected": BAD}, "no message of a user"),
        ({"prompt": "three", "chosen": [TWO, GOOD], "rejected": [TWO, BAD]}, "not the prompt"),
    ],
)
def test_preferences_without_their_prompt_are_refused(tmp_path, row, message):
    with pytest.raises(errors.UserError, match=message):
        encoded(tmp_path, CHATML, row, pairs=True)


def test_equal_answers_are_skipped(tmp_path):
    row = {"prompt": [TWO], "chosen": [GOOD], "rejected": [GOOD]}
    _, counts = encoded(tmp_path, CHATML, row, row | {"rejected": [BAD]}, pairs=True)
    assert (len(counts.rows), counts.num_skipped) == (2, 1)


def test_a_chat_begins_with_the_ids_that_generation_begins_with(tmp_path):
    for template in (CHATML, "{{ bos_token }}" + CHATML, OPENS_THINK.replace("<think>\n", "")):
        tok = chat_tokenizer(tmp_path, template)
        chat = [{"role": "user", "content": "ab"}, CHAT[1]]
        ((ids, trained),) = encoding.encode(dataset({"messages": chat}), tok, 64, EOS).rows
        assert tokenizer.chat_prompt(tok, "ab") == ids[~trained].tolist()


def test_the_token_that_ends_a_turn_stops_generation(tmp_path):
    template = CHATML.replace("{{ eos_token }}", "<unk>")
    folder = tiny_tokenizer.save(tmp_path / "chat", chat_template=template)
    tok = tokenizer.load(folder)
    assert chat.stop_ids(tok, folder) == (EOS, tok.unk_token_id)
    plain = tiny_tokenizer.save(tmp_path / "plain", chat_template=PLAIN)
    assert chat.stop_ids(tokenizer.load(plain), plain) == (EOS,)
    assert chat.end_note(tok) == ""
    assert "writes nothing after an answer" in chat.end_note(tokenizer.load(plain))
    split = tiny_tokenizer.save(
        tmp_path / "split", chat_template=CHATML.replace("{{ eos_token }}", "ab")
    )
    assert "ends answers with 'ab', which is not one token" in chat.end_note(tokenizer.load(split))
    marked = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    tok = tokenizer.load(tiny_tokenizer.save(tmp_path / "marked", chat_template=marked))
    tokens = ("<|user|>", "<|end|>", "<|assistant|>")  # in the order of a chat
    named = " ".join(f'"{token}"' for token in tokens)
    assert chat.end_note(tok).endswith(f"train with --add-special-tokens {named}")
    tokenizer.add(tok, (), tokens, len(tok))
    assert chat.end_note(tok) == "" and chat.stop_ids(tok, folder)[-1] == len(tok) - 2


def test_an_adapters_own_template_is_used(tmp_path):
    base = tiny_tokenizer.save(tmp_path / "base", chat_template=CHATML)
    (tmp_path / "adapter").mkdir()
    same = tokenizer.load(base, tmp_path / "adapter")
    assert same.chat_template == CHATML
    (tmp_path / "adapter/chat_template.jinja").write_text(PLAIN)
    assert tokenizer.load(base, tmp_path / "adapter").chat_template == PLAIN
    whole = tiny_tokenizer.save(tmp_path / "whole", chat_template=OTHER_END)
    assert tokenizer.load(base, whole).chat_template == OTHER_END
    tokenizer.copy(whole, base)
    tokenizer.keep_stops(base, (2, 0))
    reader = tokenizer.load(base)
    assert reader.chat_template == OTHER_END and tokenizer.eos_ids(reader, base) == (2, 0)


def test_another_chat_template_replaces_that_of_the_tokenizer(tmp_path):
    base = tiny_tokenizer.save(tmp_path / "base", chat_template=CHATML)
    (tmp_path / "mine.jinja").write_text(PLAIN, encoding="utf-8-sig")
    named = [{"name": "default", "template": PLAIN}, {"name": "rag", "template": "{{ 1 }}"}]
    tiny_tokenizer.save(tmp_path / "several", chat_template=named)
    for source, expected in (
        ("mine.jinja", PLAIN),
        ("base/tokenizer_config.json", CHATML),
        ("several", {"default": PLAIN, "rag": "{{ 1 }}"}),
        ("base", CHATML),
    ):
        given = str(tmp_path / source)
        assert tokenizer.load(base, chat_template=given).chat_template == expected
        assert tokenizer.load(base, tmp_path / "several", chat_template=given).chat_template == (
            expected
        )
        copied = tmp_path / f"copy-{pathlib.PurePath(source).name}"
        copied.mkdir()
        tokenizer.copy_chat_template(given, copied)
        assert tokenizer.load(base, copied).chat_template == expected
    assert tokenizer.load(base).chat_template == CHATML
    assert tokenizer.load(base, chat_template=PLAIN).chat_template == PLAIN  # in a YAML file


def test_the_template_of_a_processor_is_used_where_the_tokenizer_has_none(tmp_path):
    base = tiny_tokenizer.save(tmp_path / "base")
    (base / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    assert tokenizer.load(base).chat_template == PLAIN
    own = tiny_tokenizer.save(tmp_path / "own", chat_template=CHATML)
    (own / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    assert tokenizer.load(own).chat_template == CHATML


def test_a_chat_template_that_is_not_there_is_named(tmp_path, monkeypatch):
    base = tiny_tokenizer.save(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jinja").write_text("")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    for source, told in (
        ("chatml", "Jinja file, or the folder or hub id"),
        ("base", "the chat variant of the model"),
        ("empty.jinja", "the chat variant of the model"),
        ("latin.jinja", "can't decode"),
        ("./none.jinja", "Jinja file, or the folder or hub id"),
    ):
        with pytest.raises(errors.UserError, match=told):
            tokenizer.load(base, chat_template=source)


def named(**templates):
    return json.dumps({"chat_template": [{"name": n, "template": t} for n, t in templates.items()]})


def test_named_templates_beside_an_adapter(tmp_path):
    base = tiny_tokenizer.save(tmp_path / "base", chat_template=CHATML)
    adapter = tmp_path / "adapter"
    others = adapter / "additional_chat_templates"
    others.mkdir(parents=True)
    (adapter / "tokenizer_config.json").write_text(named(default=PLAIN))
    assert tokenizer.load(base, adapter).chat_template == PLAIN
    (adapter / "tokenizer_config.json").write_text(named(tool_use=PLAIN))  # beside the base's own
    assert tokenizer.load(base, adapter).chat_template == {"default": CHATML, "tool_use": PLAIN}
    (adapter / "tokenizer_config.json").write_text(named(default=PLAIN, tool_use=OTHER_END))
    both = {"default": PLAIN, "tool_use": OTHER_END}
    assert tokenizer.load(base, adapter).chat_template == both
    tokenizer.copy(adapter, base)  # as a merge does
    assert tokenizer.load(base).chat_template == both
    (others / "tool_use.jinja").write_text(CHATML)  # files precede tokenizer_config.json
    (adapter / "chat_template.jinja").write_text(OTHER_END)
    assert tokenizer.load(base, adapter).chat_template == {
        "default": OTHER_END, "tool_use": CHATML
    }  # fmt: skip
    (others / "tool_use.jinja").unlink()
    tokenizer.copy(adapter, base)
    assert tokenizer.load(base).chat_template == OTHER_END


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("chat_template.jinja", b"\xe9"),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", named(default=None).encode()),
        ("tokenizer_config.json", named(**{"../x": CHATML}).encode()),
    ],
)
def test_a_template_that_cannot_be_read_is_named(tmp_path, name, data):
    base = tiny_tokenizer.save(tmp_path / "base", chat_template=CHATML)
    (tmp_path / "adapter").mkdir()
    for folder in (tmp_path / "adapter", base):
        (folder / name).write_bytes(data)
        with pytest.raises(errors.UserError, match="a chat template") as caught:
            tokenizer.load(base, None if folder == base else folder)
        assert f"{folder}/{name}" in str(caught.value)


def test_a_clock_can_be_stopped(tmp_path):
    template = "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ day() }}" + CHATML
    tok = chat_tokenizer(tmp_path, template)
    assert clock.is_read(tok)
    clock.stop(tok, "2024-02-29T12:00")
    ((ids, trained),) = encoding.encode(dataset({"messages": CHAT[:2]}), tok, 64, EOS).rows
    assert marked(tok, (ids, trained)) == "29 Feb 2024[user]ab cd</s>[assistant]⟦yes</s>⟧"
    assert not clock.is_read(chat_tokenizer(tmp_path, CHATML))


def test_long_chats_take_time_in_proportion(tmp_path, monkeypatch):
    tok = chat_tokenizer(tmp_path, CHATML)
    rendered = []
    render = tok.apply_chat_template
    monkeypatch.setattr(
        tok, "apply_chat_template", lambda c, **how: rendered.append(len(c)) or render(c, **how)
    )
    encoding.encode(dataset({"messages": CHAT * 50}), tok, 10_000, EOS)
    assert sum(rendered) < 3 * 200
