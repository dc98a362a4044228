"""What is read from a machine: from the driver, device files, packages, and JAX in a process."""

import subprocess

import jax
import jaxlib
import pytest

from lora_jax.diagnosis import nvidia_smi, pci, probe, system, tpu_vm, versions

ANSWERS = {
    "--query-gpu=name,driver_version,memory.total,memory.used,compute_cap": (
        "NVIDIA L4, 550.54.14, 23034, 512, 8.9\nNVIDIA L4, 550.54.14, 23034, 0, 8.9\n"
    ),
    "--query-compute-apps=pid,process_name": "4711, /usr/bin/python3\n",
    "": "| NVIDIA-SMI 550.54.14    Driver Version: 550.54.14    CUDA Version: 12.4     |\n",
}


@pytest.fixture
def driver(monkeypatch):
    """Sets what nvidia-smi answers: {its first argument: text, or a failure}."""

    def set_answers(answers):
        def run(command, **_):
            asked = command[1] if len(command) > 1 else ""
            known = asked in answers
            text = answers.get(asked, f"Field {asked} is not a valid field to query.")
            return subprocess.CompletedProcess(command, 0 if known else 2, text, "")

        monkeypatch.setattr(nvidia_smi.shutil, "which", lambda *_, **__: "/usr/bin/nvidia-smi")
        monkeypatch.setattr(nvidia_smi.subprocess, "run", run)

    return set_answers


def test_the_driver_lists_its_gpus(driver):
    driver(ANSWERS)
    found = nvidia_smi.read()
    one = nvidia_smi.Gpu("NVIDIA L4", "550.54.14", 23034 * 2**20, 512 * 2**20, "8.9")
    assert found.gpus[0] == one and len(found.gpus) == found.on_bus == 2
    assert (found.cuda, found.users, found.failure) == ("12.4", ("4711 python3",), None)


def test_an_old_driver_does_not_know_the_capability(driver):
    (asked, text), *others = ANSWERS.items()
    driver({asked.removesuffix(",compute_cap"): text.replace(", 8.9", ""), **dict(others)})
    assert [each.capability for each in nvidia_smi.read().gpus] == [None, None]


def test_a_value_that_the_driver_does_not_know_is_none(driver):
    asked = next(iter(ANSWERS))
    driver({**ANSWERS, asked: "Orin, 540.4.0, [N/A], [N/A], [N/A]\n"})
    assert nvidia_smi.read().gpus == (nvidia_smi.Gpu("Orin", "540.4.0"),)


def test_why_the_driver_lists_none(driver, monkeypatch):
    driver({})
    assert "not a valid field" in nvidia_smi.read().failure

    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(nvidia_smi.subprocess, "run", hang)
    assert nvidia_smi.read().failure == "nvidia-smi does not answer"


def test_no_gpu_without_a_driver(monkeypatch):
    monkeypatch.setattr(nvidia_smi.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(nvidia_smi, "_on_bus", lambda: 0)
    assert nvidia_smi.read() == nvidia_smi.Found(failure="nvidia-smi is not installed")


def test_devices_on_the_bus_are_counted(monkeypatch, tmp_path):
    """An MI300X, an MI250X, the graphics of a processor and an H100."""
    classes = [(pci.AMD, "0x120000"), (pci.AMD, "0x038000"), (pci.AMD, "0x030000"),
               (pci.NVIDIA, "0x030200")]  # fmt: skip
    for number, (vendor, kind) in enumerate(classes):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "vendor").write_text(f"{vendor}\n")
        (tmp_path / str(number) / "class").write_text(f"{kind}\n")
    (tmp_path / "without-files").mkdir()
    monkeypatch.setattr(pci, "_DEVICES", tmp_path)
    assert pci.count(pci.AMD, pci.OTHER_DISPLAY, pci.ACCELERATOR) == 2
    assert nvidia_smi._on_bus() == 1
    assert system.read(probe.Answer).amd_gpus == 2


@pytest.mark.parametrize(
    ("opened", "is_tpu"),
    [("/dev/accel0", True), ("/dev/vfio/3", True), ("/dev/vfio/vfio", False), ("/dev/null", False)],
)
def test_a_process_that_has_opened_a_device_holds_it(monkeypatch, tmp_path, opened, is_tpu):
    (tmp_path / "4711/fd").mkdir(parents=True)
    (tmp_path / "4711/comm").write_text("python3\n")
    (tmp_path / "4711/fd/5").symlink_to(opened)
    monkeypatch.setattr(tpu_vm, "_num_chips", lambda: 4)
    monkeypatch.setattr(tpu_vm, "_PROCESSES", tmp_path)
    assert tpu_vm.read().users == (("4711 python3",) if is_tpu else ())


@pytest.mark.parametrize(
    ("version", "wanted", "met"),
    [
        ("0.10.2", "<=0.10.2,>=0.10.1", True),
        ("0.11", "<=0.10.2,>=0.10.1", False),
        ("0.9.9", ">= 0.10.1", False),
        ("0.10.2.dev20260101", "<=0.10.2", True),
        ("0.0.42.1", "==0.0.42.*", True),
        ("0.0.4", "==0.0.42.*", False),
        ("0.10.2", "", True),
        ("1.0", "==1.0.0", True),
        ("1.0", "!=1.0", False),
    ],
)
def test_versions_are_compared_by_number(version, wanted, met):
    assert versions.meets(version, wanted) == met


def test_this_machine_can_be_read(monkeypatch, tmp_path):
    (tmp_path / "libcudnn.so.9").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere::{tmp_path}")
    monkeypatch.setenv("A_SECRET", "x")
    found = system.read(lambda: probe.Answer(**{"devices": ()}))
    assert found.packages["jax"] == jax.__version__
    assert found.packages["jaxlib"] == jaxlib.__version__
    assert versions.meets(jaxlib.__version__, found.wanted["jaxlib"]) and found.wanted["libtpu"]
    assert found.shadowing == (str(tmp_path),)
    assert found.environment["JAX_PLATFORMS"] == "cpu" and "A_SECRET" not in found.environment


def test_jax_answers_with_its_devices_and_settings():
    found = probe.here()
    assert found["devices"] == [{"platform": "cpu", "kind": "cpu", "memory": None,
                                 "capability": None}] * 8  # fmt: skip
    assert found["on"] == []
    with jax.enable_x64(True):
        assert probe.here()["on"] == ["jax_enable_x64"]


def test_jax_that_fails_aborts_or_hangs_is_an_answer(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: 1 / 0)
    assert probe.here() == {"error": "ZeroDivisionError: division by zero"}

    def ended(code, stdout, stderr):
        process = subprocess.CompletedProcess([], code, stdout, stderr)
        monkeypatch.setattr(probe.subprocess, "run", lambda *_, **__: process)
        return probe.ask()

    answer = ended(-6, "", "some lines\nF1] Unknown flag in XLA_FLAGS: --x\n")
    assert answer.error == "F1] Unknown flag in XLA_FLAGS: --x" and answer.platform is None
    assert ended(-11, "", "").error == "it ended with SIGSEGV"
    answer = ended(0, 'noise\n{"devices": [{"platform": "tpu", "kind": "TPU v5e"}]}\n', "a log")
    assert (answer.platform, answer.log) == ("tpu", "a log")

    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout, stderr=b"waiting")

    monkeypatch.setattr(probe.subprocess, "run", hang)
    assert probe.ask(1) == probe.Answer(error="no answer within 1 s", log="waiting")
