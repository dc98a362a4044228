"""Kinds of files and folders: each row as its author wrote it, or one error with file and line."""

import bz2
import datetime
import gzip
import io
import json
import lzma
import zipfile

import datasets
import hypothesis
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st
from test_encoding import write

from lora_jax import errors
from lora_jax.data import bad_rows, folders, sources
from lora_jax.data.examples import kinds
from lora_jax.data.formats import files, unicode

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def content(source, **how):
    """The rows without their origins, loaded whole and, where possible, as a stream."""
    whole = [without_origin(row) for row in sources.load(str(source), **how)]
    try:
        streamed = [*sources.stream(str(source))]
    except errors.UserError as error:
        assert "only be read whole" in str(error)
        return whole
    if not how:
        assert [each.example for each in streamed] == whole
    for number, each in enumerate(streamed, start=1):
        after = tuple(json.loads(json.dumps(each.after)))
        assert [*sources.stream(str(source), after)] == streamed[number:]
    return whole


def without_origin(row):
    return {name: value for name, value in row.items() if name != kinds.ORIGIN}


def origins(source):
    return [row[kinds.ORIGIN] for row in sources.load(str(source))]


def refusal(source, **how):
    with pytest.raises(errors.UserError) as caught:
        sources.load(str(source), **how)
    return str(caught.value)


def put(path, data):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# ---------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "x", "args": {"city": "Rome"}}, {"text": "y", "args": {"n": 1}}],
        [{"text": "x", "args": {}}, {"text": "y", "args": {"city": "Rome"}}],
        [{"text": "x", "args": {"a": 1, "b": 2}}, {"args": {"b": 3, "a": 4}, "text": "y"}],
        [{"text": "x", "n": 1}, {"text": "y", "n": 1.5}, {"text": "z", "n": 2**70}],
        [{"text": "x", "v": True}, {"text": "y", "v": "5"}, {"v": [1, "a", None, {}], "text": "z"}],
        [{"text": "x", "v": None}, {"text": "y"}, {"text": "z", "v": {"a": None}}],
    ],
)
def test_a_row_is_what_its_author_wrote(tmp_path, rows):
    lines = write(tmp_path / "x.jsonl", *map(json.dumps, rows))
    array = write(tmp_path / "x.json", json.dumps(rows))
    for source in (lines, array):
        # As text, so that 1 is not 1.0 or True, and the order of keys counts.
        assert json.dumps(content(source)) == json.dumps(rows)
    names = [*dict.fromkeys(name for row in rows for name in row)]
    assert sources.load(lines).column_names == names
    again, other = sources.load(array), sources.load(lines)[::-1]
    assert sources.fingerprint(sources.load(lines)) == sources.fingerprint(again)
    assert sources.fingerprint(other) != sources.fingerprint(again)


def test_nulls_that_a_table_adds_to_objects_are_removed(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "text": None},
        {"messages": [{"role": "assistant", "content": None, "calls": [{"x": None, "y": 1}]}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert content(tmp_path / "x.parquet") == [
        {"messages": [{"role": "user", "content": "a"}], "text": None},
        {"messages": [{"role": "assistant", "calls": [{"y": 1}]}], "text": None},
    ]


def test_json_in_tables_keeps_its_nulls(tmp_path):
    pytest.importorskip("datasets", "4.7", reason="older ones write no JSON into tables")
    rows = {"text": ["x", "y"], "tools": [[{"b": 2**40}, {"c": None}], [{"d": {"e": []}}]]}
    dataset = datasets.Dataset.from_dict(rows, on_mixed_types="use_json")
    dataset.to_parquet(tmp_path / "x.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "x.parquet", tmp_path / "saved"):
        assert [row["tools"] for row in content(source)] == rows["tools"]


def test_columns_that_cannot_be_trained_on_do_not_matter(tmp_path):
    when = pyarrow.array([10**18 + 1] * 2, pyarrow.timestamp("ns"))
    twice = pyarrow.struct([("x", pyarrow.int64()), ("x", pyarrow.int64())])
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    pairs = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    table = pyarrow.table({
        "text": ["a", "b"], "when": when, "map": pyarrow.array([[("k", 1)], None], pairs),
        "twice": pyarrow.nulls(2, twice), "image": pyarrow.array([{"bytes": b"x"}, None], image),
        "kind": pyarrow.array(["p", "q"]).dictionary_encode(),
    })  # fmt: skip
    pyarrow.parquet.write_table(table.drop(["twice"]), tmp_path / "x.parquet")
    with pyarrow.OSFile(str(tmp_path / "x.arrow"), "wb") as file:
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    for name in ("x.parquet", "x.arrow"):
        assert content(tmp_path / name) == [{"text": "a", "kind": "p"}, {"text": "b", "kind": "q"}]
    # One that is named as a field stays what it is, and is refused where fields are checked.
    named = pyarrow.table({"text": when.cast(pyarrow.timestamp("s"), safe=False)})
    pyarrow.parquet.write_table(named, tmp_path / "when.parquet")
    assert isinstance(sources.load(str(tmp_path / "when.parquet"))[0]["text"], datetime.datetime)


# ---------------------------------------------------------------------------------- compression


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    ".lz4": lambda data: pyarrow.compress(data, codec="lz4", asbytes=True),
    "": lambda data: data,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files(tmp_path, suffix):
    compress, name = COMPRESS[suffix], f"x.JSONL{suffix.upper()}"
    # Two members, as `cat a.gz b.gz` writes.
    path = put(tmp_path / name, b"".join(map(compress, LINES.encode().splitlines(keepends=True))))
    assert content(path) == ROWS
    assert origins(path) == [f"{name}:1", f"{name}:2"]
    # The bytes decide: a browser stores a file decompressed, or a script forgets the suffix.
    plain = put(tmp_path / f"plain.csv{suffix}", "prompt,completion\na,b\nc,d\n")
    hidden = put(tmp_path / "hidden.ndjson", compress(LINES.encode()))
    parquet = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), parquet)
    packed = put(tmp_path / f"y.parquet{suffix}", compress(parquet.read_bytes()))
    for each in (plain, hidden, packed):
        assert content(each) == ROWS
    if suffix:
        damaged = compress(LINES.encode() * 100)
        message = refusal(put(tmp_path / f"cut.jsonl{suffix}", damaged[: len(damaged) // 2]))
        assert "cut.jsonl" in message and "complete" in message


def zipped(path, members, *, password=False):
    path.parent.mkdir(exist_ok=True, parents=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    if password:  # a bit in the header of the file, and in that of the list
        raw = bytearray(path.read_bytes())
        raw[6] |= 1
        raw[raw.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(raw)
    return path


def test_a_file_in_a_zip(tmp_path, monkeypatch):
    table = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    mac = {"in/": "", "in/a.JSONL": LINES, "__MACOSX/in/._a.JSONL": "no data"}
    for name, members in {
        "x.jsonl.zip": {"x.jsonl": LINES},
        "kaggle.ZIP": mac,
        "y.zip": {"y.csv": "prompt,completion\na,b\nc,d\n".encode("utf-16")},
        "z.parquet.zip": {"z.parquet": table.read_bytes()},
    }.items():
        path = zipped(tmp_path / name, members)
        assert content(path) == ROWS
        assert origins(path) == [f"{name}:1", f"{name}:2"] or name == "y.zip"
    table.unlink()
    for name in ("kaggle.ZIP", "y.zip"):
        (tmp_path / name).unlink()
    put(tmp_path / "one" / "x.jsonl", LINES)  # beside the archive that it is from
    zipped(tmp_path / "one" / "archive.zip", {"x.jsonl": LINES})
    monkeypatch.chdir(tmp_path / "one")
    assert content(tmp_path / "one") == content(".") == ROWS
    lines = {f"part/{n}.jsonl.zip": {"x": line} for n, line in enumerate(LINES.splitlines())}
    for name, members in lines.items():
        zipped(tmp_path / name, members)
    assert content(tmp_path / "part") == ROWS


def test_a_zip_of_several_files_is_the_folder_that_it_unpacks_to(tmp_path):
    first, second = LINES.splitlines(keepends=True)
    table, whole = tmp_path / "x.parquet", io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[1:]), table)
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("x", second)
    for name, members in {
        "plain.ZIP": {"b.jsonl": second, "a.jsonl": first, "README.md": "#", ".c.jsonl": "no"},
        "deep.zip": {"evaluation/": "", "evaluation/1/a.jsonl": first,
                     "evaluation/2/b.json": second, "__MACOSX/evaluation/._a.jsonl": "no"},
        "packed.zip": {"a.jsonl.gz": gzip.compress(first.encode()),
                       "b.jsonl.zst": COMPRESS[".zst"](second.encode()),
                       "c.jsonl.zip": whole.getvalue()},
        "tables.zip": {"a.parquet": table.read_bytes(), "b.parquet": table.read_bytes()},
        "odd.zip": {"/a.jsonl": first, "b.jsonl": second},
    }.items():  # fmt: skip
        path = zipped(tmp_path / name, members)
        expected = {"packed.zip": [*ROWS, ROWS[1]], "tables.zip": [ROWS[1]] * 2}.get(name, ROWS)
        assert content(path) == expected, name
    assert origins(tmp_path / "plain.ZIP") == ["a.jsonl:1", "b.jsonl:1"]
    assert origins(tmp_path / "deep.zip") == ["1/a.jsonl:1", "2/b.json:1"]
    assert content(tmp_path / "deep.zip" / "evaluation/2/b.json") == ROWS[1:]
    first, again = sources.stream(str(tmp_path / "plain.ZIP"))
    assert [*sources.stream(str(tmp_path / "plain.ZIP"), first.after)] == [again]


def test_names_of_files_in_a_zip_tell_splits(tmp_path):
    """As in a folder."""
    first, second = LINES.splitlines(keepends=True)
    path = zipped(tmp_path / "x.zip", {"in/train.jsonl": first, "in/test/1.jsonl": second})
    assert content(path) == ROWS[:1]
    assert "not read: 1.jsonl" in sources.note(str(path))
    assert content(f"{path}@test") == ROWS[1:]
    assert f"as in {path}@test" in refusal(f"{path}@dev")
    assert "leave :other out" in refusal(f"{path}:other")
    path = zipped(tmp_path / "y.zip", {"in\\train.jsonl": first, "in\\test.jsonl": second})
    assert content(path) == ROWS[:1]


def test_a_bad_line_in_a_zip_is_named(tmp_path):
    path = zipped(tmp_path / "x.zip", {"in/a.jsonl": LINES + "{\n", "in/b.jsonl": LINES})
    assert f"{path}/in/a.jsonl:3" in refusal(path)
    assert len(sources.load(str(path), bad=bad_rows.BadRows(1))) == 4


def test_a_zip_that_is_refused(tmp_path):
    for name, members, words in (
        ("two.zip", {"a.csv": "a\n", "b.jsonl": "a\n"}, ["of one kind", "a.csv, b.jsonl"]),
        ("no.zip", {"a.docx": "a", "b.pdf": "a"}, ["a folder without any", "a.docx"]),
        ("x/two.jsonl.zip", {"a.csv": "a\n", "b.jsonl": "a\n"}, ["of one kind"]),
        ("none.zip", {}, ["with data files in it"]),
        ("twice.zip", {"/a.jsonl": LINES, "a.jsonl": LINES}, ["a path of its own", "a.jsonl"]),
        ("out.zip", {"../a.jsonl": LINES, "b.jsonl": LINES}, ["below the archive", "../a.jsonl"]),
        ("nested.zip", {"b.zip": "", "c.jsonl": LINES}, ["an archive in it: b.zip", "unpack"]),
        ("other.zip", {"x.docx": "a"}, ["convert"]),
        ("x.csv", {"[Content_Types].xml": "", "xl/workbook.xml": ""}, ["Excel", "CSV UTF-8"]),
    ):
        message = refusal(zipped(tmp_path / name, members))
        assert name in message
        for word in words:
            assert word in message
    secret = zipped(tmp_path / "secret.jsonl.zip", {"x.jsonl": LINES}, password=True)
    assert "password" in refusal(secret)
    several = zipped(tmp_path / "several.zip", {"x.jsonl": "", "y.jsonl": ""}, password=True)
    assert "password" in refusal(several) and "several.zip/x.jsonl" in refusal(several)
    zipped(tmp_path / "folder" / "x.jsonl.zip", {"x.jsonl": LINES, "y.jsonl": LINES})
    assert "2 files" in refusal(tmp_path / "folder") and "by itself" in refusal(tmp_path / "folder")
    whole = zipped(tmp_path / "x.jsonl.zip", {"x.jsonl": LINES}).read_bytes()
    assert "complete" in refusal(put(tmp_path / "cut.jsonl.zip", whole[:40]))
    assert "cut off or damaged" in refusal(put(tmp_path / "cut.zip", whole[:40]))


def test_files_of_other_programs_name_the_way(tmp_path):
    assert "CSV UTF-8" in refusal(put(tmp_path / "x.xlsx", b"PK\3\4"))
    assert "unpack" in refusal(put(tmp_path / "x.tar.gz", gzip.compress(b"x")))
    assert ".jsonl for examples" in refusal(put(tmp_path / "x.jsonl.txt", LINES))
    assert content(put(tmp_path / "v1.2.txt", "a")) == [{files.STREAM: "a"}]


# ---------------------------------------------------------------------------------- Unicode


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("mark", [True, False])
def test_other_encodings_of_unicode(tmp_path, monkeypatch, encoding, mark):
    monkeypatch.setattr(unicode, "_CHUNK", 7)  # which ends within characters
    rows = [{"text": f"{n} naïve 東京 😀 \u2028 \x85"} for n in range(5)]
    begin = "\ufeff" if mark and encoding[-3:] in ("-le", "-be") else ""

    def encoded(text):
        return (begin + text).encode(encoding)

    jsonl = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    array = json.dumps(rows, ensure_ascii=False, indent=1)
    table = "text\tn\r\n" + "".join(f"{row['text']}\t\r\n" for row in rows)
    for name, text in {"x.jsonl": jsonl, "x.json": array, "x.tsv": table}.items():
        found = [{"text": row["text"]} for row in content(put(tmp_path / name, encoded(text)))]
        assert found == rows
        packed = put(tmp_path / f"{name}.gz", gzip.compress(encoded(text)))
        assert [{"text": row["text"]} for row in content(packed)] == rows
    lines = put(tmp_path / "x.txt", encoded("a\r\nb"))
    assert [row[files.STREAM] for row in content(lines)] == ["a\r\n", "b"]


# ---------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (json.dumps({"data": ROWS}), ROWS),
        (json.dumps({"version": "1", "data": ROWS, "tags": ["x"]}, indent=2), ROWS),
        (json.dumps({"examples": ROWS, "count": 2}), ROWS),
        (json.dumps({"prompt": ["a", "c"], "completion": ["b", "d"]}), ROWS),
        (json.dumps({"question": ["a"], "answer": ["b"]}, indent=1),
         [{"question": "a", "answer": "b"}]),
        ('{"prompt": {"0": "a", "1": "c"}, "completion": {"0": "b", "1": "d"}}', ROWS),
        ('{"columns": ["prompt", "completion"], "index": [0, 1], "data": [["a","b"],["c","d"]]}',
         ROWS),
        ("\n\n".join(json.dumps(row, indent=2) for row in ROWS), ROWS),
        (json.dumps(ROWS[0], indent="\t"), ROWS[:1]),
        (json.dumps(ROWS[0]), ROWS[:1]),
        ('["a", "b"]', [{"text": "a"}, {"text": "b"}]),
        ('{"messages": [[{"role": "user"}], [{"role": "system"}]]}',
         [{"messages": [{"role": "user"}]}, {"messages": [{"role": "system"}]}]),
        # Rows, although they look like columns or like a list of examples.
        ('{"messages": [{"role": "user", "content": "a"}]}',
         [{"messages": [{"role": "user", "content": "a"}]}]),
        ('{"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]}',
         [{"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]}]),
        ('{"dialog": [{"from": "human", "value": "a"}]}',
         [{"dialog": [{"from": "human", "value": "a"}]}]),
        ('{"segments": [{"text": "a", "label": true}]}',
         [{"segments": [{"text": "a", "label": True}]}]),
        ('{"input_ids": [5, 6], "labels": [-100, 6]}',
         [{"input_ids": [5, 6], "labels": [-100, 6]}]),
        ('{"input_ids": [[5], [6]], "labels": [[5], [6]]}',
         [{"input_ids": [5], "labels": [5]}, {"input_ids": [6], "labels": [6]}]),
        ('{"text": "a", "items": [{"n": 1}]}', [{"text": "a", "items": [{"n": 1}]}]),
        ('\ufeff{"text": "a"}\r\n\r\n \t\n\ufeff{"text": "b"}', [{"text": "a"}, {"text": "b"}]),
        ('\ufeff[{"text": "a"}]', [{"text": "a"}]),
        ('{"text": "a\u2028b"}\n{"text": "c\x85d"}', [{"text": "a\u2028b"}, {"text": "c\x85d"}]),
        ('{"n": NaN, "id": 123456789012345678901234567890}\n{"text": "\\ud83d\\ude00"}', None),
    ],
)  # fmt: skip
def test_forms_of_json(tmp_path, text, rows):
    for name in ("x.json", "x.jsonl", "x.ndjson"):
        found = content(put(tmp_path / name, text))
        if rows is None:
            rows = [json.loads(line) for line in text.splitlines()]
        assert json.dumps(found) == json.dumps(rows)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a", "completion": "b", "completion": "c"}', ["x.json:1", "completion twice"]),
        ('{"messages": [{"role": "user", "role": "assistant"}]}', ["x.json:1", "role twice"]),
        ('{"text": "a"}\n{"text": "\\ud83d"}', ["x.json:2", "half of a character", "ud83d"]),
        ('{"text": ' + "[" * 100_000, ["x.json"]),
        ('{"text": "a", "n": ' + "[" * 300 + "]" * 300 + "}", ["x.json:1", "levels"]),
        ('{"text": "a", "n": ' + "[" * 9999 + "]" * 9999 + "}", ["x.json:1", "levels"]),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", ["x.json:1", "4300"]),
        ('{"prompt": ["a"], "completion": ["b", "c"]}', ["1 in prompt", "2 in completion"]),
        ('{"train": [{"a": 1}], "test": [{"a": 2}]}', ["train, test", "jq"]),
        ('{"text": "a",\n "n": }', ["x.json:2"]),
        ('{"text": "a"}\n{"text": "b"} {"text": "c"}', ["x.json:2", "Extra data"]),
        ('[{"text": "a"},\n{"text": "b"}\n', ["x.json:3"]),
        ("[[1], [2]]", ["element 1", "element 2"]),
        ('"a"', ["x.json:1", "a str"]),
        ("{}x", ["x.json:1"]),
    ],
)
def test_json_that_is_refused(tmp_path, text, words):
    message = refusal(put(tmp_path / "x.json", text))
    for word in words:
        assert word in message


def test_what_is_doubtful_in_columns_that_are_not_used_does_not_matter(tmp_path):
    text = '{"text": "a", "meta": {"k": 1, "k": 2}, "id": 1, "id": 2, "raw": "\\ud83d"}'
    path = put(tmp_path / "x.jsonl", text)
    assert content(path) == [json.loads(text)]
    assert "id twice" in refusal(path, columns={"prompt": "id"})


# ---------------------------------------------------------------------------------- CSV


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", "prompt,completion\na,b\nc,d\n"),
        ("x.csv", "prompt;completion\na;b\nc;d"),
        ("x.csv", '"prompt";"completion"\r\n"a";"b"\r\n\r\n"c";"d"\r\n'),
        ("x.csv", "prompt|completion\na|b\nc|d\n"),
        ("x.csv", "prompt\tcompletion\na\tb\nc\td\n"),
        ("x.TSV", "prompt\tcompletion\na\tb\nc\td\n"),
        ("x.csv", "sep=;\r\nprompt;completion\r\na;b\r\nc;d\r\n"),
        ("x.csv", '\ufeff"prompt",completion\ra,b\rc,d'),
    ],
)
def test_separators_of_csv(tmp_path, name, text):
    assert content(put(tmp_path / name, text)) == ROWS


def test_values_of_csv(tmp_path):
    def loaded(text, name="x.csv"):
        return content(put(tmp_path / name, text))

    long = "y" * 200_000 + ',;\t|"\r\n\ufeff'
    field = '"' + long.replace('"', '""') + '"'
    assert loaded(f"text,n\n{field},1\n,007\n") == [
        {"text": long, "n": "1"}, {"text": None, "n": "007"}
    ]  # fmt: skip
    # Other separators in the fields do not matter, also if each row has one.
    assert loaded("text,tags|more\na;b,c|d\ne,f|g\n")[0] == {"text": "a;b", "tags|more": "c|d"}
    assert loaded("text\na; b\n") == [{"text": "a; b"}]
    assert loaded("text\tn\na, b\t1\nc\t2\n")[0] == {"text": "a, b", "n": "1"}
    assert loaded('text\tn\n"a, b"\t1\n', "x.tsv")[0]["text"] == "a, b"
    assert loaded("text,id,id\na,1,2\n") == [{"text": "a", "id": "1", "id.1": "2"}]
    # Spreadsheets end with rows of separators, and a file may be put behind another.
    assert loaded("text,n\na,1\n\ufeff'b',2\n,\n,\n") == [
        {"text": "a", "n": "1"}, {"text": "'b'", "n": "2"}
    ]  # fmt: skip
    assert loaded('text,n\n\ufeff"b",2\n')[0]["text"] == "b"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,completion,completion\na,b,c\n", ["completion 2 times", "x.csv:1"]),
        ('a,b\n1,2\n\n3,"4\n5,6\n', ["x.csv:4", "not closed"]),
        ('a,b\n1,2\n"3"x,4\n5,6,7\n', ["x.csv:3", "x.csv:4", "3 fields"]),
        ('a,b\n"1\n2",3\n"4\n5"\n', ["x.csv:4", "1 fields"]),
        ("a;b|c\n1;2|3\n", ["x.csv:1", "';' or '|'"]),
        ("a,b\n1,2\n\ufeffa,b\n3,4\n", ["x.csv:3", "the header again"]),
        ("\xe4,b\n1,2\n".encode("latin-1"), ["x.csv:1", "iconv"]),
        ("a,b\n1,2\n".encode("utf-16")[:-1], ["x.csv", "within a character"]),
        ("a,b\n1,2\n\ud83d,3\n".encode("utf-16", "surrogatepass"), ["x.csv:3", "UTF-16"]),
    ],
)
def test_csv_that_is_refused(tmp_path, text, words):
    message = refusal(put(tmp_path / "x.csv", text))
    for word in words:
        assert word in message


def test_two_columns_of_one_name_in_a_table(tmp_path):
    def saved(*names):
        table = pyarrow.table([pyarrow.array([name]) for name in "abc"], names=names)
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    assert "completion 2 times" in refusal(saved("prompt", "completion", "completion"))
    assert content(saved("text", "id", "id")) == [{"text": "a", "id": "b"}]


# ---------------------------------------------------------------------------------- folders


def row(text):
    return json.dumps({"text": text}) + "\n"


def texts(source):
    return [each["text"] for each in content(source)]


def test_a_folder_and_a_pattern_are_one_source(tmp_path):
    for name in ("2.jsonl", "1.jsonl", "sub/3.ndjson.gz"):
        text = "\ufeff" + row(name)
        put(tmp_path / name, gzip.compress(text.encode()) if name.endswith("gz") else text)
    for name in ("README.md", ".hidden.jsonl", "_SUCCESS", "dataset_infos.json", "LICENSE.txt",
                 "notes.txt", "__pycache__/x.jsonl", "loader.py", ".git/x.json"):  # fmt: skip
        put(tmp_path / name, "no data")
    assert texts(tmp_path) == ["1.jsonl", "2.jsonl", "sub/3.ndjson.gz"]
    assert origins(tmp_path) == ["1.jsonl:1", "2.jsonl:1", "sub/3.ndjson.gz:1"]
    assert texts(tmp_path / "*.jsonl") == ["1.jsonl", "2.jsonl"]
    assert texts(tmp_path / "[1-9]*") == ["1.jsonl", "2.jsonl"]
    assert texts(tmp_path / "**/*json*") == ["1.jsonl", "2.jsonl", "sub/3.ndjson.gz"]
    assert sources.note(str(tmp_path)) == f"{tmp_path}; not read: notes.txt"
    assert sources.note(str(tmp_path / "*.jsonl")) == ""
    put(tmp_path / "2.jsonl", row("good") + "bad\n")
    assert "2.jsonl:2" in refusal(tmp_path)
    put(tmp_path / "odd[1].jsonl", row("odd"))
    assert texts(tmp_path / "odd[1].jsonl") == ["odd"]


def test_splits_of_a_folder(tmp_path):
    plain = {"train.jsonl": "a", "data-test.jsonl": "b", "valid/1.jsonl": "c"}
    for name, text in plain.items():
        put(tmp_path / "plain" / name, row(text))
    source = str(tmp_path / "plain")
    assert texts(source) == texts(f"{source}@train") == ["a"]
    assert (texts(f"{source}@test"), texts(f"{source}@validation")) == (["b"], ["c"])
    for word in ("train split", "data-test.jsonl", "1.jsonl"):
        assert word in sources.note(source)
    assert "the splits test, train, validation" in refusal(f"{source}@dev")
    # Without a train split, what is not held out by its name.
    put(tmp_path / "rest/a.jsonl", row("a"))
    put(tmp_path / "rest/eval.jsonl", row("b"))
    assert texts(tmp_path / "rest") == ["a"]
    assert "eval.jsonl" in sources.note(str(tmp_path / "rest"))
    put(tmp_path / "only/test.jsonl", row("b"))
    assert "only@test" in refusal(tmp_path / "only")
    # Words within words are no splits.
    for name in ("contest.jsonl", "latest.jsonl", "trainees.jsonl"):
        put(tmp_path / "words" / name, row(name))
    assert len(texts(tmp_path / "words")) == 3
    for name in ("train_sft-00000-of-00002", "train_sft-00001-of-00002", "test_sft-00000-of-00001"):
        put(tmp_path / "shards/data" / f"{name}.jsonl", row(name))
    assert texts(f"{tmp_path}/shards@train_sft") == [
        "train_sft-00000-of-00002", "train_sft-00001-of-00002"
    ]  # fmt: skip


def card(*configs):
    return "---\nlicense: mit\nconfigs: " + json.dumps(configs) + "\n---\n# Data\n"


def test_a_readme_tells_configurations_and_splits(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "one/x.jsonl", "two/train.jsonl", "two/test.jsonl"):
        put(tmp_path / name, row(name))
    splits = [{"split": "train", "path": "a.jsonl"}, {"split": "test", "path": ["b.*", "one/*"]}]
    put(tmp_path / "README.md", "\ufeff" + card({"config_name": "any", "data_files": splits}))
    assert texts(tmp_path) == texts(f"{tmp_path}:any@train") == ["a.jsonl"]
    assert texts(f"{tmp_path}@test") == ["b.jsonl", "one/x.jsonl"]
    assert origins(f"{tmp_path}@test") == ["b.jsonl:1", "one/x.jsonl:1"]
    assert "of train, test" in sources.note(str(tmp_path))
    assert "the splits train, test" in refusal(f"{tmp_path}@dev")
    assert "configurations any" in refusal(f"{tmp_path}:other")

    one, two = {"config_name": "one", "data_files": "one/*"}, {"config_name": "two",
                                                              "data_dir": "two"}  # fmt: skip
    put(tmp_path / "README.md", card(one, two))
    message = refusal(tmp_path)  # as in `datasets`
    assert "configurations one, two" in message and f"{tmp_path}:one" in message
    assert texts(f"{tmp_path}:one") == ["one/x.jsonl"]
    assert (texts(f"{tmp_path}:two"), texts(f"{tmp_path}:two@test")) == (
        ["two/train.jsonl"], ["two/test.jsonl"]
    )  # fmt: skip
    put(tmp_path / "README.md", card(one, two | {"default": True}))
    assert texts(tmp_path) == ["two/train.jsonl"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("---\nconfigs: [\n---\n", "configs in YAML"),
        (card({"data_files": "a.jsonl"}), "config_name"),
        (card({"config_name": "x", "data_files": [{"split": "train"}]}), "path"),
        (card({"config_name": "x", "data_files": [{"split": "train", "path": 3}]}), "int"),
        (card({"config_name": "x", "data_files": "../a.jsonl"}), "outside of the folder"),
        (card({"config_name": "x", "data_files": "b/*"}), "none that match b/"),
    ],
)
def test_a_readme_that_cannot_be_right(tmp_path, text, words):
    put(tmp_path / "a.jsonl", row("a"))
    put(tmp_path / "README.md", text)
    assert words in refusal(tmp_path)
    for other in ("# Data\n---\nconfigs: 3\n---\n", "---\nconfigs:\n---\n", "---\n- 1\n---\n"):
        put(tmp_path / "README.md", other)
        assert texts(tmp_path) == ["a"]


def test_folders_of_save_to_disk(tmp_path):
    train, test = (datasets.Dataset.from_list([{"text": text}] * 3) for text in "ab")
    train.save_to_disk(tmp_path / "one", num_shards=2)
    assert texts(tmp_path / "one") == ["a"] * 3
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    assert texts(tmp_path / "both") == ["a"] * 3
    assert "train split" in sources.note(str(tmp_path / "both"))
    assert texts(f"{tmp_path}/both@test") == ["b"] * 3
    assert "train, test" in refusal(f"{tmp_path}/both@dev")
    (tmp_path / "one/data-00001-of-00002.arrow").unlink()
    assert "data-00001" in refusal(tmp_path / "one")
    (tmp_path / "one/state.json").write_text("{")
    assert "save_to_disk" in refusal(tmp_path / "one")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["README.md", "x.bin"], ["without any", "x.bin"]),
        ([], ["without files"]),
        (["a.jsonl", "a.csv"], ["one kind", "a.csv"]),
        (["a.jsonl", "a.jsonl.gz"], ["copy", "a.jsonl.gz"]),
    ],
)
def test_folders_that_are_refused(tmp_path, names, words):
    (tmp_path / "x").mkdir()
    for name in names:
        put(tmp_path / "x" / name, row("a"))
    message = refusal(tmp_path / "x")
    for word in words:
        assert word in message
    if names and "one kind" in words:
        assert texts(tmp_path / "x/*.jsonl") == ["a"]


def test_a_pattern_without_a_match_and_a_hub_id(tmp_path):
    assert "no such file" in refusal("nowhere/*.jsonl")
    names = put(tmp_path / "a.jsonl", "{}"), put(tmp_path / "b.jsonl", "{}")
    assert f"separate them by spaces: {names[0]} {names[1]}" in refusal(f"{names[0]}, {names[1]}")
    assert folders.find("owner/name") is None
    assert folders.find("owner/name:config@split") is None


# ---------------------------------------------------------------------------------- bad rows


def test_bad_rows_are_skipped_up_to_a_number(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"text": "a"}', "[1]", '{"text": "b"}', "{", '{"n": 1}')
    bad = bad_rows.BadRows(3)
    rows = sources.load(path, bad=bad)
    assert [row.get("text") for row in rows] == ["a", "b", None]
    assert [*bad.places] == ["x.jsonl:2", "x.jsonl:4"]
    assert bad.news().startswith("2 skipped (of at most 3): x.jsonl:2: a list, not an object;")
    assert bad.news() == ""

    def encode(some, _):  # refuses rows together, as encoding.encode does
        if wrong := [row[kinds.ORIGIN] for row in some if "text" not in row]:
            raise errors.UserError(expected="text", found=wrong)
        return [row["text"] for row in some]

    kept, encoded = bad_rows.encode(rows, encode, bad)
    assert encoded == [row["text"] for row in kept] == ["a", "b"]
    assert "x.jsonl:5" in bad.news()
    assert bad_rows.encode(rows, encode, bad)[1] == ["a", "b"]  # counted once
    for most in (0, 1):
        few = bad_rows.BadRows(most)
        assert "x.jsonl:4" in refusal(path, bad=few)
        assert not few.places
    with pytest.raises(errors.UserError, match=r"x\.jsonl:5"):
        bad_rows.encode(rows, encode, bad_rows.BadRows(0))


# ---------------------------------------------------------------------------------- any bytes


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
NAMES = st.sampled_from(["text", "prompt", "data", "é", "n"])
LINE = st.one_of(
    st.dictionaries(NAMES, VALUES, max_size=3).map(json.dumps).map(str.encode),
    st.dictionaries(NAMES, VALUES, max_size=3).map(
        lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ),
    st.sampled_from([b"", b" ", b"[", b"{", b"]", b'{"a": 1', b'{"a": 1, "a": 2}', b"\xff", b"1",
                     b'"\\ud800"', b'{"text": "\\ud800"}', b"\xef\xbb\xbf{}"]),
    st.binary(max_size=6),
)  # fmt: skip


@hypothesis.given(
    st.lists(LINE, max_size=4),
    st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.one_of(st.none(), st.tuples(st.integers(0, 50), st.binary(max_size=2))),
)
def test_any_bytes_give_their_rows_or_one_error(tmp_path_factory, lines, end, mark, change):
    data = mark + end.join(lines)
    if change:
        at, new = change
        data = data[:at] + new + data[at + 1 :]
    path = put(tmp_path_factory.getbasetemp() / "any/x.jsonl", data)
    try:
        found = [without_origin(each) for each in sources.load(str(path))]
    except errors.UserError as error:
        assert "x.jsonl" in str(error)
        return
    if files.is_document(path):
        return
    text = data.decode().replace("\ufeff{", "{")
    written = [line for line in text.split("\n") if line.strip(" \t\r\ufeff")]
    assert json.dumps(found) == json.dumps([json.loads(line.strip("\ufeff")) for line in written])
