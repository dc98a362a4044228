"""A run of two processes: the same losses, one folder, and a common end."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import cli
import forks
import numpy as np
import pytest
import safetensors.numpy
import yaml

from lora_jax import errors
from lora_jax.cli import train
from lora_jax.parallel import cluster, processes, rendezvous

LAUNCH = cli.ROOT / "examples/launch"
STEPS = 10
FLAGS = (
    *("--model", cli.BASE, "--batch-size", 8, "--grad-accum", 2, "--remat", "full"),
    *("--rank", 2, "--targets", "q_proj", "--dropout", 0.1, "--max-steps", STEPS),
    *("--save-every", 2),
)


@pytest.fixture(scope="module")
def start(parent):
    """start(flags, processes=2, signals={process: (step, signal)}) runs until all have ended."""

    def start(*flags, processes=2, signals=None, script="train"):
        how = {"processes": processes, "devices": 4 // processes, "signals": signals}
        return parent.together(script, *flags, **how)

    return start


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    train = cli.write_rows(folder / "train.jsonl", 40)
    held_out = cli.write_rows(folder / "eval.jsonl", 4, 40)
    return ("--dataset", train, "--streaming", "--seq-len", 32, "--eval-dataset", held_out)


@pytest.fixture(scope="module")
def whole(start, data, tmp_path_factory):
    """The folder of an uninterrupted run of one process with four devices."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended = start(*FLAGS, *data, "--output-dir", folder, processes=1)
    assert ended.codes == [0], ended.err
    return folder


def metrics(folder, kind):
    return [row[kind] for row in cli.metrics(folder) if kind in row]


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


def adapter(folder):
    return safetensors.numpy.load_file(folder / "adapter/adapter_model.safetensors")


def checkpoints(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


# ------------------------------------------------------------------------- whole runs


def stop_by_sigterm(folder, start, resume):
    one = random.randrange(2)
    ended = start(*resume, signals={one: (5, signal.SIGTERM)})
    assert ended.codes == [processes.RESTART] * 2, (one, ended.err)
    assert "stopping after this step, to save" in ended.err[one]
    assert ended.err[1 - one] == "" and ended.out[1] == ""
    stopped = int(re.search(r"stopped after step (\d+) of 10", ended.out[0])[1])
    assert 5 <= stopped < STEPS and (one or stopped == 5) and checkpoints(folder)[-1] == stopped
    assert cli.metrics(folder)[-1]["step"] == stopped
    assert any(part.any() for name, part in adapter(folder).items() if "lora_B" in name)


@pytest.mark.parametrize("sigterm", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_lost_process_and_sigterm_end_all_and_the_resumed_run_is_the_same(
    sigterm, whole, start, data
):
    folder = whole.parent / f"interrupted-{sigterm}"
    resume = ("--resume", "--output-dir", folder)
    victim, step = random.randrange(2), random.randrange(3, 6)

    killed = {victim: (step, signal.SIGKILL)}
    ended = start(*FLAGS, *data, "--output-dir", folder, signals=killed)
    assert ended.codes[victim] == -signal.SIGKILL, (killed, ended.err)
    assert ended.codes[1 - victim] == processes.RESTART, (killed, ended.err)
    assert "4 × cpu (cpu) in 2 processes, mesh data=4" in ended.out[0] and ended.out[1] == ""
    advice = f"start all of them again with --resume --output-dir {folder}"
    message = f"process {victim} of 2 was lost; {advice}"
    assert run_json(folder)["checks"] == {"trained_layers": 5, "without_gradient": []}
    # Without process 0, jax's coordination service prints a message too.
    printed = ended.err[1 - victim]
    assert f"\n{message}\n" in printed and (victim == 0 or printed.count("\n") == 2), printed

    if sigterm:
        stop_by_sigterm(folder, start, resume)
    assert "--num-processes" not in json.dumps(run_json(folder))
    ended = start(*resume, "--mesh", "data=2,fsdp=2", processes=1)
    assert ended.codes == [0], ended.err
    for kind in ("loss", "eval_loss", "grad_norm"):
        assert metrics(folder, kind) == pytest.approx(metrics(whole, kind), abs=1e-5, rel=1e-6)
    ours, theirs = adapter(folder), adapter(whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)


@pytest.mark.long
def test_generating_in_two_processes(whole, start):
    flags = ("--adapter", whole / "adapter", "--prompt", "Once upon a time", "--prompt", "Tom",
             "--max-new-tokens", 8)  # fmt: skip
    ended = start(*flags, script="generate")
    assert ended.codes == [0, 0], ended.err
    assert ended.out[1] == "" and ended.err[1] == ""
    alone = cli.run("generate", *flags)  # on eight devices
    assert alone.out in ended.out[0]  # gloo prints its connections


def test_a_folder_that_process_0_is_refused_ends_both(whole, start, data):
    ended = start(*FLAGS, *data, "--output-dir", whole)
    assert ended.codes == [2, 2] and ended.out == ["", ""]
    assert "a folder with files in it" in ended.err[0] and ended.err[0].count("error:") == 1
    assert ended.err[1] == ""


# ------------------------------------------------------------------------- without devices


def test_flags_give_the_process():
    assert cluster.find("host:1234", 2, 1) == cluster.Process("host:1234", 2, 1)
    assert cluster.find(num_processes=1) is None
    assert cluster.find("host:1234", 1, 0) is None


@pytest.mark.parametrize(
    ("flags", "problems"),
    [
        (("host:1234",), ["no --num-processes", "no --process-id"]),
        ((None, 2, 0), ["no --coordinator"]),
        (("host", 2, 2), ["--coordinator host, not HOST:PORT", "--process-id 2"]),
        (("host:99999", 0, 0), ["host:99999", "--num-processes 0"]),
        (("host:1234", 2, -1), ["--process-id -1"]),
    ],
)
def test_all_problems_of_the_flags_are_reported_together(flags, problems):
    with pytest.raises(errors.UserError) as error:
        cluster.find(*flags)
    for text in problems:
        assert text in str(error.value)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[01-02]", "SLURM_NTASKS": "2",
         "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "process"),
    [
        ({}, None),
        (SLURM, cluster.Process("node01:61447", 2, 1, detected=True)),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # a shell in an allocation
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, None),  # the batch script itself
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a single pod
    ],
)
def test_only_a_cluster_with_several_processes_is_joined(monkeypatch, environment, process):
    for name in (*SLURM, "JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cluster.find() == process


def test_processes_that_do_not_connect_are_named():
    address = f"localhost:{forks.free_port()}"
    with pytest.raises(errors.UserError, match="no process 1, 2"):
        processes.start(cluster.Process(address, 3, 0), wait=0.2)
    with pytest.raises(errors.UserError, match="Connection refused"):
        processes.start(cluster.Process(address, 3, 1), wait=0.2)


def test_a_process_that_connects_twice_is_refused():
    address, refused = f"localhost:{forks.free_port()}", []

    def join():
        with pytest.raises(errors.UserError) as error:
            rendezvous.join(cluster.Process(address, 3, 1), wait=5)
        refused.append(str(error.value))

    twins = [threading.Thread(target=join) for _ in range(2)]
    for twin in twins:
        twin.start()
    with pytest.raises(errors.UserError, match="no process 2"):
        rendezvous.gather(cluster.Process(address, 3, 0), wait=1)
    for twin in twins:
        twin.join()
    assert sorted("there is a process 1 already" in text for text in refused) == [False, True]
    assert sorted("no process 2" in text for text in refused) == [False, True]


CONNECT = """
others = rendezvous.gather(process, 60) if not number else {0: rendezvous.join(process, 60)}
processes._group = processes._Group(process, others)
"""


def several(code, processes=3):
    """The end of several processes that ran `code`, which can use its `number` and `process`."""
    beginning = (
        "import faulthandler, sys, time\n"
        "from lora_jax.parallel import cluster, processes, rendezvous\n"
        "faulthandler.dump_traceback_later(60, exit=True)\n"
        "number = int(sys.argv[1])\n"
        f"process = cluster.Process('localhost:{forks.free_port()}', {processes}, number)\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", beginning + code, str(number)], cwd=cli.ROOT,
                         text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for number in range(processes)
    ]  # fmt: skip
    out, err = zip(*(process.communicate(timeout=100) for process in started), strict=True)
    return forks.Ended([process.returncode for process in started], list(out), list(err))


def test_one_process_s_error_ends_all_and_process_0_reports_it():
    began = time.monotonic()
    ended = several(
        f"{CONNECT}"
        "assert processes.broadcast(number) == 0\n"
        "if number == 1: processes.end(2, 'no such model')\n"
        "time.sleep(60)\n"
    )
    assert ended.codes == [2, 2, 2], ended.err
    assert ended.err == ["process 1 of 3:\nno such model\n", "", ""]
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("who", [0, 2])
def test_if_one_process_asks_all_know_after_the_same_step(who):
    ended = several(
        f"{CONNECT}"
        "step = 0\n"
        f"while not processes.anyone(number == {who} and step >= 7): step += 1\n"
        "processes.same('step', step)\n"
        "assert step >= 7 and processes.anyone(False)\n"
        "processes._group.wait_for_all()\n"
        "print(step)\n"
    )
    assert ended.codes == [0, 0, 0], ended.err
    assert len(set(ended.out)) == 1 and (who or ended.out[0] == "7\n")


@pytest.mark.long
def test_a_checkpoint_that_a_single_process_cannot_read_ends_all(tmp_path):
    ended = several(
        "import os, pathlib\n"
        "os.environ.pop('XLA_FLAGS'), setattr(processes, '_GRACE', 0.2)\n"
        "processes.start(process)\n"
        "import jax.numpy as jnp; from lora_jax import errors\n"
        "from lora_jax.optim import step as train; from lora_jax.parallel import mesh as sharding\n"
        "from lora_jax.training.output import snapshots as snapshot\n"
        "mesh = sharding.make_mesh({'data': 2, 'fsdp': 1, 'tensor': 1})\n"
        "state = sharding.place(train.State({'lora_A': jnp.ones(4)}, {}, jnp.int32(3)), mesh)\n"
        f"snapshots = snapshot.Snapshots(pathlib.Path({str(tmp_path)!r}), keep=1)\n"
        "snapshots.save(state)\n"
        "if number == 1: snapshots._saved = None\n"
        "try: snapshots.restore(state)\n"
        "except errors.UserError as error: processes.end(2, str(error))\n"
        "processes.leave()\n",
        processes=2,
    )
    assert ended.codes == [2, 2], ended.err
    assert "a checkpoint that every process can read" in ended.err[0]
    assert "step 3: TypeError" in ended.err[0]


# ------------------------------------------------------------------------- launching


def jobset():
    """The JobSet, its one job, and that job's one container."""
    whole = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (job,) = whole["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return whole, job, container


STUBS = {
    "python": 'printf "%s\\n" "$@" > $SAID; exit 75',
    "gcloud": '[ "${*:1:7}" = "compute tpus tpu-vm ssh pod --zone=zone --worker=all" ] || exit 9\n'
    'for last; do :; done; exec bash -c "${last#--command=}"',
    "srun": 'exec "$@"',
    "scontrol": 'echo "$@" > $SAID.scontrol',
}


@pytest.mark.parametrize("name", ["tpu_pod.sh", "slurm.sbatch", "jobset.yaml"])
def test_launches_start_and_resume_with_flags_that_exist(name, tmp_path):
    assert sorted(path.name for path in LAUNCH.iterdir()) == [
        "jobset.yaml", "slurm.sbatch", "tpu_pod.sh"
    ]  # fmt: skip
    for stub, text in STUBS.items():
        (tmp_path / stub).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / stub).chmod(0o755)
    (tmp_path / "lora-jax").mkdir()
    out = tmp_path / "runs/7"
    out.mkdir(parents=True)
    command, *rest = jobset()[2]["command"] + jobset()[2]["args"]
    rest[-1] = rest[-1].replace("/shared/run", str(out))
    if name != "jobset.yaml":
        rest = [LAUNCH / name, "pod", "zone", out] if name == "tpu_pod.sh" else [LAUNCH / name]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(tmp_path / "said"),
                   "HOME": str(tmp_path), "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7",
                   "JOB_COMPLETION_INDEX": "1"}  # fmt: skip
    for resumed in (False, True):
        done = subprocess.run([command, *rest], env=environment, capture_output=True, text=True)
        assert done.returncode == processes.RESTART, done
        script, *flags = (tmp_path / "said").read_text().splitlines()
        assert script == "scripts/train.py"
        asked = train.parse(flags)
        typed = {**asked.given, **asked.others}
        assert typed.get("resume", False) == resumed and typed["output_dir"] == str(out)
        place = [typed.get(name) for name in ("coordinator", "num_processes", "process_id")]
        assert cluster.find(*place) == (
            cluster.Process("lora-jax-workers-0-0.lora-jax:8476", 2, 1)
            if name == "jobset.yaml"
            else None
        )
        (out / "run.json").touch()
    if name == "slurm.sbatch":
        assert (tmp_path / "said.scontrol").read_text() == "requeue 7\n"


def test_the_jobset_s_names_and_numbers_agree():
    whole, job, container = jobset()
    spec, name = job["template"]["spec"], whole["metadata"]["name"]
    assert spec["parallelism"] == spec["completions"]
    assert f"--num-processes {spec['completions']} " in container["args"][0]
    assert f"--coordinator {name}-{job['name']}-0-0.{name}:" in container["args"][0]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert processes.RESTART not in rule["onExitCodes"]["values"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
