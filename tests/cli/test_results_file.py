"""`generate --output-file`: results as they come, and a second run that continues."""

import json

import cli
import pytest

from lora_jax import errors
from lora_jax.cli import results_file

PROMPTS = ("a", "b", "ü")


def filled(path, count=3):
    file = results_file.ResultsFile(path, PROMPTS, "digest")
    for number in range(count):
        file.add(text=f"text {number}", finish_reason="stop", num_tokens=number)
    file.close()


def test_a_torn_line_is_cut_off_and_the_rest_is_kept(tmp_path):
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "new" / "torn.jsonl"
    filled(whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert json.loads(lines[2]) == {
        "index": 2, "prompt": "ü", "text": "text 2", "finish_reason": "stop", "num_tokens": 2,
        "settings": "digest",
    }  # fmt: skip
    torn.parent.mkdir()
    torn.write_bytes(lines[0] + lines[1][:20])
    file = results_file.ResultsFile(torn, PROMPTS, "digest")
    file.close()
    assert (file.num_done, torn.read_bytes()) == (1, lines[0])


def test_a_file_of_something_else_is_refused_and_stays_as_it_was(tmp_path):
    path = tmp_path / "out.jsonl"
    filled(path, 2)
    before = path.read_bytes()
    for prompts, digest, problem in (
        (("a", "c"), "digest", "line 2.*|another prompt"),
        (("a",), "digest", "another prompt"),
        (PROMPTS, "other", "another model or other settings"),
    ):
        with pytest.raises(errors.UserError, match=problem):
            results_file.ResultsFile(path, prompts, digest)
        assert path.read_bytes() == before
    for text in ('{"prompt": "a"}\n', '{"prompt": "a"}', "notes", '{"index": 0, "prompt": "c"'):
        path.write_text(text)  # such as a data set; the last line need not end
        with pytest.raises(errors.UserError, match="another kind of file"):
            results_file.ResultsFile(path, PROMPTS, "digest")
        assert path.read_text() == text


def test_two_processes_do_not_write_to_one_file(tmp_path):
    first = results_file.ResultsFile(tmp_path / "out.jsonl", PROMPTS, "digest")
    with pytest.raises(errors.UserError, match="in use"):
        results_file.ResultsFile(tmp_path / "out.jsonl", PROMPTS, "digest")
    first.close()
    results_file.ResultsFile(tmp_path / "out.jsonl", PROMPTS, "digest").close()


def test_a_run_that_is_continued_gives_the_results_of_one_that_was_not(tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    texts = ["In Milan", "Eva has", "Tom has 41 cats."]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    flags = ("generate", "--prompts-file", prompts, "--output-file", out, "--temperature", "1",
             "--max-new-tokens", "6", "--stop", "never", "--repetition-penalty", "1.1")  # fmt: skip
    cli.run(*flags)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert [json.loads(line)["prompt"] for line in lines] == texts
    out.write_bytes(lines[0] + lines[1][:9])
    ended = cli.run(*flags)
    assert out.read_bytes() == whole
    assert "1 of 3 results" in ended.out
    assert "3 in" in cli.run(*flags).out  # nothing is left
    prompts.write_text('{"prompt": "a"}\nb\n{"text": "c"}\n')
    refused = cli.refused("generate", "--prompts-file", prompts)
    assert "line 2: b" in refused and "line 3" in refused
