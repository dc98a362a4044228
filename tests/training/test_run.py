"""Whole runs of train and generate on a small real model."""

import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import cli
import hub_server
import jax
import pytest
import safetensors.numpy

from lora_jax import console
from lora_jax.cli import opening
from lora_jax.lora import peft
from lora_jax.optim import step as train_step
from lora_jax.training.settings import groups

STEPS = 6
# dropout, a checkpoint every 2 steps
FLAGS = (
    *("--model", cli.BASE, "--batch-size", 8, "--grad-accum", 1, "--remat", "none"),
    *("--rank", 2, "--dropout", 0.1, "--max-steps", STEPS, "--save-every", 2),
)
EVALUATED = ("--eval-every", 3, "--exact-match", 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags for a data set of 40 examples and a held-out one of 8."""
    folder = tmp_path_factory.mktemp("data")
    train = cli.write_rows(folder / "train.jsonl", 40)
    held_out = cli.write_rows(folder / "eval.jsonl", 8, first=40)
    return ("--dataset", train, "--eval-dataset", held_out)


@pytest.fixture(scope="module")
def evaluated(data):
    """Flags of a run on it, with evaluations."""
    return (*FLAGS, *data, *EVALUATED)


@pytest.fixture(scope="module")
def plain(data):
    """Flags of a run without held-out data."""
    return (*FLAGS, *data[:2])


@pytest.fixture(scope="module")
def whole(evaluated, tmp_path_factory):
    """(folder, how it ended) of an uninterrupted run, with short paths in its flags."""
    folder = tmp_path_factory.mktemp("whole")
    flags = [*evaluated]
    for name in ("--model", "--dataset", "--eval-dataset"):
        index = flags.index(name) + 1
        path, flags[index] = flags[index], pathlib.Path(flags[index]).name
        (folder / flags[index]).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.chdir(folder)
        ended = cli.run("train", *flags, "--output-dir", "run")
    assert ended.code == 0 and ended.err == "", ended
    return folder / "run", ended


def comparable(folder):
    """(metrics.jsonl without times, the bytes of the adapter)."""
    rows = cli.metrics(folder)
    for row in rows:
        row.pop("tokens_per_second", None)
        row.pop("data_wait", None)
    return rows, (folder / "adapter/adapter_model.safetensors").read_bytes()


def checkpoints(folder):
    names = (path.name for path in (folder / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdigit())


def at_step(monkeypatch, number, act):
    """Calls act() after step `number` is logged."""
    show = console.Progress.show

    def shown(self, step, metrics):
        show(self, step, metrics)
        if step == number:
            act()

    monkeypatch.setattr(console.Progress, "show", shown)


# ------------------------------------------------------------------------- output


def test_the_files_of_a_run(whole):
    folder, _ = whole
    names = {path.name for path in folder.iterdir()} - {".lock"}
    assert names == {"adapter", "checkpoints", "config.yaml", "metrics.jsonl", "run.json",
                     "report.html"}  # fmt: skip
    assert checkpoints(folder) == [4, 6]
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder.parent / cli.BASE.name)
    assert config["r"] == 2
    tensors = safetensors.numpy.load_file(folder / "adapter/adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 5  # A and B of q_proj and v_proj in 5 layers
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_metrics_are_one_json_object_per_line(whole):
    rows = cli.metrics(whole[0])
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    for row in steps:
        assert row.keys() == {"step", "loss", "lr", "grad_norm", "tokens_per_second", "data_wait"}
        assert row["loss"] > 0 and row["grad_norm"] > 0 and row["tokens_per_second"] > 0
    evaluations = [row for row in rows if "eval_loss" in row]
    assert rows[0] is evaluations[0] and rows[-1] is evaluations[-1]
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    assert [sorted(row.keys() - {"step", "eval_loss"}) for row in evaluations] == [
        ["exact_match"], [], ["exact_match"],
    ]  # fmt: skip
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


def test_run_json_has_settings_versions_devices_and_results(whole):
    folder, _ = whole
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished" and run["num_steps"] == STEPS
    assert run["settings"]["rank"] == 2 and run["settings"]["dropout"] == 0.1
    assert run["settings"]["lr"] == 2e-4  # a default
    assert run["versions"]["jax"] == jax.__version__ and "lora-jax" in run["versions"]
    assert run["device"] == "8 × cpu (cpu)" and run["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert run["base"]["id"] == str(folder.parent / cli.BASE.name) and run["base"]["tensors"]
    assert {"load", "evaluate", "train"} <= run["seconds"].keys()
    assert all(value > 0 for value in run["seconds"].values())
    assert run["peak_bytes"] > run["memory"]["bytes_before"] > 2**24
    # XLA plans 17.5 MB of this step for each of the eight devices, including gaps between arrays.
    planned = run["memory"]["planned_bytes"]
    assert 0.5 < planned / (8 * 17.5e6) < 1 and planned < run["peak_bytes"]
    assert run["checks"] == {"trained_layers": 10, "without_gradient": [], "changed_base": []}
    assert [len(run["samples"][when]) for when in ("before", "after")] == [2, 2]


def test_the_output_of_a_run(whole):
    _, ended = whole
    assert "step 0: held-out loss" in ended.out and "exact match" in ended.out
    assert re.search(r"trainable \(0\.\d\d%\)", ended.out)
    assert "step 1 of 6: loss" in ended.out and "step 6 of 6: loss" in ended.out
    assert "check     all 10 trained layers have a gradient and change" in ended.out
    assert "check     the base is unchanged" in ended.out
    assert "\r" not in ended.out  # no progress bar without a terminal
    assert re.search(r"^adapter +run/adapter$", ended.out, re.MULTILINE)
    assert re.search(r"^report +run/report.html$", ended.out, re.MULTILINE)
    assert "scripts/generate.py" in ended.out and "--adapter run/adapter" in ended.out


def test_nothing_printed_is_wider_than_the_terminal(whole, plain, monkeypatch):
    folder, ended = whole
    assert max(map(len, ended.lines)) <= 80, max(ended.lines, key=len)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(folder.parent)
    again = cli.run("train", *plain, "--output-dir", "run")
    assert again.code == 2 and max(map(len, again.lines)) <= 80


# ------------------------------------------------------------------------- stop and resume


def test_resume_starts_over_without_a_checkpoint_and_continues_after_ctrl_c(
    whole, evaluated, tmp_path, monkeypatch, capfd
):
    folder = tmp_path / "run"

    def interrupted(self, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(console.Progress, "__init__", interrupted)
        assert cli.run("train", *evaluated, "--output-dir", folder).code == 130
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        ended = cli.run("train", "--resume", "--output-dir", folder)
    assert "no finished checkpoint: starting over" in ended.out
    assert_stopped(folder, ended, 130, capfd)
    ended = cli.run("train", "--resume", "--output-dir", folder)
    assert ended.code == 0 and "from step 3 of 6" in ended.out
    assert comparable(folder) == comparable(whole[0])


def test_sigterm_saves_and_says_to_start_again(plain, tmp_path, monkeypatch, capfd):
    folder, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    ended = cli.run("train", *plain, "--output-dir", folder)
    assert signal.getsignal(signal.SIGTERM) == before
    assert_stopped(folder, ended, 75, capfd)


def assert_stopped(folder, ended, code, capfd):
    assert ended.code == code and "Traceback" not in ended.err
    said = capfd.readouterr().err
    assert "stopping after this step, to save" in said
    assert ("Ctrl-C" in said) == (code == 130) and ("SIGTERM: " in said) == (code == 75)
    assert "stopped after step 3 of 6" in ended.out
    assert f"train.py --resume --output-dir {folder}" in ended.out.replace(" \\\n   ", "")
    assert checkpoints(folder)[-1] == 3
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped at step 3"
    assert (folder / "adapter/adapter_model.safetensors").exists()
    assert "■ stopped at step 3" in (folder / "report.html").read_text()


def test_a_second_ctrl_c_stops_at_once(plain, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    at_step(monkeypatch, 3, twice)
    ended = cli.run("train", *plain, "--output-dir", tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) == before
    assert ended.code == 130 and ended.err.endswith("stopped\n")
    assert checkpoints(tmp_path / "run") == [2]
    assert not (tmp_path / "run/adapter").exists()
    assert cli.metrics(tmp_path / "run")[-1]["step"] == 3


def test_resuming_a_finished_run_shows_it_even_if_the_report_fails(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    (folder / "report.new").mkdir()
    ended = cli.run("train", "--resume", "--output-dir", folder, "--prompt", "Once upon a time",
                    "--max-new-tokens", 8)  # fmt: skip
    assert ended.code == 0 and "from step 6 of 6" in ended.out
    assert "report    not written: Is a directory" in ended.out
    assert "Tom has 40 cats.\nbefore" in ended.out
    # --prompt after training: the leading space of the continuation is kept
    assert re.search(r"^Once upon a time[ ,]", ended.out, re.MULTILINE)
    assert comparable(folder) == comparable(whole[0])


def test_resume_with_another_setting_is_refused_by_name(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    message = cli.refused(
        "train", "--resume", "--output-dir", folder, "--rank", 4, "--lr", 0.1, "--dropout", 0.1
    )
    assert "--rank 4, but the run has 2" in message
    assert "--lr 0.1, but the run has 0.0002" in message
    assert "--dropout" not in message
    assert comparable(folder) == comparable(whole[0])


@pytest.mark.parametrize("changed", ["train", "held out", "base"])
def test_resume_on_other_data_or_another_base_is_refused(whole, data, tmp_path, changed):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    if changed == "base":
        base = shutil.copytree(cli.BASE, tmp_path / "base")
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
        run["settings"]["model"] = run["base"]["id"] = str(base)
    else:
        name = {"train": "dataset", "held out": "eval_dataset"}[changed]
        other = str(cli.write_rows(tmp_path / "other.jsonl", 40, first=1))
        run["settings"][name] = [other] if changed == "train" else other
    (folder / "run.json").write_text(json.dumps(run))
    message = cli.refused("train", "--resume", "--output-dir", folder)
    expected = {"base": "another config of the base", "train": "another train of the data",
                "held out": "another held out of the data"}  # fmt: skip
    assert expected[changed] in message
    assert comparable(folder) == comparable(whole[0])


# ------------------------------------------------------------------------- several adapters


def test_a_sweep_equals_separate_runs_even_if_stopped_and_with_a_lost_member(
    whole, evaluated, tmp_path, monkeypatch
):
    folder, steps = tmp_path / "run", train_step.steps

    def broken(*arguments):
        for state, metrics in steps(*arguments):
            if metrics["step"] == 4:
                metrics["loss/lr=1e-3"] = math.nan
            yield state, metrics

    monkeypatch.setattr(train_step, "steps", broken)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        flags = (*evaluated, "--sweep", "lr=5e-4,1e-3,2e-4")
        assert cli.run("train", *flags, "--output-dir", folder).code == 130
    ended = cli.run("train", "--resume", "--output-dir", folder)
    assert ended.code == 0, ended

    alone, own = (safetensors.numpy.load_file(path / "adapter/adapter_model.safetensors")
                  for path in (whole[0], folder / "lr=2e-4"))  # fmt: skip
    other = safetensors.numpy.load_file(folder / "lr=5e-4/adapter/adapter_model.safetensors")
    for name, tensor in alone.items():
        near, far = (abs(a[name] - tensor).max() / abs(tensor).max() for a in (own, other))
        assert near < 1e-4 and far > 1e-3
    assert json.loads((folder / "lr=5e-4/adapter/adapter_config.json").read_text())["r"] == 2

    rows, expected = cli.metrics(folder), cli.metrics(whole[0])
    for row, one in zip(rows, expected, strict=True):
        for name, value in one.items():
            if name not in ("step", "tokens_per_second", "data_wait"):
                assert row[f"{name}/lr=2e-4"] == pytest.approx(value, rel=1e-4)
    logged = [{name for name in row if name.endswith("lr=1e-3")} for row in rows]
    assert all(logged[:6]) and not any(logged[6:])  # four steps and two evaluations
    assert rows[5]["step"] == 4 and rows[5]["loss/lr=1e-3"] is None

    run = json.loads((folder / "run.json").read_text())
    found = run["sweep"]["members"]
    assert run["checks"]["trained_layers"] == 10 and not run["checks"]["without_gradient"]
    assert run["sweep"]["best"] == "lr=5e-4" and list(found) == ["lr=5e-4", "lr=1e-3", "lr=2e-4"]
    assert found["lr=1e-3"]["lost"] == 4 and "eval_loss" not in found["lr=1e-3"]
    perplexity = math.exp(expected[-1]["eval_loss"])
    assert found["lr=2e-4"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert "lost      lr=1e-3: NaN or infinity at step 4" in ended.out
    assert re.search(r"^lr=5e-4 .* ← best$", ended.out, re.MULTILINE)
    assert re.search(r"^lr=1e-3 .* not finite at step 4 .*–", ended.out, re.MULTILINE)
    assert f"--adapter {folder}/lr=5e-4/adapter" in ended.out
    page = (folder / "report.html").read_text()
    assert "lr=5e-4 ← best" in page and "not finite at step 4" in page
    assert page.count('class="line own"') == 4 * 3


# ------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("where", "value"), [("loss", math.nan), ("grad_norm", math.inf)])
def test_a_loss_that_is_not_finite_ends_the_run(plain, tmp_path, monkeypatch, where, value):
    folder = tmp_path / "run"
    steps = train_step.steps

    def broken(*arguments):
        for state, metrics in steps(*arguments):
            yield state, metrics | ({where: value} if metrics["step"] == 3 else {})

    monkeypatch.setattr(train_step, "steps", broken)
    message = cli.refused("train", *plain, "--output-dir", folder)
    last = cli.metrics(folder)[-1]
    assert last["step"] == 3 and last[where] is None
    assert "NaN or infinity at step 3" in message and "the checkpoint of step 2 is good" in message
    assert checkpoints(folder) == [2] and not (folder / "adapter").exists()
    assert "NaN or infinity at step 3" in (folder / "report.html").read_text()


def test_a_disk_that_fills_up_ends_the_run_with_one_message(plain, tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    at_step(monkeypatch, 3, full)
    message = cli.refused("train", *plain, "--output-dir", tmp_path / "run")
    assert "space on the disk" in message and "--resume" in message
    assert checkpoints(tmp_path / "run") == [2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch-size", 4), "--batch-size 8"),
        (("--mesh", "data=3"), "3 devices"),
        (("--dataset", "none.jsonl"), "no such file"),
        (("--model", "./none"), "no such folder"),
        (("--seq-len", 1024), "512"),
        (("--targets", "query"), "q_proj"),
        (("--columns", "prompt=question"), "no column question"),
        (("--prompt", "Tom " * 500), "context of 512 tokens"),
        (("--prompt", "Tom", "--chat"), "chat template"),
    ],
)
def test_settings_that_do_not_fit_are_refused_and_leave_no_folder(
    evaluated, tmp_path, flags, message
):
    folder = tmp_path / "run"
    typed = (*evaluated, *flags)
    assert message in cli.refused("train", *typed, "--output-dir", folder)
    assert not folder.exists()


def test_data_is_read_before_a_model_is_downloaded(tmp_path):
    message = cli.refused(
        "train", *FLAGS, "--model", "owner/model", "--dataset", "none.jsonl",
        "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert "none.jsonl" in message


# ------------------------------------------------------------------------- other runs


def test_max_steps_0_only_generates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = "Once upon a time"
    ended = cli.run(
        "train", *FLAGS, "--prompt", prompt, "--max-new-tokens", 8, "--max-steps", 0,
        "--dataset", "unread.jsonl",
    )  # fmt: skip
    assert ended.code == 0 and not list(tmp_path.glob("runs/*"))
    assert f"\n{prompt}, there was" in ended.out


@pytest.mark.long
def test_a_llama_of_the_hub_trains_in_4_bit_and_no_pickle_is_requested(tmp_path):
    name = "huggyllama/llama-7b"
    rows = cli.write_rows(tmp_path / "train.jsonl", 8)
    flags = ("--model", name, "--rank", 8, "--use-4bit", "--max-steps", 1, "--dataset", rows,
             "--batch-size", 8, "--grad-accum", 1, "--remat", "full")  # fmt: skip
    with hub_server.serve({name: hub_server.llama_7b(tmp_path / "hub")}) as server:
        done = subprocess.run(
            [sys.executable, cli.ROOT / "scripts/train.py", *map(str, flags)], cwd=tmp_path,
            env=server.environment(tmp_path / "home"), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        asked = server.requested("GET") + server.requested("HEAD")
    assert "Traceback" not in done.stderr and "WARNING" not in done.stderr
    assert not [path for path in asked if path.endswith((".bin", ".pth", ".py"))]
    (folder,) = (tmp_path / "runs").iterdir()
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name and config["r"] == 8
    run = json.loads((folder / "run.json").read_text())
    assert run["settings"]["quant"] == "int4" and run["base"]["commit"] == hub_server.COMMIT


# ------------------------------------------------------------------------- generate.py


def texts(ended):
    assert ended.code == 0, ended
    return [text for text in ended.out.split("\n\n") if text.strip()]


def test_generate_uses_the_base_that_the_adapter_names(whole, tmp_path):
    folder = whole[0] / "adapter"
    flags = ("--prompt", "Tom has 41 cats.", "--max-new-tokens", 16)
    (found,) = texts(cli.run("generate", "--adapter", folder, *flags))
    after = json.loads((whole[0] / "run.json").read_text())["samples"]["after"][1]
    assert after["prompt"] == "Tom has 41 cats."
    assert found.startswith(after["prompt"] + after["text"]) and after["text"].startswith(" ")

    nameless = shutil.copytree(folder, tmp_path / "adapter")
    config = json.loads((nameless / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (nameless / "adapter_config.json").write_text(json.dumps(config))
    assert "--model" in cli.refused("generate", "--adapter", nameless, *flags)
    assert texts(cli.run("generate", "--adapter", nameless, "--model", cli.BASE, *flags)) == [found]


@pytest.mark.long
def test_a_batch_of_prompts_gives_the_same_texts_as_single_prompts(tmp_path):
    prompts = ["Once upon a time", "The little dog was very happy because"]
    flags = ("--model", cli.BASE, "--max-new-tokens", 16)
    single = [texts(cli.run("generate", *flags, "--prompt", prompt))[0] for prompt in prompts]
    assert single[0].startswith("Once upon a time, there was")
    path = tmp_path / "prompts.txt"
    path.write_text(prompts[1] + "\n\n")
    batch = cli.run("generate", *flags, "--prompt", prompts[0], "--prompts-file", path)
    assert texts(batch) == single


@pytest.mark.long
def test_sampling_depends_on_the_seed():
    flags = ("--model", cli.BASE, "--prompt", "Once", "--max-new-tokens", 16, "--temperature", 1.5)
    drawn = [cli.run("generate", *flags, "--seed", seed).out for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", "Tom " * 500), "context of 512 tokens"),
        (("--prompt", "Tom", "--max-new-tokens", 512), "--max-new-tokens 509"),
        (("--prompt", "Tom", "--chat"), "chat template"),
    ],
)
def test_generate_refuses_prompts_that_do_not_fit(flags, message):
    assert message in cli.refused("generate", "--model", cli.BASE, *flags)


ROLES = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")


def test_a_chat_template_and_its_tokens_go_with_the_run_and_the_adapter(tmp_path):
    """Of a base that has none. It says how to chat, and the adapter is used in this template."""
    pair = [{"role": "user", "content": "Tom?"}, {"role": "assistant", "content": "a cat"}]
    rows, given, folder = tmp_path / "chats.jsonl", tmp_path / "given.jinja", tmp_path / "run"
    rows.write_text(json.dumps({"messages": pair}) + "\n")
    given.write_text(ROLES)
    flags = ("--model", cli.BASE, "--dataset", rows, "--rank", 1, "--batch-size", 8)
    told = cli.refused("train", *flags, "--max-steps", 1)
    assert "--chat-template" in told and "chat variant" in told
    flags = (*flags, "--max-steps", 2, "--save-every", 1, "--output-dir", folder)
    ended = cli.run("train", *flags, "--chat-template", given, "--add-special-tokens", *TOKENS)
    assert ended.code == 0 and "new, and trained: <|user|> <|assistant|>" in ended.out, ended
    assert peft.config(folder / "adapter").trainable_token_indices == (512, 513, 514)
    alone = opening.files(groups.ModelSettings(), None, str(folder / "adapter"), own=False,
                          if_unshared=True)  # fmt: skip
    assert alone.reader.convert_tokens_to_ids([*TOKENS]) == [512, 513, 514]
    assert alone.adapted and alone.num_tokens == 515 and alone.eos_ids[-1] == 514
    generate, talk = ended.out.split("to generate with it:")[1].split("to chat with it:")
    assert "--chat" in generate and "scripts/chat.py" in talk.split("to serve it")[0]
    assert (folder / "adapter/chat_template.jinja").read_text() == ROLES
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert settings["chat_template"] == str(given)
    answer = cli.run("generate", "--adapter", folder / "adapter", "--chat", "--prompt", "Tom?",
                     "--max-new-tokens", 1)  # fmt: skip
    assert answer.code == 0 and "Tom?" in answer.out

    before = (folder / "adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints/2")
    shutil.rmtree(folder / "adapter")
    for each in (("--add-tokens", "word"), ("--add-special-tokens", *TOKENS[1:])):
        assert each[0] in cli.refused("train", "--resume", "--output-dir", folder, *each)
    given.write_text("another {{ messages }}")
    (folder / "tokenizer.json").unlink()
    other = cli.refused("train", "--resume", "--output-dir", folder, "--chat-template", rows)
    assert "--chat-template" in other
    resumed = cli.run("train", "--resume", "--output-dir", folder)
    assert resumed.code == 0 and "from step 1 of 2" in resumed.out, resumed
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == before
    assert (folder / "adapter/chat_template.jinja").read_text() == ROLES
    assert "<|assistant|>" in (folder / "adapter/tokenizer.json").read_text()


def test_chat_applies_the_template_to_the_prompt(tmp_path):
    base = pathlib.Path(shutil.copytree(cli.BASE, tmp_path / "base"))
    (base / "chat_template.jinja").write_text("Once upon {{ messages[0]['content'] }}")
    flags = ("--model", base, "--max-new-tokens", 8)
    chat = cli.run("generate", *flags, "--chat", "--prompt", "a time")
    (plain,) = texts(cli.run("generate", *flags, "--prompt", "Once upon a time"))
    (answer,) = texts(chat)
    assert answer.split("\n", 1) == ["> a time", plain.removeprefix("Once upon a time")]


def test_the_default_batch_size_is_rounded_up_to_one_sequence_per_device(plain, tmp_path):
    flags = list(plain)
    at = flags.index("--batch-size")
    del flags[at : at + 2]
    ended = cli.run("train", *flags, "--output-dir", tmp_path / "run")
    assert ended.code == 0, ended.err
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["batch_size"] == 8 == jax.device_count()
