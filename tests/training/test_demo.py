"""The included demo: pretraining has not seen its task, and the program reproduces its files."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import re
import struct

import demo_corpus
import pytest
import tokenizers

import lora_jax
from lora_jax.optim import config as optim_config

FOLDER = pathlib.Path(lora_jax.__file__).parent / "assets" / "demo"
NUM_TRAIN, NUM_EVAL = 4096, 256


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()]


def person(row: dict) -> str:
    return json.loads(row["completion"])["name"]


@functools.cache
def documents() -> list[str]:
    """Enough documents to go beyond the drills, so that all kinds are included."""
    num = demo_corpus.NUM_DRILLS + 20_000
    return list(itertools.islice(demo_corpus.corpus(seed=0), num))


def held_out_people() -> set[str]:
    people = {
        f"{first} {start}{end}"
        for first in demo_corpus.FIRST_NAMES
        for start in demo_corpus.SURNAME_STARTS
        for end in demo_corpus.SURNAME_ENDS
    }
    return {name for name in people if demo_corpus.is_held_out(name)}


def test_evaluation_examples_are_about_people_not_in_the_training_data():
    train, evaluation = read("train.jsonl"), read("eval.jsonl")
    assert len(evaluation) >= 256
    assert len({row["prompt"] for row in evaluation}) == len(evaluation)
    assert all(demo_corpus.is_held_out(person(row)) for row in evaluation)
    assert not any(demo_corpus.is_held_out(person(row)) for row in train)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}


@pytest.mark.long
def test_pretraining_never_names_a_held_out_person():
    held_out = held_out_people()
    assert {person(row) for row in read("eval.jsonl")} <= held_out
    pairs = {pair for text in documents() for pair in re.findall(r"(?=\b(\w+ \w+)\b)", text)}
    assert pairs & {person(row) for row in read("train.jsonl")}  # this pattern does find names
    assert not pairs & held_out


def test_pretraining_never_shows_a_json_object():
    for text in documents():
        assert not re.search(r'"\s*:', text), text  # no quoted key with a colon
        for braces in re.findall(r"\{[^{}]*\}", text):
            with pytest.raises(json.JSONDecodeError):
                json.loads(braces)


@pytest.mark.long
def test_every_token_of_the_answers_occurs_in_pretraining():
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    answers = [row["completion"] for row in read("train.jsonl") + read("eval.jsonl")]
    missing = {i for encoded in tokenizer.encode_batch(answers) for i in encoded.ids}
    for first in range(0, len(documents()), 1000):
        some = tokenizer.encode_batch(documents()[first : first + 1000])
        missing -= {i for encoded in some for i in encoded.ids}
        if not missing:
            return
    raise AssertionError(f"never seen: {missing}")


@pytest.mark.parametrize(
    "name, num, held_out", [("train", NUM_TRAIN, False), ("eval", NUM_EVAL, True)]
)
def test_the_program_writes_these_examples(name, num, held_out):
    rows = demo_corpus.rows(seed=0, num=num, held_out=held_out)
    assert read(f"{name}.jsonl") == [dataclasses.asdict(row) for row in rows]


def test_answers_are_copied_from_the_sentence():
    for row in read("eval.jsonl"):
        answer = json.loads(row["completion"])
        assert tuple(answer) == demo_corpus.ANSWER_KEYS
        assert all(str(value) in row["prompt"] for value in answer.values())


def test_the_demo_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000
    with open(FOLDER / "model.safetensors", "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    assert {entry["dtype"] for entry in tensors} == {"BF16"}
    assert 1_000_000 <= sum(math.prod(entry["shape"]) for entry in tensors) <= 4_000_000


def test_tokenizer_splits_digits_and_joins_back():
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    row = read("eval.jsonl")[0]
    text = row["prompt"] + row["completion"]
    encoded = tokenizer.encode(text)
    assert encoded.tokens[0] == "<bos>"
    assert tokenizer.decode(encoded.ids) == text
    apart = [tokenizer.encode(part, add_special_tokens=False).ids for part in row.values()]
    assert apart[0] + apart[1] == encoded.ids[1:]
    assert not any(re.search(r"\d\d", token) for token in tokenizer.get_vocab())


def test_the_chat_template_gives_the_text_of_an_example():
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(FOLDER)
    row = read("eval.jsonl")[0]
    chat = [
        {"role": "user", "content": row["prompt"].removesuffix("\n")},
        {"role": "assistant", "content": row["completion"]},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == f"<bos>{row['prompt']}{row['completion']}<eos>"


def test_settings_are_known():
    settings = json.loads((FOLDER / "settings.json").read_text("utf-8"))
    known = {"batch_size", "grad_accum", "seq_len", "max_steps", "remat", "exact_match"}
    known |= {
        "max_new_tokens",
        *(field.name for field in dataclasses.fields(optim_config.OptimConfig)),
    }
    assert set(settings) <= known
    assert settings["exact_match"] >= 256
    assert {"batch_size", "seq_len", "max_steps", "lr"} <= set(settings)
