"""Sources: files and hub data sets → examples; held-out examples; fingerprints."""

import json
import pathlib
import subprocess
import sys

import datasets
import hub_server
import pytest
import test_encoding
from test_encoding import EOS, dataset, write

from lora_jax import errors
from lora_jax.data import bad_rows, encoding, fields, folders, sources

tok = test_encoding.tok

# ---------------------------------------------------------------------------------- reading


def test_every_format_gives_the_same_examples(tmp_path):
    examples = [{"prompt": "a, b", "completion": "1"}, {"prompt": 'say "c"\nd', "completion": "2"}]
    lines = [json.dumps(example) for example in examples]
    files = [
        write(tmp_path / "x.jsonl", lines[0], "", lines[1]),
        write(tmp_path / "x.json", json.dumps(examples, indent=1)),
        write(tmp_path / "lines.json", *lines),
        write(tmp_path / "x.csv", "prompt,completion", '"a, b",1', '"say ""c""\nd",2'),
    ]
    dataset(*examples).to_parquet(tmp_path / "x.parquet")
    loaded = [sources.load(file) for file in [*files, str(tmp_path / "x.parquet")]]
    for one in loaded:
        assert fields.names_of(one) == ["prompt", "completion"]
        assert [{k: example[k] for k in examples[0]} for example in one] == examples
    # The origin is not content: equal examples have equal fingerprints.
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


def test_columns_are_renamed(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        json.dumps({"question": "q", "answer": "a", "text": "t", "completion": "old", "id": 1}),
    )
    mapped = sources.load(path, columns={"prompt": "question", "completion": "answer"})
    # The mapped kind wins: text is dropped, the old completion is replaced, id stays.
    assert sorted(fields.names_of(mapped)) == ["completion", "id", "prompt"]
    assert (mapped[0]["prompt"], mapped[0]["completion"]) == ("q", "a")

    swapped = sources.load(path, columns={"prompt": "completion", "completion": "question"})
    assert (swapped[0]["prompt"], swapped[0]["completion"]) == ("old", "q")


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("[:3]", "012"),
        ("[4:]", "456789"),
        ("[2:4]", "23"),
        ("[80%:]", "89"),
        ("[-2:]", "89"),
        ("[-30%:-1]", "78"),
        ("[:999]", "0123456789"),
    ],
)
def test_a_part_of_a_split_is_read(tmp_path, part, expected):
    write(tmp_path / "train.jsonl", *(json.dumps({"text": str(n)}) for n in range(10)))
    for source in (tmp_path, tmp_path / "train.jsonl", tmp_path / "*.jsonl"):
        found = sources.load(f"{source}@train{part}")
        assert "".join(row["text"] for row in found) == expected
    with pytest.raises(errors.UserError, match=r"train.jsonl@train"):
        sources.load(f"{tmp_path / 'train.jsonl'}@test{part}")  # a file is the train split
    with pytest.raises(errors.UserError, match="no such file"):
        sources.load(f"gone.jsonl@train{part}")
    if part.strip("[:]0123456789"):  # the total is not known
        with pytest.raises(errors.UserError, match="a part of a stream in rows"):
            sources.stream(f"{tmp_path}@train{part}")
    else:
        for source in (tmp_path, tmp_path / "train.jsonl"):
            records = [*sources.stream(f"{source}@train{part}")]
            assert "".join(each.example["text"] for each in records) == expected
    assert folders.find(f"owner/name@train{part}") is None


def test_bad_rows_are_not_counted_in_a_part(tmp_path):
    lines = [json.dumps({"text": each}) for each in "0123456"]
    path = write(tmp_path / "train.jsonl", *lines[:2], "{", *lines[2:4], "{", *lines[4:])
    for part, expected in (("[:3]", "012"), ("[3:5]", "34"), ("[5:]", "56")):
        source = f"{path}@train{part}"
        whole = sources.load(source, bad=bad_rows.BadRows(2))
        records = [*sources.stream(source)]
        table = sources.table(records, None, source, bad_rows.BadRows(2))
        for found in (whole, table):
            assert "".join(each["text"] for each in found) == expected


@pytest.mark.parametrize("part", ["[:0]", "[5:3]", "[20:]"])
def test_a_part_without_rows_is_an_error(tmp_path, part):
    source = write(tmp_path / "train.jsonl", *[json.dumps({"text": "a"})] * 10) + f"@train{part}"
    for read in (sources.load, lambda source: [*sources.stream(source)]):
        with pytest.raises(errors.UserError, match=r"(?s)none in this part.*another part"):
            read(source)


def test_an_at_sign_may_be_part_of_a_name(tmp_path):
    write(tmp_path / "me@example.jsonl", json.dumps({"text": "a"}))
    for source in ("me@example.jsonl", "*@example.jsonl", "*@*.jsonl", "*@example.jsonl@train[:1]"):
        (row,) = sources.load(f"{tmp_path}/{source}")
        assert row["text"] == "a"
    with pytest.raises(errors.UserError, match="no such file"):
        sources.load(f"{tmp_path}/me@example.jsonl:config@train")


def test_renaming_leaves_what_goes_to_the_chat_template(tmp_path):
    row = {"chat": [], "messages": [], "tools": [], "system": "s", "functions": [], "text": "t"}
    path = write(tmp_path / "x.jsonl", json.dumps(row))
    (mapped,) = sources.load(path, columns={"messages": "chat"})
    assert {"messages", "tools", "system"} <= mapped.keys() and "text" not in mapped
    path = write(tmp_path / "y.jsonl", json.dumps(row | {"chosen": {}, "rejected": {}}))
    (mapped,) = sources.load(path, columns={"messages": "chat"})
    assert {"messages", "chosen", "rejected"} <= mapped.keys()
    (mapped,) = sources.load(path, columns={"tools": "functions"})
    assert {"messages", "tools", "system", "text"} <= mapped.keys()
    path = write(tmp_path / "z.jsonl", json.dumps({"input_ids": [5, 6], "targets": [-100, 6]}))
    (mapped,) = sources.load(path, columns={"labels": "targets"})
    assert (mapped["input_ids"], mapped["labels"]) == ([5, 6], [-100, 6])


@pytest.mark.parametrize(
    ("rows", "in_pairs", "unused"),
    [
        ([{"prompt": "a", "completion": "b"}], False, ""),
        ([{"prompt": "a", "completion": "b", "id": 1, "system": "s", "x": None}], False,
         "id, system"),
        ([{"messages": [], "system": "s", "tools": [], "prompt": "a"}], False, "prompt"),
        ([{"text": "a", "input": "i"}, {"instruction": "a", "output": "b", "input": "c"}], False,
         ""),
        ([{"question": "q", "chosen": "a", "rejected": "b", "system": "s"}], True,
         "question, system"),
        ([{"messages": [], "chosen": {"role": "assistant"}, "rejected": [], "system": "s"}], True,
         ""),
        ([{"instruction": "a", "input": "b", "chosen": "a", "rejected": "b"}], True, ""),
        ([{"input": {}, "preferred_output": [], "non_preferred_output": [], "id": 1}], True, "id"),
        ([{"text": "a"} | {f"x{n}": 1 for n in range(10)}], False,
         "x0, x1, x2, x3, x4, x5, x6, x7 and 2 more"),
    ],
)  # fmt: skip
def test_columns_that_are_not_used_are_told(tmp_path, rows, in_pairs, unused):
    path = write(tmp_path / "x.jsonl", *map(json.dumps, rows))
    assert fields.unused(sources.load(path), in_pairs=in_pairs) == unused


def test_unknown_columns_list_what_there_is(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"question": "q", "answer": "a"}')
    with pytest.raises(errors.UserError) as caught:
        sources.load(path, columns={"prompt": "Question", "reply": "answer"})
    for words in ("question, answer", "no column Question", "no field reply", "--columns"):
        assert words in str(caught.value)


def test_hub_datasets(tmp_path):
    """Found, or missing in each possible way; in a process that knows only the loopback hub."""
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
    # Streamed, also from a position.
    assert f"rest 4 row 4 row 5 commit {hub_server.COMMIT}" in no_split
    assert "licence" in gated and "/datasets/o/gated" in gated
    assert "no such repository" in missing


# ---------------------------------------------------------------------------------- splits, order


def test_holdout_is_a_seeded_partition(tmp_path):
    lines = [json.dumps({"text": f"row {i}"}) for i in range(100)]
    whole = sources.load(write(tmp_path / "x.jsonl", *lines))

    def texts(rows):
        return [row["text"] for row in rows]

    train, evaluation = sources.holdout(whole, 0.02, seed=3)
    assert (len(train), len(evaluation)) == (98, 2)
    assert sorted([*texts(train), *texts(evaluation)]) == sorted(texts(whole))
    assert texts(sources.holdout(whole, 0.02, seed=3)[1]) == texts(evaluation)
    assert texts(sources.holdout(whole, 0.02, seed=4)[1]) != texts(evaluation)
    assert len(sources.holdout(whole[:2], 0.02, 0)[1]) == 1
    assert len(sources.holdout(whole, 3, 0)[1]) == 3
    with pytest.raises(errors.UserError, match="two examples"):
        sources.holdout(whole[:1], 0.02, 0)


def test_holdout_of_a_txt_file_is_its_end(tok, tmp_path):
    lines = [f"line {i}" for i in range(50)]
    whole = sources.load(write(tmp_path / "x.txt", *lines))
    train, evaluation = sources.holdout(whole, 0.1, seed=0)
    ((ids, _),) = encoding.encode(evaluation, tok, 4096, EOS).rows
    assert tok.decode(ids[1:]) == "".join(f"{line}\n" for line in lines[45:])
    ((ids, _),) = encoding.encode(train, tok, 4096, EOS).rows
    assert tok.decode(ids[1:]) == "".join(f"{line}\n" for line in lines[:45])


def test_the_fingerprint_depends_on_the_content():
    examples = [{"text": "a"}, {"text": "b"}]
    same = sources.fingerprint(dataset(*examples))
    assert sources.fingerprint(dataset(*examples)) == same
    assert sources.fingerprint(dataset(*examples[::-1])) != same
    assert sources.fingerprint(dataset(examples[0], {"text": "c"})) != same
