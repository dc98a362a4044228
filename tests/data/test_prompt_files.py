"""Prompts for generation: lines, examples of data files, and their ids."""

import json
import os
import threading

import pytest
import tiny_tokenizer

from lora_jax import errors, tokenizer
from lora_jax.data import encoding, prompt_files
from lora_jax.data.chats import chat

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}_{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "ab"}
ANSWER = {"role": "assistant", "content": "cd"}


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    read = tokenizer.load(tiny_tokenizer.save(tmp_path_factory.mktemp("tokenizer")))
    read.chat_template = TEMPLATE
    return read


def written(tmp_path, *rows):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_line_of_a_text_file_is_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone \r\n\n  \n two\u2028three\x0c\nfour".encode())
    found = prompt_files.read(path)
    assert [each.value for each in found] == ["one ", " two\u2028three\x0c", "four"]
    assert [each.origin for each in found] == [f"{path}:{n}" for n in (1, 4, 5)]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_lines_in_utf_16_are_read(tmp_path, encoding):
    """PowerShell 5 writes them with >."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("one 東京\r\ntwo\r\n".encode(encoding))
    assert [each.value for each in prompt_files.read(path)] == ["one 東京", "two"]


def test_a_pipe_is_read_once(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text("a\nb\n"))
    writer.start()
    assert [each.value for each in prompt_files.read(path)] == ["a", "b"]
    writer.join()


def test_examples_of_all_kinds_give_the_prompts_of_training(tmp_path, reader):
    text = {"prompt": "ab cd", "completion": "x"}
    instruction = {"instruction": "ab", "input": "cd", "output": "x"}
    chats = [
        {"messages": [USER]},
        {"prompt": [USER]},
        {"conversations": [{"from": "human", "value": "ab"}]},
        {"prompt": [USER], "messages": [USER, ANSWER]},
    ]
    found = prompt_files.read(written(tmp_path, text, instruction, {"text": "b"}, *chats))
    ids = [each.tolist() for each in prompt_files.encode(found, reader)]
    trained = encoding.prompts([text, instruction], reader)
    assert ids[:2] == [each.tolist() for each, _ in trained]
    assert [ids[2]] == tokenizer.encode(reader, ["b"])
    whole = chat.Encoder(reader).encode([USER, ANSWER], {})
    assert all(each == whole.ids[~whole.trained].tolist() for each in ids[3:])
    assert len(ids) == 7


def test_a_text_is_a_users_message_with_chat(tmp_path, reader):
    found = prompt_files.read(written(tmp_path, {"prompt": "ab"}, {"messages": [USER]}))
    one, other = prompt_files.encode(found, reader, as_chat=True)
    assert one.tolist() == other.tolist() == tokenizer.chat_prompt(reader, "ab")


def test_a_last_answer_is_continued_as_in_transformers(tmp_path, reader):
    (found,) = prompt_files.read(written(tmp_path, {"messages": [USER, ANSWER]}))
    assert found.continues
    (ids,) = prompt_files.encode([found], reader)
    theirs = reader.apply_chat_template(
        [USER, ANSWER], continue_final_message=True, return_dict=True
    )
    assert ids.tolist() == theirs["input_ids"]


def test_all_examples_without_a_prompt_are_named_with_their_lines(tmp_path):
    path = written(tmp_path, {"prompt": "a"}, {"question": "b"}, {"prompt": 5}, {"messages": []})
    path.write_text(path.read_text() + '\n{"prompt": "b"\n{"prompt": "a", "prompt": "b"}\n')
    with pytest.raises(errors.UserError) as error:
        prompt_files.read(path)
    message = str(error.value)
    for part in (
        ":2: only the fields question",
        ":3: prompt is a int",
        ":4: messages is empty",
        ":6: Expecting",
        ":7: the key prompt twice",
    ):
        assert f"{path}{part}" in message, (part, message)


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl"])
def test_a_file_that_is_not_there_is_refused(tmp_path, name):
    with pytest.raises(errors.UserError, match="No such file"):
        prompt_files.read(tmp_path / name)


def test_chats_that_cannot_be_rendered_are_refused_with_their_lines(tmp_path, reader):
    path = written(tmp_path, {"messages": [{"role": "queen", "content": "a"}]}, {"prompt": "a"},
                   {"instruction": "a", "history": ["b"]})  # fmt: skip
    found = prompt_files.read(path)
    with pytest.raises(errors.UserError, match=r"prompts\.jsonl:1: unknown role 'queen'"):
        prompt_files.encode(found[:2], reader)
    with pytest.raises(errors.UserError, match=r"prompts\.jsonl:3: a history with the turn b"):
        prompt_files.encode(found[1:], reader, as_chat=True)
