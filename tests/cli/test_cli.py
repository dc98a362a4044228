"""The flags of train and generate: help, parsing, and what is refused before a run."""

import os
import re
import subprocess
import sys

import cli
import pytest

from lora_jax import errors
from lora_jax.cli import generate as generate_script
from lora_jax.cli import model_flags, runner
from lora_jax.cli import train as train_script
from lora_jax.training.settings import assemble, convert, groups

TRAIN = ("--model", "m", "--dataset", "d.jsonl")


def settings(*flags):
    return build(*TRAIN, *flags).flat()


def build(*flags):
    return train_script.parse([*map(str, flags)]).settings


@pytest.mark.parametrize("script", ["train", "generate", "plan", "inspect_data", "report"])
def test_help_does_not_import_heavy_packages(script):
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
        "except SystemExit as ended: assert not ended.code\n"
        "heavy = {'jax', 'flax', 'numpy', 'transformers', 'datasets', 'tqdm'}\n"
        "print('loaded:', *heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"scripts/{script}.py", "--help"],
        cwd=cli.ROOT, env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "loaded:" and done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_help_is_in_groups_and_shows_every_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = cli.run("train", "--help-all").out
    for group in ("model:", "data:", "adapter:", "training:", "run:", "generating, after training"):
        assert f"\n{group}" in text
    shown = " ".join(text.partition("options:")[2].split())
    for default in ("runs/DATE-TIME", "the devices of this machine", "q_proj,v_proj"):
        assert f"(default: {default})" in shown
    # Every flag whose setting has a default shows it.
    flags = re.findall(r"^  --([\w-]+)", text, re.MULTILINE)
    defaults = {flag: groups.FIELDS[flag.replace("-", "_")].default
                for flag in flags if flag.replace("-", "_") in groups.FIELDS}  # fmt: skip
    assert len(flags) > 30 and defaults["rank"] == 8
    for flag, default in defaults.items():
        if default not in (None, (), {}, False) and flag not in ("targets", "model", "dataset"):
            said = re.search(rf"\n  --{flag} .*?\(default:\s+(.*?)\)", text, re.DOTALL)
            assert said and said[1] == str(default), flag


def test_only_typed_flags_override_defaults():
    defaults = groups.TrainSettings().flat()
    assert settings() == {**defaults, "model": "m", "dataset": ["d.jsonl"]}
    found = settings("--rank", 4, "--lr", "1e-3", "--seq-len", 32, "--quant", "nf4")
    assert (found["rank"], found["lr"], found["seq_len"], found["quant"]) == (4, 1e-3, 32, "nf4")


@pytest.mark.parametrize(
    ("flags", "quant"),
    [
        ("", None),  # the checkpoint's format
        ("--use-4bit", "int4"),
        ("--no-4bit", "none"),
        ("--use-4bit --quant int4", "int4"),
        ("--quant int8", "int8"),
    ],
)
def test_4bit_flags_are_short_for_quant(flags, quant):
    found = settings(*flags.split())
    assert found.get("quant") == quant and "use_4bit" not in found and "no_4bit" not in found


@pytest.mark.parametrize(
    "flags", ["--use-4bit --no-4bit", "--use-4bit --quant nf4", "--no-4bit --quant int4"]
)
def test_4bit_flags_that_contradict_are_refused(flags):
    with pytest.raises(errors.UserError, match="one kind of quantization"):
        train_script.parse(flags.split())
    with pytest.raises(errors.UserError, match="one kind of quantization"):
        generate_script.parse(flags.split())


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("q_proj", ("q_proj",)),
        ("q_proj,mlp.up_proj", ("q_proj", "mlp.up_proj")),
        ("q_proj, v_proj,", ("q_proj", "v_proj")),
        ("all-linear", "all-linear"),
        (r".*\.[qv]_proj", r".*\.[qv]_proj"),
        ("(k|v)_proj", "(k|v)_proj"),
    ],
)
def test_targets_are_names_or_a_regex_or_all_linear(text, targets):
    assert settings("--targets", text)["targets"] == (
        list(targets) if isinstance(targets, tuple) else targets
    )


def test_layers_and_patterns_are_read():
    found = settings("--layers", "0,3-5,4", "--rank-pattern", "a=b=2", "--rank-pattern", "c=3",
                     "--modules-to-save", "lm_head, norm")  # fmt: skip
    assert found["layers"] == [0, 3, 4, 5] and found["rank_pattern"] == {"a=b": 2, "c": 3}
    assert found["modules_to_save"] == ["lm_head", "norm"]


@pytest.mark.parametrize(
    "texts",
    [["prompt=question,completion=a=b"], ["prompt=question, completion=a=b"],
     ["prompt=question", "completion=a=b"], ["prompt=question", "--columns", "completion=a=b"]],
)  # fmt: skip
def test_columns_are_pairs(texts):
    assert settings("--columns", *texts)["columns"] == {"prompt": "question", "completion": "a=b"}


def test_a_flag_that_is_given_twice_has_the_values_of_both():
    found = settings("--dataset", "a", "b", "--dataset", "c", "--targets", "k_proj",
                     "--targets", "up_proj")  # fmt: skip
    assert found["dataset"][-3:] == ["a", "b", "c"] and found["targets"] == ["k_proj", "up_proj"]


@pytest.fixture
def nothing_heavy(monkeypatch, tmp_path):
    """An empty working folder in which no run may start, and no file may be left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lora_jax.training.stages", None)  # importing it fails
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rank 0", "rank 0"),
        ("--rank -1", "rank -1"),
        ("--rank eight", "a whole number found: 'eight' where: --rank"),
        ("--dropout 1", "dropout 1"),
        ("--dropout nan", "dropout nan"),
        ("--alpha 0", "--alpha 0"),
        ("--batch-size 0", "--batch-size 0"),
        ("--grad-accum 0", "--grad-accum 0"),
        ("--max-steps -2", "--max-steps -2"),
        ("--epochs 0", "--epochs 0"),
        ("--epochs inf", "--epochs inf"),
        ("--seq-len 1", "--seq-len 1"),
        ("--lr nan", "--lr nan"),
        ("--lr -0.1", "--lr -0.1"),
        ("--min-lr-ratio 2", "found: min_lr_ratio 2.0 (between 0 and 1)"),
        ("--min-lr-ratio 0.1 --schedule constant", "--min-lr-ratio with --schedule constant"),
        ("--lora-plus-ratio 0", "--lora-plus-ratio 0"),
        ("--layers 3-1", "layer numbers such as 0,2 or 16-31 found: '3-1'"),
        ("--rank-pattern down_proj", "REGEX=NUMBER, such as down_proj=4 found: 'down_proj'"),
        ("--rank-pattern down_proj=0", "rank 0"),
        ("--init-lora-weights corda", "init_lora_weights corda"),
        ("--exclude (", "where: --exclude"),
        ("--warmup -1", "--warmup -1"),
        ("--weight-decay -1", "--weight-decay -1"),
        ("--clip -1", "--clip -1"),
        ("--seed -1", "--seed -1"),
        ("--save-every 0", "--save-every 0"),
        ("--eval-every 0", "--eval-every 0"),
        ("--eval-every 2.5", "--eval-every 2.5 (a whole number, or a share"),
        ("--eval-size 0.1", "--eval-size without --eval-every"),
        ("--eval-dataset x.jsonl --patience 2", "--patience without --eval-every"),
        ("--keep-checkpoints 0", "--keep-checkpoints 0"),
        ("--keep-best", "--keep-best without --eval-dataset or --eval-every"),
        ("--output-dir gs://bucket/run", "--output-dir gs://bucket/run to do: copy the files"),
        ("--eval-dataset hf://datasets/a/b.jsonl", "--eval-dataset hf://datasets/a/b.jsonl"),
        ("--resume --output-dir s3://bucket/run", "mount the bucket"),
        ("--exact-match -1", "--exact-match -1"),
        ("--max-new-tokens 0", "--max-new-tokens 0"),
        ("--temperature -1", "--temperature -1"),
        ("--schedule step", "one of cosine, linear, constant found: 'step' where: --schedule"),
        ("--quant int5", "fp4-dq found: 'int5' where: --quant"),
        ("--targets (", "--targets"),
        ("--targets ,", "no targets"),
        ("--add-tokens <a>,<b>", "found: <a>,<b> where: --add-tokens"),
        ("--columns prompt", "FIELD=COLUMN"),
        ("--columns prompt=a prompt=b", "each field once"),
        ("--streaming", "--max-steps N instead of --epochs"),
        ("--streaming --max-steps 9 --eval-every 3", "to do: a separate --eval-dataset"),
        ("--streaming --max-steps 9 --group-by-length", "--packing instead of --group-by-length"),
        ("--streaming --max-steps 9 --dataset a b", "to do: --weights 1,1"),
        ("--weights 1", "1 in --weights, 1 in --dataset"),
        ("--dataset a b --weights 1,2", "2 in --weights, 3 in --dataset"),
        ("--dataset a b --weights 1,0", "'1,0' where: --weights to do: round them, or leave out"),
        ("--dataset a b --weights 1/3,x", "3,1 or 0.75,0.25"),
        ("--dataset a b --weights 0.333333,0.666667", "with a sum of at most 100000"),
        ("--dataset a gs://bucket/b", "--dataset gs://bucket/b to do: copy"),
        (
            "--dataset https://huggingface.co/datasets/openai/gsm8k/tree/main",
            "to do: pass its id, openai/gsm8k",
        ),
        ("--dataset hf://datasets/openai/gsm8k", "to do: pass its id, openai/gsm8k"),
        ("--dataset https://example.org/x.jsonl", "to do: download the file"),
        ("--max-steps 3 --epochs 2", "--max-steps and --epochs"),
        ("--use-4bit --quant nf4", "int4, nf4"),
        ("--quant-fast", "--quant-fast with --quant none"),
        ("--quant nf4 --quant-fast", "--quant-fast with --quant nf4"),
        ("--max-steps 0", "--max-steps 0 without a --prompt"),
        ("--sweep lr=1e-4", "such as lr=1e-4,3e-4 or rank=4,8,16 found: 'lr=1e-4'"),
        ("--sweep lr=1e-4,0.0001", "found: 'lr=1e-4,0.0001'"),
        ("--sweep lr=0,1", "found: 'lr=0,1'"),
        ("--sweep rank=4,8.5", "found: 'rank=4,8.5'"),
        ("--sweep alpha=4,8", "found: 'alpha=4,8'"),
        ("--sweep rank=4,8 --rank 8", "--rank with --sweep rank=…"),
        (
            "--sweep lr=1,2 --eval-every 2 --keep-best --patience 3",
            "--keep-best with --sweep: its adapters are of the last step --patience with --sweep",
        ),
        ("--sweep rank=4,8 --init-lora-weights pissa", "each rank would change the base"),
        ("--chat", "--chat without a --prompt"),
        ("--exact-match 5", "--exact-match without --eval-dataset or --eval-every"),
        ("--resume", "--resume alone"),
        ("--resume --output-dir nowhere", "no run.json"),
        ("--bits 4", "unrecognized arguments: --bits 4"),
    ],
)
def test_invalid_flags_are_refused_before_heavy_imports(nothing_heavy, flags, message):
    assert message in cli.refused("train", *TRAIN, *flags.split())


def test_problems_of_flags_and_of_a_file_are_in_one_error(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("learning_rate: 1\nmodel: m\nrank: 0\nalpha: 0\n")
    message = cli.refused("train", "--config", "mine.yaml", "--learning-rate", 2, "--lr", "fast",
                          "--epochs", "many", "--num-processes", "two", "--output-dir", "gs://b",
                          "--alpha", 0)  # fmt: skip
    for part in (
        "--learning-rate 2 where: train.py to do: --learning-rate is called --lr here",
        "--output-dir gs://b to do: copy",
        "a whole number found: 'two' where: --num-processes",
        "learning_rate where: mine.yaml, line 1 to do: the setting is called lr here",
        "a number found: --epochs: 'many' --lr: 'fast'",
        "found: rank 0 (at least 1) where: mine.yaml, line 3: rank",
        "--alpha 0.0 (at least 1e-06)",  # typed: no line of the file
    ):
        assert part in message, part
    assert "line 4" not in message
    assert "did you mean mine.yaml?" in cli.refused("train", "--config", "mime.yaml")


def test_generate_and_merge_report_all_problems_at_once():
    message = cli.refused("generate", "--top-k", "a", "--seed", "b", "--load-in-4bit")
    assert "--top-k: 'a' --seed: 'b'" in message and "to do: --quant nf4" in message
    message = cli.refused("generate", "--top-k", 2, "--quant-fast")
    for part in (
        "at least one prompt",
        "--top-k at temperature 0",
        "--quant-fast with --quant none",
    ):
        assert part in message
    message = cli.refused("merge", "--max-kl", -1, "--quant-fast")
    for part in ("no --adapter", "--max-kl of 0", "--quant-fast with --quant none"):
        assert part in message


def test_a_mistyped_folder_leads_to_its_neighbor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/x/adapter").mkdir(parents=True)
    for wrong in ("./runs/x/adaptor", "runs/x/adaptor", "run/x/adapter"):
        message = cli.refused("generate", "--prompt", "a", "--adapter", wrong)
        assert "no such folder" in message
        assert "to do: did you mean runs/x/adapter? Or" in message
    message = cli.refused("generate", "--prompt", "a", "--adapter", "./elsewhere/adapter")
    assert "did you mean" not in message


def test_an_adapter_of_another_base_is_noted(tmp_path, capsys):
    adapter = tmp_path / "run/lr=1/adapter"  # of a sweep
    adapter.mkdir(parents=True)
    model_flags.note_other_base(adapter, "none")
    assert capsys.readouterr().err == ""  # no run.json
    (tmp_path / "run/run.json").write_text('{"settings": {"quant": "int4"}}')
    model_flags.note_other_base(adapter, "none")
    assert "trained with --quant int4, and this is --quant none" in capsys.readouterr().err
    model_flags.note_other_base(adapter, "int4")
    (tmp_path / "run/run.json").write_text("{")
    model_flags.note_other_base(adapter, "none")
    assert capsys.readouterr().err == ""


def test_all_wrong_numbers_are_in_one_error(nothing_heavy):
    message = cli.refused("train", *TRAIN, "--batch-size", 0, "--lr", -1, "--seed", -2)
    assert all(part in message for part in ("--batch-size 0", "--lr -1.0", "--seed -2"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "at least one prompt"),
        ("--prompts-file none.txt", "No such file"),
        ("--prompt a --top-p 0", "top_p 0"),
        ("--prompt a --top-k -1", "top_k -1"),
        ("--prompt a --min-p 2", "min_p 2"),
        ("--prompt a --temperature nan", "temperature nan"),
        ("--prompt a --top-k 3", "--top-k at temperature 0"),
        ("--prompt a --max-new-tokens 0", "max_new_tokens 0"),
        ("--prompt a --adapter ./none", "no such folder"),
        ("--prompt a --model ./none", "no such folder"),
        ("--prompt a --model gs://bucket/model", "--model gs://bucket/model to do: copy the files"),
        ("--prompt a --adapter s3://bucket/adapter", "--adapter s3://bucket/adapter"),
    ],
)
def test_generate_refuses_invalid_flags(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in cli.refused("generate", *flags.split())


def test_a_prompts_file_with_another_encoding_is_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("naïve\n".encode("latin-1"))
    assert "can't decode" in cli.refused("generate", "--prompts-file", path)


def test_messages_are_wrapped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    ended = cli.run("train", *TRAIN, "--exact-match", 5, "--max-steps", 0, "--chat")
    assert ended.code == 2 and max(map(len, ended.lines)) <= 60


def test_other_errors_keep_their_traceback(capsys):
    def broken():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug") as error:
        runner.run(broken)
    assert "Please report it" in error.value.__notes__[0]


def test_ctrl_c_while_loading_prints_no_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        runner.run(interrupted)
    assert ended.value.code == 130 and capsys.readouterr().err == "\nstopped\n"


def test_a_closed_pipe_prints_no_traceback():
    code = "from lora_jax.cli import runner\nrunner.run(lambda: print('line\\n' * 100000))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=cli.ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1


@pytest.mark.parametrize(
    "code",
    [
        "from lora_jax.cli import runner\nrunner.run(lambda: print('line\\n' * 100000))",
        "from lora_jax.cli import main\nmain.main()",
    ],
)
def test_a_full_disk_behind_the_output_prints_no_traceback(code):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code], cwd=cli.ROOT, stdout=full, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
    assert ended.returncode == 2 and ended.stderr.splitlines() == [
        "error:", "  expected: space on the disk", "  found:    No space left on device",
        "  to do:    free some space, and start again",
    ]  # fmt: skip


def test_standard_files_that_are_closed_are_no_error():
    code = (
        "import sys\nfrom lora_jax.cli import runner\n"
        "runner.run(lambda: print(sys.stdin.read(), sys.stdin.isatty(), flush=True))\n"
    )
    command = f"exec '{sys.executable}' -c \"$0\" <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command, code], cwd=cli.ROOT).returncode == 0


def test_ctrl_c_with_nothing_to_save_stops_at_once():
    """Without an exception, which jax's import and its garbage collection callback swallow."""
    code = (
        "import gc, os, signal, time\nfrom lora_jax.cli import runner\n"
        "gc.callbacks.append(lambda *_: os.kill(os.getpid(), signal.SIGINT))\n"
        "runner.run(lambda: (gc.collect(), time.sleep(20)))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=cli.ROOT, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr.strip()) == (130, "stopped")


def test_local_paths_are_kept_as_typed_and_absolute_in_the_record(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "many").mkdir()
    local = ["rows.jsonl", "many@test", "row*.jsonl"]
    found = build("--dataset", *local, "o/d@test", "--model", "owner/name").flat()
    assert found["dataset"] == [*local, "o/d@test"]  # as they go into config.yaml
    kept = assemble.absolute(found)  # as they go into run.json
    assert kept["dataset"] == [*(str(tmp_path / name) for name in local), "o/d@test"]
    assert kept["model"] == "owner/name"


def test_weights_become_the_smallest_integers():
    found = map(convert.weights, ("3,1", "0.75, 0.25", "6,2", "1e2,100", "1/3,2/3"))
    assert [*found] == [(3, 1), (3, 1), (3, 1), (1, 1), (1, 2)]


def test_times_have_units():
    assert convert.seconds("1h30m") == convert.seconds("90m") == convert.seconds("5400")
    assert convert.seconds("2d") == 172800 and convert.seconds("45s") == 45
    for text in ("", "0", "h", "1.5h", "30m1h", "1h30", "-1"):
        with pytest.raises(errors.UserError, match="--max-time"):
            convert.seconds(text)
