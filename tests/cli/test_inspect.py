"""inspect: examples as the model sees them."""

import io
import json

import cli
import pytest

from lora_jax.cli import inspect as inspect_script
from lora_jax.data import sources
from lora_jax.training import settings


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return cli.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 12)


def inspect(*flags):
    ended = cli.run("inspect_data", *flags)
    assert ended.code == 0 and ended.err == "", ended
    return ended.out


def test_tokens_to_train_on_are_in_brackets(rows):
    out = inspect("--dataset", rows, "--rows", 2, "--first", 3)
    assert "12 examples" in out and "0 at 256 tokens; 0 skipped" in " ".join(out.split())
    first, second = out.split("── ")[1:]
    assert first.startswith("train.jsonl:3: ")
    assert first.splitlines()[1] == "<bos>Tom has 2 cats.⟦ He likes cat 2.<eos>⟧"
    assert second.splitlines()[1] == "<bos>Tom has 3 cats.⟦ He likes cat 3.<eos>⟧"


def test_on_a_terminal_they_are_in_colour(rows, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(io, "StringIO", Terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "<bos>Tom has 0 cats.\033[32;1m He likes cat 0.<eos>\033[0m" in inspect(
        "--dataset", rows
    )
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in inspect("--dataset", rows)


def test_packed_sequences_show_their_examples_and_tokens(rows):
    out = inspect("--dataset", rows, "--packing", "--rows", 1, "--tokens", "--seq-len", 64)
    assert "(packed) of 48 tokens" in out and "\nsequence 1 of " in out
    blocks = out.split("── ")[1:]
    assert len(blocks) > 1
    for number, block in enumerate(blocks, 1):
        head, *tokens = block.strip().splitlines()
        assert f" {len(tokens)} tokens, " in head
        positions, _, numbers, *_ = zip(*(line.split() for line in tokens), strict=False)
        assert [int(p) for p in positions] == list(range(len(tokens)))
        assert set(numbers) == {str(number)}
        assert int(head.split(", ")[1].split()[0]) == sum(" trained " in line for line in tokens)
        assert tokens[0].endswith("'<bos>'") and tokens[-1].endswith("'<eos>'")


def test_cut_skipped_and_longest_examples_are_reported(tmp_path):
    made = [("a", "b"), ("Tom has cats. " * 40, "x"), ("c", "Tom has cats. " * 30)]
    path = tmp_path / "train.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in made]
    path.write_text("\n".join(lines))
    out = " ".join(inspect("--dataset", path, "--seq-len", 32, "--rows", 0).split())
    assert "2 examples, " in out and "2 at 32 tokens; 1 skipped" in out
    assert "longest train.jsonl:3 (" in out and "the longest 32" in out
    path.write_text(lines[1])
    assert "a token to train on" in cli.refused("inspect_data", "--dataset", path, "--seq-len", 32)


def test_the_shares_of_a_mixture_and_its_repetitions_are_shown(rows, tmp_path):
    other = cli.write_rows(tmp_path / "other.jsonl", 4)
    out = inspect("--dataset", rows, other, "--weights", "1,1", "--first", 4, "--rows", 1)
    assert out.count("\nsequence 4 of ") == 2 and "── other.jsonl:4: " in out
    expected = f"in 16 sequences: 50.0% of {rows}, seen 0.67 times; 50.0% of {other}, seen 2 times"
    assert expected in " ".join(out.split())


def test_the_first_examples_of_a_stream_are_shown(rows, monkeypatch):
    monkeypatch.setattr(sources, "HEAD", 5)
    out = " ".join(inspect("--dataset", rows, "--streaming", "--rows", 1, "--first", 5).split())
    assert f"5 examples, 115 tokens: its first examples, {rows}" in out and "sequence 5 of 5" in out
    assert "5 (padded) of 256 tokens" in out


def test_wrong_numbers_are_refused(rows):
    expected = cli.refused("inspect_data", "--dataset", rows, "--first", 13)
    assert "one of the 12 sequences" in expected and "--first 13" in expected
    assert "--rows -1" in cli.refused("inspect_data", "--dataset", rows, "--rows", "-1")


def test_without_model_and_data_it_cuts_as_train_does():
    asked = inspect_script.settings_of(inspect_script.parse([]))
    assert asked.data.seq_len == settings.build().data.seq_len == 96
    assert inspect_script.settings_of(inspect_script.parse(["--seq-len", "8"])).data.seq_len == 8
    assert inspect_script.settings_of(inspect_script.parse(["--model", "m"])).data.seq_len is None


@pytest.mark.parametrize(
    ("row", "flag"),
    [
        ({"prompt": "a", "completion": "b", "system": "c"}, "--as-chat puts system"),
        ({"text": "a b", "chosen": "c", "rejected": "d"}, "--dpo trains on chosen"),
    ],
)
def test_the_flag_that_would_use_a_column_is_named(tmp_path, row, flag):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert flag in " ".join(inspect("--dataset", path, "--rows", 0).split())
