"""Chats: rendered by the template, with the assistant's turns trained."""

import json

import numpy as np
import pytest
import tiny_tokenizer
from test_encoding import EOS, dataset, trained_text, write

from lora_jax import errors, tokenizer
from lora_jax.data import encoding, sources

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
    ((ids, trained),) = encoding.encode(dataset({"messages": CHAT}), tok, 256, EOS).examples
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
    assert [trained_text(tok, example) for example in encoded.examples] == ["22", "33"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("{{ eos_token }}", "{{ messages|length }}"), "turn 2 changes"),
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
