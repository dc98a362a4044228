"""Examples of texts as chats."""

import json

import pytest

from lora_jax import errors
from lora_jax.data import encoding, fields, prompt_files, sources
from lora_jax.data.examples import as_chats, kinds, preferences

USER, ANSWER = {"role": "user", "content": "ab\ncd"}, {"role": "assistant", "content": "yes"}
BEFORE = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
HISTORY = [["one", "two"]]


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"prompt": "ab\ncd", "completion": "yes", "input": "x"}, [USER, ANSWER]),
        ({"prompt": "ab\ncd", "completion": "yes", "history": "Roman"}, [USER, ANSWER]),
        ({"instruction": "ab", "input": "cd", "output": "yes"}, [USER, ANSWER]),
        ({"instruction": "ab\ncd", "input": "", "output": "yes", "history": []}, [USER, ANSWER]),
        ({"instruction": "ab", "input": "cd", "output": "yes", "history": HISTORY},
         [*BEFORE, USER, ANSWER]),
    ],
)  # fmt: skip
def test_texts_become_chats(row, chat):
    (found,) = as_chats.convert([row | {"system": "Be", "x": 1}], in_pairs=False)
    assert found == {"messages": chat, "system": "Be"}


def test_a_preference_of_texts_becomes_a_chat():
    row = {"instruction": "ab", "input": "cd", "history": HISTORY, "system": "Be"}
    (found,) = as_chats.convert([row | {"chosen": "yes", "rejected": "no"}], in_pairs=True)
    pair = preferences.read(found)
    assert pair.num_prompt == 4 and [chat[-1]["content"] for chat in pair.chats] == ["yes", "no"]
    assert pair.chats[0] == [{"role": "system", "content": "Be"}, *BEFORE, USER, ANSWER]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"},
        {"messages": [USER, ANSWER]},
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
        {"instruction": "a", "output": 5},
    ],
)
def test_other_examples_stay(row):
    assert as_chats.convert([row], in_pairs=False) == [row]
    pair = {"prompt": "a", "chosen": [ANSWER], "rejected": [ANSWER]}
    assert as_chats.convert([pair], in_pairs=True) == [pair]


def test_a_history_is_never_left_out(tmp_path):
    row = {"instruction": "ab", "output": "yes", "history": HISTORY}
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(errors.UserError, match="history of turns, which --as-chat"):
        kinds.kinds_of(sources.load(str(path)))
    assert (
        kinds.kinds_of([row | {"history": "Roman"}, row | {"history": "[]"}]) == [kinds.ALPACA] * 2
    )
    row |= {"chosen": "yes", "rejected": "no"}
    with pytest.raises(errors.UserError, match="history of turns, which --as-chat"):
        encoding.encode_pairs([row], None, 9, 2)
    with pytest.raises(errors.UserError, match=r"the turn \['one'\]"):
        as_chats.convert([row | {"history": [["one"]]}], in_pairs=False)


def test_the_columns_of_a_chat_are_used(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        json.dumps({"instruction": "a", "output": "b", "system": "c", "history": HISTORY})
    )
    found = sources.load(str(path))
    assert fields.unused(found, in_pairs=False) == "system, history"
    assert fields.unused(found, in_pairs=False, as_chat=True) == ""


def test_a_prompt_to_generate_from_is_that_of_training(tmp_path):
    path = tmp_path / "x.jsonl"
    row = {"instruction": "ab", "input": "cd", "system": "Be", "history": HISTORY, "output": "yes"}
    path.write_text(json.dumps(row))
    (prompt,) = prompt_files.read(path, as_chat=True)
    (example,) = as_chats.convert([row], in_pairs=False)
    assert prompt_files.chat_of(prompt) == [
        {"role": "system", "content": "Be"},
        *example["messages"][:-1],
    ]
