"""Streams: any sequence at any time, from files read in part, in memory that does not grow."""

import itertools
import json
import random
import weakref

import cli
import numpy as np
import pytest
import test_mixture

from lora_jax import errors
from lora_jax.data import bad_rows, packing, sources, stream
from lora_jax.data.formats import files as reading

reader = test_mixture.reader
files = test_mixture.files


# ------------------------------------------------------------------------- positions in files


def written(path, content):
    path.write_bytes(content.encode())
    return path


def every_kind(tmp_path):
    import datasets

    many = {"text": [f"row {n}" for n in range(25)], "n": [*range(25)]}
    datasets.Dataset.from_dict(many).to_parquet(tmp_path / "x.parquet", batch_size=10)
    lines = [json.dumps({"text": f"ä {n}"}, ensure_ascii=False) for n in range(5)]
    return [
        written(tmp_path / "x.jsonl", "\ufeff" + "\n\n".join(lines) + "\r\n"),
        written(tmp_path / "lines.json", "\n".join(lines)),
        written(tmp_path / "array.json", f"[{','.join(lines)}]"),
        written(tmp_path / "x.csv", 'a,b\n1,"ä\n\n2"\r\n3,4\r5,"6\r7"\n\n8,9'),
        written(tmp_path / "x.txt", "\ufeffä\rb\r\n\nc\n\rd"),
        tmp_path / "x.parquet",
    ]


def test_reading_continues_from_the_position_after_any_example(tmp_path):
    for path in every_kind(tmp_path):
        whole = [*reading.read(path)]
        assert len(whole) >= 3 and not any(isinstance(each.example, str) for each in whole)
        for number, found in enumerate(whole, start=1):
            after = tuple(json.loads(json.dumps(found.after)))
            assert [*reading.read(path, after)] == whole[number:], path


def test_a_json_array_is_not_streamed(tmp_path):
    path = written(tmp_path / "x.json", ' \n[{"text": "a"}]')
    with pytest.raises(errors.UserError, match="a JSON array"):
        sources.stream(str(path))


# ------------------------------------------------------------------------- sequences


def numbered(path, count):
    path.write_text("".join(json.dumps({"text": "x", "n": n}) + "\n" for n in range(count)))
    return str(path)


def alone(examples):
    return packing.alone(
        [(np.array([n]), np.array([True])) for n in (row["n"] for row in examples)]
    )


def opened(source, *, arrange=alone, window=6, number=0):
    how = {"columns": None, "seed": 3, "number": number, "window": window}
    return stream.Stream(source, arrange, **how)


def shown(sequences, numbers):
    return [int(sequences[n][0][0][0]) for n in numbers]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 10)


@pytest.fixture
def read(monkeypatch):
    """The numbers of all examples that are read."""
    numbers, original = [], sources.stream

    def watched(*how):
        for found in original(*how):
            numbers.append(found.number)
            yield found

    monkeypatch.setattr(sources, "stream", watched)
    return numbers


@pytest.mark.parametrize("count", [34, 30, 3])  # also if the last block is full
def test_a_stream_repeats_all_examples_shuffled_in_blocks(small, tmp_path, count):
    source = numbered(tmp_path / "x.jsonl", count)
    numbers = shown(opened(source), range(3 * count))
    passes = [numbers[n : n + count] for n in range(0, 3 * count, count)]
    for each in passes:
        blocks = [each[n : n + 10] for n in range(0, count, 10)]
        assert [sorted(block) for block in blocks] == [
            [*range(n, min(n + 10, count))] for n in range(0, count, 10)
        ]
    assert passes[0] != passes[1] != passes[2] and passes[0] != sorted(passes[0])
    assert shown(opened(source, number=1), range(count)) != passes[0]


@pytest.mark.parametrize("part", ["[5:27]", "[:27]", "[28:]"])
def test_a_part_of_a_stream_repeats_and_is_resumed(small, tmp_path, part):
    for name in "ab":  # the numbers go on in the second file
        numbered(tmp_path / f"{name}.jsonl", 20)
    source, expected = f"{tmp_path}@train{part}", [*range(20), *range(20)]
    first, last = (int(end) if end else None for end in part.strip("[]").split(":"))
    expected = expected[first:last]
    numbers = shown(opened(source), range(2 * len(expected)))
    assert sorted(numbers) == sorted(2 * expected)
    records = [*sources.stream(source)]
    for number, found in enumerate(records, start=1):
        after = tuple(json.loads(json.dumps(found.after)))
        assert [*sources.stream(source, after)] == records[number:]


def test_sequences_may_be_requested_in_any_order(small, tmp_path):
    source = numbered(tmp_path / "x.jsonl", 34)
    straight = shown(opened(source), range(200))
    numbers = [*range(200)]
    random.Random(0).shuffle(numbers)
    assert shown(opened(source), numbers) == [straight[n] for n in numbers]


def test_skipped_and_long_examples_change_only_the_blocks(small, tmp_path, monkeypatch):
    def odd(examples):
        made = ((int(sequence[0][0][0]), sequence) for sequence in alone(examples))
        return [sequence for n, sequence in made if n % 2 and n // 10 != 1]

    source = numbered(tmp_path / "x.jsonl", 40)
    expected = [n for n in range(40) if n % 2 and n // 10 != 1]
    assert sorted(shown(opened(source, arrange=odd), range(15))) == expected
    monkeypatch.setattr(stream, "MAX_CHARACTERS", 3)  # each example has one character
    assert shown(opened(source, window=1), range(40)) != [*range(40)]
    starts = opened(source)
    shown(starts, range(10))
    assert [start.sequence for start in starts._starts][:4] == [0, 3, 6, 9]


def test_a_stream_without_sequences_is_an_error_and_ends(small, tmp_path):
    with pytest.raises(errors.UserError, match="none in the whole stream"):
        opened(numbered(tmp_path / "x.jsonl", 34), arrange=lambda examples: [])[0]


def test_a_damaged_line_is_reported_when_it_is_reached(small, tmp_path):
    source = numbered(tmp_path / "x.jsonl", 34)
    with open(source, "a") as file:
        file.write("broken\n")
    sequences = opened(source)
    assert sorted(shown(sequences, range(30))) == [*range(30)]
    with pytest.raises(errors.UserError, match=r"x\.jsonl:35"):
        sequences[30]


# ------------------------------------------------------------------------- resuming


def test_a_resumed_stream_reads_from_the_block_where_it_continues(small, tmp_path, read):
    source, file = numbered(tmp_path / "x.jsonl", 1000), tmp_path / "streams/0.jsonl"
    first = opened(source)
    first.keep(file, write=True)
    straight = shown(first, range(640))
    first._thread.shutdown()
    saved = file.read_text()
    read.clear()
    again = opened(source)
    again.keep(file, write=True)
    assert shown(again, range(603, 608)) == straight[603:608]
    again[608]  # so that the block ahead is prepared, too
    again._thread.shutdown()
    assert min(read) == 601 and max(read) <= 620
    assert file.read_text() == saved  # known starts are not saved again


@pytest.mark.parametrize("damage", ["missing", "cut off", "garbage", "another stream's"])
def test_the_sequences_do_not_depend_on_what_was_saved(small, tmp_path, damage):
    source, file = numbered(tmp_path / "x.jsonl", 100), tmp_path / "streams/0.jsonl"
    first = opened(source)
    first.keep(file, write=True)
    straight = shown(first, range(90))
    first._thread.shutdown()
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    content = {"cut off": whole[:-5], "garbage": "".join([*lines[:3], "\0\0\0\n", *lines[4:]]),
               "another stream's": "[5, [0, 0]]\n[9, [30, 2]]\n", "missing": ""}  # fmt: skip
    file.write_text(content[damage])
    again = opened(source)
    again.keep(file, write=True)
    assert shown(again, range(60, 90)) == straight[60:90]
    again._thread.shutdown()
    assert file.read_text() == whole


def test_only_rows_that_were_not_reached_may_change(small, tmp_path):
    source, file = numbered(tmp_path / "x.jsonl", 60), tmp_path / "streams/0.jsonl"
    good = (tmp_path / "x.jsonl").read_text()
    straight = shown(opened(source), range(150))

    def changed(line, text, upto):
        """A stream that goes on after sequence `upto` with a line changed."""
        lines = good.splitlines(keepends=True)
        lines[line] = text
        (tmp_path / "x.jsonl").write_text("".join(lines))
        again = opened(source)
        again.keep(file, write=True)
        return shown(again, range(upto, 150))

    first = opened(source)
    first.keep(file, write=True)
    with pytest.raises(errors.UserError, match=r"x\.jsonl:36"):
        changed(35, "a bad row\n", 0)
    # The row corrected: longer than before, and so are its file and all positions after it.
    assert changed(35, '{"text": "x",    "n": 35}\n', 22) == straight[22:]
    with pytest.raises(errors.UserError, match="rows that the run has read before"):
        changed(21, '{"text": "x", "n": 99}\n', 22)


def test_a_stream_skips_bad_rows_and_counts_each_once(small, tmp_path):
    path = tmp_path / "x.jsonl"
    source = numbered(path, 20)
    path.write_text(path.read_text() + "bad\n" * 12 + '{"text": "x", "n": 20}\n')
    bad = bad_rows.BadRows(12)
    how = {"columns": None, "seed": 3, "number": 0, "window": 6, "bad": bad}
    numbers = shown(stream.Stream(source, alone, **how), range(42))
    assert sorted(numbers) == sorted([*range(21)] * 2)
    assert [*bad.places] == [f"x.jsonl:{n}" for n in range(21, 33)]


def test_another_process_follows_and_writes_nothing(small, tmp_path):
    source, file = numbered(tmp_path / "x.jsonl", 100), tmp_path / "streams/0.jsonl"
    follower = opened(source)
    follower.keep(file, write=False)
    assert len(shown(follower, range(50))) == 50 and not file.parent.exists()


@pytest.mark.parametrize("count", [300, 3000])
def test_memory_does_not_grow_with_the_file(small, tmp_path, count):
    alive, most = 0, 0

    def gone():
        nonlocal alive
        alive -= 1

    def watched(examples):
        nonlocal alive, most
        made = alone(examples)
        alive += len(made)
        most = max(most, alive)
        for ((ids, _),) in made:
            weakref.finalize(ids, gone)
        return made

    sequences = opened(numbered(tmp_path / "x.jsonl", count), arrange=watched, window=25)
    shown(sequences, range(count))
    assert 25 <= most <= 25 + 4 * 10


# ------------------------------------------------------------------------- of a job


def test_processes_and_restarts_make_the_same_batches_of_a_packed_mixture(
    monkeypatch, files, reader, tmp_path
):
    monkeypatch.setattr(stream, "BLOCK", 16)
    flags = ("--dataset", *files, "--columns", "text=story", "--weights", "3,1", "--seq-len", 64,
             "--packing", "--streaming", "--max-steps", 12, "--batch-size", 4,
             "--grad-accum", 2)  # fmt: skip
    made = test_mixture.data_of(reader, *flags)
    made.keep(tmp_path / "streams", write=True)
    straight = [made.batches.batch(step) for step in range(12)]
    assert straight[0]["attention_mask"].max() > 1
    again = test_mixture.data_of(reader, *flags)
    again.keep(tmp_path / "streams", write=False)
    assert again.fingerprints == made.fingerprints
    for step, first in itertools.product((7, 3, 11), (0, 2)):
        part = again.batches.batch(step, slice(first, first + 2))
        for name, array in straight[step].items():
            assert array.shape == (2, 4, 64) == again.batches.shape(step)
            np.testing.assert_array_equal(part[name], array[:, first : first + 2])


def test_a_stream_that_grew_or_starts_differently_has_another_fingerprint(reader, tmp_path):
    path = cli.write_rows(tmp_path / "x.jsonl", 20)
    flags = ("--dataset", path, "--streaming", "--max-steps", 3)
    prints = [test_mixture.data_of(reader, *flags).fingerprints["train"]]
    for count, first in ((21, 0), (20, 20)):
        cli.write_rows(path, count, first)
        prints.append(test_mixture.data_of(reader, *flags).fingerprints["train"])
    assert len({*prints}) == 3
