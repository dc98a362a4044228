"""Examples of each kind → token ids with loss masks."""

import datasets
import numpy as np
import pytest
import tiny_tokenizer

from lora_jax import errors, tokenizer
from lora_jax.data import encoding, sources

BOS, EOS = tiny_tokenizer.BOS, tiny_tokenizer.EOS
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer.load(tiny_tokenizer.save(tmp_path_factory.mktemp("tokenizer")))


def dataset(*examples):
    return datasets.Dataset.from_list(list(examples))


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def trained_text(tok, example):
    ids, trained = example
    return tok.decode(ids[trained])


def test_prompt_completion_trains_completion_and_eos(tok):
    prompt, completion = "ab cd?", " cd ab"
    encoded = encoding.encode(dataset({"prompt": prompt, "completion": completion}), tok, 64, EOS)
    ((ids, trained),) = encoded.rows
    prompt_ids = tok(prompt).input_ids
    assert ids.dtype == np.int32 and trained.dtype == bool
    # What generation starts from is exactly the untrained part.
    assert ids[~trained].tolist() == ids[: len(prompt_ids)].tolist() == prompt_ids
    assert ids.tolist() == [*tok(prompt + completion).input_ids, EOS]
    assert (ids == BOS).sum() == (ids == EOS).sum() == 1
    assert tok.decode(ids[1:-1]) == prompt + completion
    assert (encoded.num_cut, encoded.num_skipped) == (0, 0)


@pytest.mark.parametrize("example", [
    {"prompt": "ab cd?", "completion": " cd ab"},
    {"instruction": "Say a.", "output": "a"},
    {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]},
])  # fmt: skip
def test_inputs_are_trained_if_asked_for(tok, monkeypatch, example):
    monkeypatch.setattr(tok, "chat_template", TEMPLATE)
    plain, whole = (
        encoding.encode(dataset(example), tok, 512, EOS, train_on_inputs=asked).rows
        for asked in (False, True)
    )
    assert np.array_equal(plain[0][0], whole[0][0])
    assert not plain[0][1].all() and whole[0][1].all()


def test_inputs_are_not_trained_beside_answers_that_are_not(tok, monkeypatch):
    monkeypatch.setattr(tok, "chat_template", TEMPLATE)
    answers = [{"role": "assistant", "content": "cd", "weight": n} for n in (1, 0)]
    chat = [{"role": "user", "content": "ab"}, *answers]
    with pytest.raises(errors.UserError, match="message 3 has weight 0, which --train-on-inputs"):
        encoding.encode([{"messages": chat}], tok, 512, EOS, train_on_inputs=True)


@pytest.mark.parametrize("beside, ids, trained", [
    ({}, [1, 5, 6, 7], [1, 1, 1, 1]),
    ({"labels": [-100, -100, 6, 7]}, [1, 5, 6, 7], [0, 0, 1, 1]),
    ({"completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 0, 1, 1]}, [1, 5, 6, 7],
     [0, 0, 1, 1]),
    ({"labels": [1, 5, 6, -100], "attention_mask": [1, 1, 1, 0]}, [1, 5, 6], [1, 1, 1]),
])  # fmt: skip
def test_token_ids_are_taken_as_they_are(tok, beside, ids, trained):
    rows = [{"input_ids": [1, 5, 6, 7], **beside}, {"prompt": "ab", "completion": "cd"}]
    found, text = encoding.encode(rows, tok, 64, EOS).rows
    assert (found[0].tolist(), found[1].tolist()) == (ids, trained)
    assert tok.decode(text[0], skip_special_tokens=True) == "abcd"


@pytest.mark.parametrize("row, problem", [
    ({"input_ids": "1 5"}, "input_ids is not a list of token ids"),
    ({"input_ids": [1, -5]}, "input_ids is not a list of token ids"),
    ({"input_ids": [1, 5], "labels": [1]}, "labels is not a list of 2 whole numbers"),
    ({"input_ids": [1, 5], "labels": [1, 6]}, "labels has others than those of input_ids"),
    ({"input_ids": [1, 5], "attention_mask": [2, 1]}, "attention_mask has other values than 0"),
])  # fmt: skip
def test_token_ids_that_cannot_be_read_are_refused(tok, row, problem):
    with pytest.raises(errors.UserError, match=problem):
        encoding.encode([row], tok, 64, EOS)


def test_a_token_across_the_border_is_not_merged(tok):
    # "ab" is one token, but generation will see the prompt "xa" alone.
    ((ids, trained),) = encoding.encode(
        dataset({"prompt": "xa", "completion": "b"}), tok, 64, EOS
    ).rows
    prompt_ids = tok("xa").input_ids
    assert tok("xab").input_ids[: len(prompt_ids)] != prompt_ids
    assert ids[: len(prompt_ids)].tolist() == prompt_ids
    assert tok.convert_ids_to_tokens(ids[trained]) == ["b", "</s>"]  # and no dummy space
    assert tok.decode(ids[1:-1]) == "xab"


def test_a_space_at_the_border(tok):
    ((ids, trained),) = encoding.encode(
        dataset({"prompt": "x ", "completion": "ab"}), tok, 64, EOS
    ).rows
    assert tok.decode(ids[1:-1]) == "x ab"
    assert tok.convert_ids_to_tokens(ids[trained]) == ["ab", "</s>"]


def test_alpaca_examples_use_the_template(tok):
    examples = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say a.", "input": "", "output": "a"},
        {"instruction": "Say b.", "input": None, "output": "b"},
    ]
    encoded = encoding.encode(dataset(*examples), tok, 512, EOS)
    texts = [tok.decode(ids[1:]) for ids, _ in encoded.rows]
    assert texts[0] == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Add.\n\n### Input:\n1 and 2\n\n### Response:3</s>"
    )
    assert texts[1] == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay a.\n\n### Response:a</s>"
    )
    assert [trained_text(tok, example) for example in encoded.rows] == [
        "3</s>",
        "a</s>",
        "b</s>",
    ]


def test_braces_in_a_field_are_text(tok):
    fields = {"instruction": "{input} {x}", "input": "{instruction}", "output": "{}"}
    ((ids, _),) = encoding.encode(dataset(fields), tok, 512, EOS).rows
    assert "### Instruction:\n{input} {x}\n\n### Input:\n{instruction}\n" in tok.decode(ids)


def test_text_examples_train_everything(tok):
    ((ids, trained),) = encoding.encode(dataset({"text": "ab cd"}), tok, 64, EOS).rows
    assert ids.tolist() == [*tok("ab cd").input_ids, EOS]
    assert (ids[0], ids[-1]) == (BOS, EOS)
    assert trained.all()


def test_kinds_have_an_order(tok):
    fields = {"text": "no", "prompt": "x", "completion": "ab", "instruction": "no", "output": "no"}
    encoded = encoding.encode(dataset(fields, {**fields, "completion": None}), tok, 512, EOS)
    # Each example has its own kind: without a completion, Alpaca's fields are next.
    assert [trained_text(tok, example) for example in encoded.rows] == ["ab</s>", "no</s>"]


def test_missing_fields_are_named_with_file_and_line(tok, tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        '{"prompt": "a", "completion": "b"}',
        '{"prompt": "a"}',
        '{"completion": "b", "id": 1}',
    )
    with pytest.raises(errors.UserError) as caught:
        encoding.encode(sources.load(path), tok, 64, EOS)
    for words in ("x.jsonl:2", "x.jsonl:3", "fields prompt", "completion, id", "--columns"):
        assert words in str(caught.value)
    assert "x.jsonl:1" not in str(caught.value)

    # After a split, too, the line numbers are those of the file.
    train, evaluation = sources.holdout(sources.load(path), 0.34, 0)
    with pytest.raises(errors.UserError, match=r"x\.jsonl:[23]"):
        encoding.encode(train, tok, 64, EOS)
    assert len(evaluation) == 1

    path = write(tmp_path / "x.csv", "prompt, completion", "a, b")
    with pytest.raises(errors.UserError, match="fields prompt, ' completion'"):
        encoding.encode(sources.load(path), tok, 64, EOS)


def test_a_field_that_is_not_a_string(tok, tmp_path):
    path = write(tmp_path / "x.jsonl", '{"prompt": "a", "completion": 5}')
    with pytest.raises(errors.UserError, match=r"completion is a int[\s\S]*x\.jsonl:1"):
        encoding.encode(sources.load(path), tok, 64, EOS)


def test_cuts_and_skips_are_counted(tok):
    examples = [
        {"prompt": "x", "completion": "y"},  # BOS ▁ x y EOS
        {"prompt": "x", "completion": "yzyzyz"},  # loses its end
        {"prompt": "xyzxyz", "completion": "a"},  # only the prompt would remain
    ]
    encoded = encoding.encode(dataset(*examples), tok, 5, EOS)
    assert [tok.decode(ids[1:]) for ids, _ in encoded.rows] == ["xy</s>", "xyz"]
    assert (encoded.num_cut, encoded.num_skipped) == (2, 1)
    with pytest.raises(errors.UserError, match="--seq-len"):
        encoding.encode(dataset(examples[2]), tok, 5, EOS)


def test_a_txt_file_is_one_stream_in_blocks(tok, tmp_path):
    text = "ab cd\n\n  ef\r\ngh " * 5
    path = tmp_path / "x.txt"
    path.write_bytes(text.encode())
    encoded = encoding.encode(sources.load(str(path)), tok, 16, EOS)
    stream = tok(text).input_ids
    assert np.concatenate([ids for ids, _ in encoded.rows]).tolist() == stream
    assert [len(ids) for ids, _ in encoded.rows[:-1]] == [16] * (len(stream) // 16)
    assert all(trained.all() for _, trained in encoded.rows)
    assert (encoded.num_cut, encoded.num_skipped) == (0, 0)
    # Of several files none begins within the last line of another.
    for name, words in (("a", "one"), ("b", "two\n"), ("c", "three")):
        (tmp_path / f"folder-{name}.txt").write_text(words)
    (row, *_), *_ = encoding.encode(sources.load(f"{tmp_path}/folder-*.txt"), tok, 64, EOS).rows
    assert row.tolist() == tok("one\ntwo\nthree").input_ids
    # A single last token predicts nothing.
    tail = encoding.encode(sources.load(str(path)), tok, len(stream) - 1, EOS)
    assert [len(ids) for ids, _ in tail.rows] == [len(stream) - 1]


def test_prompts_for_exact_match(tok):
    examples = [
        {"prompt": "xa", "completion": "b", "instruction": None, "output": None},
        {"prompt": None, "completion": None, "instruction": "Say.", "output": "ok"},
    ]
    encoded = encoding.encode(dataset(*examples), tok, 512, EOS).rows
    for (ids, expected), (trained_ids, trained), text in zip(
        encoding.prompts(dataset(*examples), tok), encoded, ("b", "ok"), strict=True
    ):
        assert ids.tolist() == trained_ids[~trained].tolist()
        assert expected == text
    with pytest.raises(errors.UserError, match="expected answer"):
        encoding.prompts(dataset({"text": "a"}), tok)


def test_long_texts_are_split_and_nothing_is_left_out(tok):
    rows = [{"text": "ab cd " * 9}, {"prompt": "ab " * 20, "completion": "cd"}, {"text": "ab"}]
    whole = encoding.encode(rows, tok, 512, EOS).rows
    split = encoding.encode(rows, tok, 16, EOS, split_texts=True)
    (ids, _), parts = whole[0], [ids for ids, _ in split.rows[:-1]]
    assert len(parts) > 1 and np.concatenate(parts).tolist() == ids.tolist()
    assert max(map(len, parts)) == 16 and all(trained.all() for _, trained in split.rows)
    assert split.rows[-1][0].tolist() == whole[2][0].tolist()
    assert (split.num_cut, split.num_skipped) == (1, 1)  # the prompt fills a sequence
