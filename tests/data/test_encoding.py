"""Files → rows with loss masks → batches."""

import json
import pathlib
import subprocess
import sys

import datasets
import hub_server
import numpy as np
import pytest
import tiny_tokenizer

from lora_jax import errors, tokenizer
from lora_jax.data import encoding, sources

BOS, EOS = tiny_tokenizer.BOS, tiny_tokenizer.EOS
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


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer.load(tiny_tokenizer.save(tmp_path_factory.mktemp("tokenizer")))


def chat_tokenizer(tmp_path, template):
    return tokenizer.load(tiny_tokenizer.save(tmp_path / "chat", chat_template=template))


def dataset(*rows):
    return datasets.Dataset.from_list(list(rows))


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def trained_text(tok, row):
    ids, trained = row
    return tok.decode(ids[trained])


# ---------------------------------------------------------------------------------- reading


def test_every_format_gives_the_same_rows(tmp_path):
    rows = [{"prompt": "a, b", "completion": "1"}, {"prompt": 'say "c"\nd', "completion": "2"}]
    lines = [json.dumps(row) for row in rows]
    files = [
        write(tmp_path / "x.jsonl", lines[0], "", lines[1]),
        write(tmp_path / "x.json", json.dumps(rows, indent=1)),
        write(tmp_path / "lines.json", *lines),
        write(tmp_path / "x.csv", "prompt,completion", '"a, b",1', '"say ""c""\nd",2'),
    ]
    dataset(*rows).to_parquet(tmp_path / "x.parquet")
    loaded = [sources.load(file) for file in [*files, str(tmp_path / "x.parquet")]]
    for one in loaded:
        assert sources.fields_of(one) == ["prompt", "completion"]
        assert [{k: row[k] for k in rows[0]} for row in one] == rows
    # The origin is no part of the content: equal rows have equal fingerprints.
    assert len({sources.fingerprint(one) for one in loaded}) == 1


def test_malformed_lines_are_all_named(tmp_path):
    path = write(
        tmp_path / "x.jsonl", '{"text": "a"}', '{"text": ', "[1]", "", '{"text": "b"}', "x"
    )
    with pytest.raises(errors.UserError) as caught:
        sources.load(path)
    for number in (2, 3, 6):
        assert f"x.jsonl:{number}" in str(caught.value)
    assert "x.jsonl:1" not in str(caught.value)
    assert "x.jsonl:5" not in str(caught.value)

    path = write(tmp_path / "many.jsonl", *["broken"] * 30)
    with pytest.raises(errors.UserError) as caught:
        sources.load(path)
    assert "many.jsonl:20" in str(caught.value)
    assert "many.jsonl:21" not in str(caught.value)
    assert "10 more" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "empty"),
        ("x.jsonl", b"\n\n", "empty"),
        ("x.txt", b"", "empty"),
        ("x.csv", b"text\n", "empty"),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", r"x\.csv:3"),
        ("x.csv", b'a,b\n1,"2\n', r"x\.csv:2"),
        ("x.json", b'[{"text": "a"},\n 1,]', r"x\.json:2"),
        ("x.json", b'[{"text": "a"}, 1]', "element 2"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"x\.jsonl:2"),
        ("x.jsonl", b'{"text": "a"}\n{"text": 5}\n', "one type"),
        ("x.parquet", b"not parquet", r"x\.parquet"),
        ("x.xml", b"<a/>", r"\.jsonl"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.UserError, match=message):
        sources.load(str(tmp_path / name))


def test_missing_files(tmp_path):
    for name in ("missing.jsonl", str(tmp_path / "missing"), "./missing", str(tmp_path)):
        with pytest.raises(errors.UserError, match=r"no such file|a folder"):
            sources.load(name)


def test_reading_leaves_no_files(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    one = sources.load(write(tmp_path / "x.jsonl", *['{"text": "a"}'] * 9))
    sources.holdout(one, 0.5, 0)
    assert list(cache.iterdir()) == []
    assert one.cache_files == []


def test_columns_are_renamed(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        json.dumps({"question": "q", "answer": "a", "text": "t", "completion": "old", "id": 1}),
    )
    mapped = sources.load(path, columns={"prompt": "question", "completion": "answer"})
    # The mapped kind wins: text is dropped, the old completion is replaced, id stays.
    assert sorted(sources.fields_of(mapped)) == ["completion", "id", "prompt"]
    assert (mapped[0]["prompt"], mapped[0]["completion"]) == ("q", "a")

    swapped = sources.load(path, columns={"prompt": "completion", "completion": "question"})
    assert (swapped[0]["prompt"], swapped[0]["completion"]) == ("old", "q")


def test_unknown_columns_list_what_there_is(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"question": "q", "answer": "a"}')
    with pytest.raises(errors.UserError) as caught:
        sources.load(path, columns={"prompt": "Question", "reply": "answer"})
    for words in ("question, answer", "no column Question", "no field reply", "--columns"):
        assert words in str(caught.value)


def test_hub_datasets(tmp_path):
    """Found, and each way of not finding it; in a process that knows only the loopback hub."""
    repo = tmp_path / "repo"
    repo.mkdir()
    write(repo / "train.jsonl", '{"question": "a", "answer": "b"}')
    write(repo / "test.jsonl", '{"question": "c", "answer": "d"}')
    many = tmp_path / "many"
    many.mkdir()
    write(many / "train.jsonl", *(json.dumps({"text": f"row {n}"}) for n in range(6)))
    script = (
        "import json\n"
        "from lora_jax import errors; from lora_jax.data import sources\n"
        "def tell(*args, **options):\n"
        "    try: print(sources.load(*args, **options)[0])\n"
        "    except errors.UserError as error: print(str(error))\n"
        "tell('o/d@test', columns={'prompt': 'question', 'completion': 'answer'})\n"
        "tell('o/d@dev')\n"
        "found = [*sources.stream('o/many')]\n"
        "state, number = json.loads(json.dumps(found[3].after))\n"
        "rest = [each.example['text'] for each in sources.stream('o/many', (state, number))]\n"
        "print('rest', number, *rest, sources.version('o/many'), end='')\n"
        "tell('o/gated')\n"
        "tell('o/missing')\n"
    )
    with hub_server.serve({"o/d": repo, "o/many": many}, gated=("o/gated",)) as server:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=server.environment(tmp_path / "home"),
            cwd=pathlib.Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    found, no_split, gated, missing = done.stdout.replace("\n\n", "\n").split("\n  expected:")
    assert "'prompt': 'c', 'completion': 'd'" in found
    assert "train" in no_split and "test" in no_split
    # Streamed, and from a position on.
    assert f"rest 4 row 4 row 5 commit {hub_server.COMMIT}" in no_split
    assert "licence" in gated and "/datasets/o/gated" in gated
    assert "no such repository" in missing


# ---------------------------------------------------------------------------------- row kinds


def test_prompt_completion_trains_completion_and_eos(tok):
    prompt, completion = "ab cd?", " cd ab"
    encoded = encoding.encode(dataset({"prompt": prompt, "completion": completion}), tok, 64, EOS)
    ((ids, trained),) = encoded.examples
    prompt_ids = tok(prompt).input_ids
    assert ids.dtype == np.int32 and trained.dtype == bool
    # What generation starts from is exactly the untrained part.
    assert ids[~trained].tolist() == ids[: len(prompt_ids)].tolist() == prompt_ids
    assert ids.tolist() == [*tok(prompt + completion).input_ids, EOS]
    assert (ids == BOS).sum() == (ids == EOS).sum() == 1
    assert tok.decode(ids[1:-1]) == prompt + completion
    assert (encoded.num_cut, encoded.num_skipped) == (0, 0)


def test_a_token_across_the_border_is_not_merged(tok):
    # "ab" is one token, but generation will see the prompt "xa" alone.
    ((ids, trained),) = encoding.encode(
        dataset({"prompt": "xa", "completion": "b"}), tok, 64, EOS
    ).examples
    prompt_ids = tok("xa").input_ids
    assert tok("xab").input_ids[: len(prompt_ids)] != prompt_ids
    assert ids[: len(prompt_ids)].tolist() == prompt_ids
    assert tok.convert_ids_to_tokens(ids[trained]) == ["b", "</s>"]  # and no dummy space
    assert tok.decode(ids[1:-1]) == "xab"


def test_a_space_at_the_border(tok):
    ((ids, trained),) = encoding.encode(
        dataset({"prompt": "x ", "completion": "ab"}), tok, 64, EOS
    ).examples
    assert tok.decode(ids[1:-1]) == "x ab"
    assert tok.convert_ids_to_tokens(ids[trained]) == ["ab", "</s>"]


def test_alpaca_rows_use_the_template(tok):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say a.", "input": "", "output": "a"},
        {"instruction": "Say b.", "input": None, "output": "b"},
    ]
    encoded = encoding.encode(dataset(*rows), tok, 512, EOS)
    texts = [tok.decode(ids[1:]) for ids, _ in encoded.examples]
    assert texts[0] == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Add.\n\n### Input:\n1 and 2\n\n### Response:3</s>"
    )
    assert texts[1] == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay a.\n\n### Response:a</s>"
    )
    assert [trained_text(tok, row) for row in encoded.examples] == ["3</s>", "a</s>", "b</s>"]


def test_braces_in_a_row_are_text(tok):
    row = {"instruction": "{input} {x}", "input": "{instruction}", "output": "{}"}
    ((ids, _),) = encoding.encode(dataset(row), tok, 512, EOS).examples
    assert "### Instruction:\n{input} {x}\n\n### Input:\n{instruction}\n" in tok.decode(ids)


def test_text_rows_train_everything(tok):
    ((ids, trained),) = encoding.encode(dataset({"text": "ab cd"}), tok, 64, EOS).examples
    assert ids.tolist() == [*tok("ab cd").input_ids, EOS]
    assert (ids[0], ids[-1]) == (BOS, EOS)
    assert trained.all()


@pytest.mark.parametrize("template", [CHATML, GENERATION], ids=["prefix", "generation"])
def test_chats_train_the_assistant_only(tmp_path, template):
    tok = chat_tokenizer(tmp_path, template)
    ((ids, trained),) = encoding.encode(dataset({"messages": CHAT}), tok, 256, EOS).examples
    whole = tok.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert ids.tolist() == whole
    spans = np.split(ids, np.flatnonzero(np.diff(trained)) + 1)
    assert [tok.decode(span) for span in spans[1::2]] == ["yes</s>", "no ab</s>"]
    assert "yes" not in "".join(tok.decode(span) for span in spans[0::2])


def test_optionalfields_of_a_message_stay_absent(tmp_path):
    # In Arrow the second row's `name` exists in the first one too, as None.
    template = "{% for m in messages %}{{ m.keys() | list | length }}{% endfor %}"
    tok = chat_tokenizer(tmp_path, "{% generation %}" + template + "{% endgeneration %}")
    rows = [
        {"messages": [{"role": "user", "content": "a"}] * 2},
        {"messages": [{"role": "user", "content": "a", "name": "b"}] * 2},
    ]
    encoded = encoding.encode(dataset(*rows), tok, 64, EOS)
    assert [trained_text(tok, row) for row in encoded.examples] == ["22", "33"]


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


def test_kinds_are_looked_for_in_order(tok):
    row = {"text": "no", "prompt": "x", "completion": "ab", "instruction": "no", "output": "no"}
    encoded = encoding.encode(dataset(row, {**row, "completion": None}), tok, 512, EOS)
    # Rows decide for themselves: without a completion, Alpaca's fields are next.
    assert [trained_text(tok, row) for row in encoded.examples] == ["ab</s>", "no</s>"]


def test_missing_fields_are_named_with_file_and_row(tok, tmp_path):
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

    # Also after a split, the lines are the file's.
    train, evaluation = sources.holdout(sources.load(path), 0.34, 0)
    with pytest.raises(errors.UserError, match=r"x\.jsonl:[23]"):
        encoding.encode(train, tok, 64, EOS)
    assert len(evaluation) == 1


def test_a_field_that_is_no_text(tok, tmp_path):
    path = write(tmp_path / "x.jsonl", '{"prompt": "a", "completion": 5}')
    with pytest.raises(errors.UserError, match=r"completion is a int[\s\S]*x\.jsonl:1"):
        encoding.encode(sources.load(path), tok, 64, EOS)


def test_cuts_and_skips_are_counted(tok):
    rows = [
        {"prompt": "x", "completion": "y"},  # BOS ▁ x y EOS
        {"prompt": "x", "completion": "yzyzyz"},  # loses its end
        {"prompt": "xyzxyz", "completion": "a"},  # only the prompt would remain
    ]
    encoded = encoding.encode(dataset(*rows), tok, 5, EOS)
    assert [tok.decode(ids[1:]) for ids, _ in encoded.examples] == ["xy</s>", "xyz"]
    assert (encoded.num_cut, encoded.num_skipped) == (2, 1)
    with pytest.raises(errors.UserError, match="--seq-len"):
        encoding.encode(dataset(rows[2]), tok, 5, EOS)


def test_txt_is_one_stream_in_blocks(tok, tmp_path):
    text = "ab cd\n\n  ef\r\ngh " * 5
    path = tmp_path / "x.txt"
    path.write_bytes(text.encode())
    encoded = encoding.encode(sources.load(str(path)), tok, 16, EOS)
    stream = tok(text).input_ids
    assert np.concatenate([ids for ids, _ in encoded.examples]).tolist() == stream
    assert [len(ids) for ids, _ in encoded.examples[:-1]] == [16] * (len(stream) // 16)
    assert all(trained.all() for _, trained in encoded.examples)
    assert (encoded.num_cut, encoded.num_skipped) == (0, 0)
    # A single last token predicts nothing.
    tail = encoding.encode(sources.load(str(path)), tok, len(stream) - 1, EOS)
    assert [len(ids) for ids, _ in tail.examples] == [len(stream) - 1]


def test_prompts_for_exact_match(tok):
    rows = [
        {"prompt": "xa", "completion": "b", "instruction": None, "output": None},
        {"prompt": None, "completion": None, "instruction": "Say.", "output": "ok"},
    ]
    encoded = encoding.encode(dataset(*rows), tok, 512, EOS).examples
    for (ids, expected), (trained_ids, trained), text in zip(
        encoding.prompts(dataset(*rows), tok), encoded, ("b", "ok"), strict=True
    ):
        assert ids.tolist() == trained_ids[~trained].tolist()
        assert expected == text
    with pytest.raises(errors.UserError, match="expected answer"):
        encoding.prompts(dataset({"text": "a"}), tok)


# ---------------------------------------------------------------------------------- splits, order


def test_holdout_is_a_seeded_partition():
    whole = dataset(*({"text": f"row {i}"} for i in range(100)))
    train, evaluation = sources.holdout(whole, 0.02, seed=3)
    assert (len(train), len(evaluation)) == (98, 2)
    assert sorted([*train["text"], *evaluation["text"]]) == sorted(whole["text"])
    assert sources.holdout(whole, 0.02, seed=3)[1]["text"] == evaluation["text"]
    assert sources.holdout(whole, 0.02, seed=4)[1]["text"] != evaluation["text"]
    assert len(sources.holdout(dataset({"text": "a"}, {"text": "b"}), 0.02, 0)[1]) == 1
    with pytest.raises(errors.UserError, match="two examples"):
        sources.holdout(dataset({"text": "a"}), 0.02, 0)


def test_holdout_of_a_txt_file_is_its_end(tok, tmp_path):
    lines = [f"line {i}" for i in range(50)]
    whole = sources.load(write(tmp_path / "x.txt", *lines))
    train, evaluation = sources.holdout(whole, 0.1, seed=0)
    ((ids, _),) = encoding.encode(evaluation, tok, 4096, EOS).examples
    assert tok.decode(ids[1:]) == "".join(f"{line}\n" for line in lines[45:])
    ((ids, _),) = encoding.encode(train, tok, 4096, EOS).examples
    assert tok.decode(ids[1:]) == "".join(f"{line}\n" for line in lines[:45])


def test_fingerprint_follows_the_content():
    rows = [{"text": "a"}, {"text": "b"}]
    same = sources.fingerprint(dataset(*rows))
    assert sources.fingerprint(dataset(*rows)) == same
    assert sources.fingerprint(dataset(*rows[::-1])) != same
    assert sources.fingerprint(dataset(rows[0], {"text": "c"})) != same
