"""The command `generate`: many prompts, a file of results, and the slots for them."""

import json
import pathlib
import shutil

import cli
import pytest

from lora_jax.cli import generate, opening, results_file
from lora_jax.generation import config
from lora_jax.parallel import devices


@pytest.fixture
def flags(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    texts = ["Once upon a time", "Tom", "The dog was very happy because", "Lily", "One day"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return ("--model", cli.BASE, "--prompts-file", prompts, "--max-new-tokens", 8, "--slots", 2,
            "--temperature", 1, "--seed", 5)  # fmt: skip


def said(ended, text):
    return text in " ".join(ended.out.split())


def test_a_run_that_is_killed_goes_on_to_the_same_results(flags, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    ended = cli.run("generate", *flags, "--output-file", whole)
    assert ended.code == 0 and said(ended, f"5 continuations written to {whole}")
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    printed = cli.run("generate", *flags).out
    assert printed == "".join(f"{row['prompt']}{row['text']}\n\n" for row in rows)
    assert [row["index"] for row in rows] == [*range(5)]
    assert {row["finish_reason"] for row in rows} <= {"length", "stop"}
    assert all(row["num_tokens"] <= 8 for row in rows)
    assert len({row["text"] for row in rows}) == 5

    add = results_file.ResultsFile.add

    def killing(file, begun, found):
        if file.num_done == 3:
            file._file.write(b'{"index": 3, "prom')
            raise KeyboardInterrupt
        add(file, begun, found)

    with monkeypatch.context() as patch:
        patch.setattr(results_file.ResultsFile, "add", killing)
        assert cli.run("generate", *flags, "--output-file", killed).code == 130
    ended = cli.run("generate", *flags, "--output-file", killed)
    assert said(ended, f"3 of 5 prompts are done in {killed}")
    assert killed.read_text() == whole.read_text()

    ended = cli.run("generate", *flags, "--output-file", killed)
    assert "5 of 5 prompts are done" in ended.out and ended.code == 0
    for others in (("--seed", 6), ("--stop", "a"), ("--quant", "int8"), ("--dtype", "bfloat16")):
        message = cli.refused("generate", *flags, *others, "--output-file", killed)
        assert "another model, adapter or settings" in message, others
    assert killed.read_text() == whole.read_text()


def test_the_flags_of_sampling_reach_the_engine():
    typed = (
        "--prompt a --repetition-penalty 1.5 --presence-penalty 0.5 --frequency-penalty 0.25 "
        "--stop b --stop c --min-tokens 2 --ignore-eos --seed 3 --max-new-tokens 4"
    )
    assert generate.settings_of(generate.parse(typed.split())).sampling == config.Sampling(
        max_new_tokens=4, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25,
        stop=("b", "c"), min_tokens=2, ignore_eos=True, seed=3,
    )  # fmt: skip


def test_a_chat_is_resumed_with_the_time_of_its_beginning(flags, tmp_path):
    base = pathlib.Path(shutil.copytree(cli.BASE, tmp_path / "base"))
    (base / "chat_template.jinja").write_text(
        "{{ strftime_now('%Y') }} {{ messages[0]['content'] }}"
    )
    flags = ("--model", base, *flags[2:], "--chat", "--output-file", tmp_path / "out.jsonl")
    assert cli.run("generate", *flags, "--chat-time", "1999-01-31").code == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["chat_time"] for row in rows} == {"1999-01-31"}
    assert "5 of 5 prompts are done" in cli.run("generate", *flags).out
    assert "settings" in cli.refused("generate", *flags, "--chat-time", "2001-01-31")
    assert "'noon'" in cli.refused("generate", *flags, "--chat-time", "noon")


def test_prompts_that_do_not_fit_are_named_before_anything_is_loaded(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "load", None)
    path = tmp_path / "long.txt"
    path.write_text("Tom\n" + "Tom " * 600 + "\nTom\n" + "Tom " * 700)
    message = cli.refused("generate", "--model", cli.BASE, "--prompts-file", path)
    assert f"{path}:2:" in message and f"{path}:4:" in message and f"{path}:3:" not in message


def test_slots_that_do_not_fit_are_given_up(flags, monkeypatch):
    plain = cli.run("generate", *flags)
    assert "prompts at a time" not in plain.err
    monkeypatch.setattr(devices, "free_bytes", lambda device: 110_000)
    flags = (*flags[:6], *flags[8:])  # 5 slots
    fewer = cli.run("generate", *flags)
    assert "note: 2 prompts at a time, because the keys and values of 5 take" in fewer.err
    assert fewer.out == plain.out
    monkeypatch.setattr(devices, "free_bytes", lambda device: 100)
    message = cli.refused("generate", *flags)
    assert "1 slots of" in message and "lower --max-new-tokens" in message


def test_what_has_no_sense_is_refused_together():
    message = cli.refused("generate", "--prompt", "a", "--slots", 0, "--min-tokens", 9,
                          "--max-new-tokens", 8, "--repetition-penalty", 0)  # fmt: skip
    for part in ("--slots 0", "--min-tokens up to", "repetition_penalty 0"):
        assert part in message
