"""benchmarks/device.py: what it measures, how it continues, and the pages that it writes."""

import json
import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import device
import device_cases
import device_measure
import device_page
import device_process
import device_record

EIGHT = device_cases.Train(device_cases.LLAMA_8B)
DEVICE = {"kind": "NVIDIA H100 80GB HBM3", "platform": "gpu", "count": 1, "memory": 73_600_000_000,
          "peak_flops": 989e12, "copied_bytes_per_second": 3e12, "runtime": "CUDA 13",
          "python": "3.12.3", "versions": {"jax": "0.11.1"}}  # fmt: skip


def measured(rate: float = 0.0, **more):
    return {"status": "measured", "seconds": 0.5, "number": 3, "tokens_per_second": rate, **more}


def record(*outcomes):
    """A record of (case, outcome) on an H100."""
    cases = {}
    for case, found in outcomes:
        found = device.with_shares(case, found, DEVICE["peak_flops"])
        mark = {"settings": device_cases.fields(case), "date": "2026-01-02 03:04:05"}
        cases[case.name] = mark | {"commit": "abc1234"} | found
    return {"date": "2026-01-02", "commit": "abc1234", "tiny": False, "device": DEVICE,
            "cases": cases}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """Cases are measured in this process; the list has what each process would be asked."""
    found = []

    def ask(run, asked, most, peer=False):
        found.append(asked["what"])
        answer = device_measure.measure(asked)
        return json.loads(json.dumps(answer))

    monkeypatch.setattr(device_process.Run, "ask", ask)
    monkeypatch.setattr(device_measure, "LEAST_SECONDS", 0)
    return found


@pytest.mark.long
def test_a_rehearsal_measures_and_continues(asked, tmp_path, capsys):
    """A training step and decoding; the second call measures neither again."""
    flags = ["--tiny", "--out", str(tmp_path)]
    assert device.main([*flags, "--part", "3"]) == device.main([*flags, "--part", "4"]) == 0
    assert asked == ["facts", "case", "facts", "case"]
    found = device_record.read(tmp_path / "cpu.json")
    step, decode = found["cases"].values()
    assert found["tiny"] and found["device"]["platform"] == "cpu"
    assert step["settings"]["packed"] and step["number"] == device_measure.LEAST_STEPS
    assert step["tokens_per_second"] == 2 * 32 / step["seconds"] > 0
    assert step["planned_bytes"] > 0 and step["xla_bytes"] > 0 and step["mfu_4n"] is None
    assert decode["tokens_per_second"] == 2 / decode["seconds"] > 0
    assert "**A rehearsal" in (tmp_path / "cpu.md").read_text()
    assert device_record.all_of(tmp_path) == []  # so that README.md never has it

    asked.clear()
    assert device.main([*flags, "--part", "3"]) == 0 and asked == ["facts"]
    assert "tokens/s" in capsys.readouterr().out


def test_a_rehearsal_has_a_folder_of_its_own(capsys):
    with pytest.raises(SystemExit) as ended:
        device.main(["--tiny"])
    assert ended.value.code == 2 and "--out FOLDER with --tiny" in capsys.readouterr().err


def test_a_cpu_is_only_rehearsed_on(monkeypatch, tmp_path, capsys):
    answer = DEVICE | {"kind": "cpu", "platform": "cpu"}
    monkeypatch.setattr(device_process.Run, "ask", lambda *_: answer)
    assert device.main(["--out", str(tmp_path)]) == 2
    assert "a GPU or TPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def answers(monkeypatch, tmp_path, outcomes, cases):
    """(names left out, record) of a call in which the cases have these outcomes, in turn."""
    turns = iter(outcomes)

    def ask(run, asked, most, peer=False):
        found = next(turns)
        if isinstance(found, BaseException):
            raise found
        return dict(found)

    monkeypatch.setattr(device_process.Run, "ask", ask)
    run = device_process.Run(9, sys.executable, tiny=False)
    file = tmp_path / "device.json"
    known = record() | {"cases": device_record.read(file)["cases"]}
    planned = [device_cases.Planned(1, case, 50) for case in cases]
    left = device.measure_all(run, planned, file, known, again=False)
    return left, device_record.read(file)


def test_what_failed_is_measured_again_and_what_does_not_fit_is_not(monkeypatch, tmp_path):
    cases = [EIGHT, EIGHT._replace(remat="none"), EIGHT._replace(rows=1), EIGHT._replace(rows=16)]
    too_large = {"status": "does not fit", "reason": "planned 99 GB of 74 GB"}
    failed = {"status": "failed", "reason": "XlaRuntimeError"}
    first = [measured(8192), too_large, failed, device_process.OutOfTime()]
    left, found = answers(monkeypatch, tmp_path, first, cases)
    assert left == [cases[3].name]
    assert [each["status"] for each in found["cases"].values()] == [
        "measured", "does not fit", "failed"]  # fmt: skip
    left, found = answers(monkeypatch, tmp_path, [measured(1), measured(2)], cases)
    assert not left
    rates = [found["cases"][case.name].get("tokens_per_second") for case in cases]
    assert rates == [8192, None, 1, 2]


def test_a_kill_loses_no_result_before(monkeypatch, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        answers(monkeypatch, tmp_path, [measured(5), KeyboardInterrupt()],
                [EIGHT, EIGHT._replace(rows=1)])  # fmt: skip
    assert list(device_record.read(tmp_path / "device.json")["cases"]) == [EIGHT.name]


def test_the_longest_sequence_is_searched_over_several_calls(monkeypatch, tmp_path):
    """Planned 8,192; 9,000 tokens fit. The time is over within the first call."""
    case, turns = device_cases.Longest(device_cases.LLAMA_8B, unit=64), []

    def ask(run, asked, most, peer=False):
        if asked["what"] == "case":
            turns.append("plan")
            return {"status": "measured", "planned_length": 8192}
        turns.append(asked["case"]["length"])
        if len(turns) == 4:
            raise device_process.OutOfTime
        if turns[-1] <= 9000:
            return {"status": "measured", "seconds": 1.0, "xla_bytes": 1, "peak_bytes": None}
        return {"status": "does not fit", "reason": "out of memory"}

    monkeypatch.setattr(device_process.Run, "ask", ask)
    run = device_process.Run(9, sys.executable, tiny=False)
    file, known = tmp_path / "device.json", record()
    planned = [device_cases.Planned(6, case, 50)]
    assert device.measure_all(run, planned, file, known, again=False) == [case.name]
    known = known | {"cases": device_record.read(file)["cases"]}
    begun = known["cases"][case.name]
    assert begun["status"] == "not finished" and len(begun["attempts"]) == 2
    assert device.measure_all(run, planned, file, known, again=False) == []
    found = device_record.read(file)["cases"][case.name]
    assert found["status"] == "measured" and "reason" not in found
    assert 0.98 * 9000 <= found["length"] <= 9000
    assert turns.count("plan") == 1 and turns.count(8192) == 1


def test_other_settings_are_another_measurement():
    known = record((EIGHT, measured(5)))
    assert device_record.is_done(known, EIGHT)
    known["cases"][EIGHT.name]["settings"]["length"] = 1024
    assert not device_record.is_done(known, EIGHT)


def test_a_case_that_takes_longer_than_what_is_left_is_left_out(monkeypatch, tmp_path):
    run = device_process.Run(0.5, sys.executable, tiny=False)
    planned = [device_cases.Planned(1, EIGHT, 50)]
    assert device.measure_all(run, planned, tmp_path / "x.json", record(), False) == [EIGHT.name]


def test_cases_have_names_of_their_own_and_are_read_back():
    full = device_cases.full()
    last = max(planned.part for planned in full)
    for cases, most in ((full, last), (device_cases.tiny(), 7)):
        assert len({planned.case.name for planned in cases}) == len(cases)
        parts = [planned.part for planned in cases]
        assert parts == sorted(parts) and set(parts) == set(range(1, most + 1))
        for planned in cases:
            given = json.loads(json.dumps(device_cases.fields(planned.case)))
            assert device_cases.read(given) == planned.case
    for part in range(2, last + 1):  # part 1 has what the goals are about, and may leave out some
        seconds = sum(each.expected for each in full if each.part == part)
        assert seconds <= 60 * device.PART_MINUTES, part


def test_the_parts_have_every_combination_of_training():
    grid = device_cases.grid()
    assert len(set(grid)) == 2 * 2 * 2 * 3 * 3
    assert set(grid) <= {planned.case for planned in device_cases.full()}


def longest_of(true_length: int, planned: int, unit: int = 1024, most: int | None = None):
    """(the length that the search finds, how many lengths it tried) where `true_length` fits."""
    fits, fails = [], []
    for tried in range(30):
        length = device_cases.next_length(planned, fits, fails, unit, most)
        if length is None:
            return max(fits, default=0), tried
        assert length % unit == 0 and length not in (*fits, *fails)
        (fits if length <= true_length else fails).append(length)
    raise AssertionError("no end")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99, 1.0, 1.03, 2.5])
def test_the_search_for_the_longest_sequence(share):
    planned = 150 * 1024
    found, tried = longest_of(int(share * planned), planned)
    assert 0 <= share * planned - found <= 0.02 * share * planned + 1024
    assert tried <= 14


def test_the_search_ends_where_nothing_fits_and_where_most_does():
    assert longest_of(100, 4096)[0] == 0
    assert longest_of(1 << 30, 4096, unit=16, most=64) == (64, 1)


def test_weights_and_utilization():
    """N of an 8B: 32 · (2 · 4096² · (1 + 8/32) + 3 · 4096 · 14336) + 4096 · 128256."""
    weights = device_cases.num_weights(device_cases.MODELS[device_cases.LLAMA_8B])
    assert weights == 7_504_658_432
    assert device_cases.mfu(10_000, weights, 4, 989e12) == pytest.approx(0.30353, rel=1e-4)
    assert device_cases.mfu(10_000, weights, 6, 989e12) == pytest.approx(0.45529, rel=1e-4)
    assert device_cases.mfu(10_000, weights, 4, None) is None


def test_the_page_and_the_readme_have_the_figures():
    one = EIGHT._replace(rows=1)
    bytes_of = {"planned_bytes": 7_000_000_000, "xla_bytes": 6_900_000_000}
    peer = EIGHT._replace(quant="nf4", peer=True)
    found = record(
        (EIGHT, measured(9100, peak_bytes=9_500_000_000, **bytes_of)),
        (one, measured(8000, peak_bytes=6_950_000_000, **bytes_of)),
        (EIGHT._replace(remat="dots"), measured(11_900, peak_bytes=None, **bytes_of)),
        (EIGHT._replace(rows=16), {"status": "does not fit", "reason": "planned 99.0 GB"}),
        (peer, measured(4000, peak_bytes=12_000_000_000)),
        (device_cases.Decode(device_cases.LLAMA_8B), measured(500, bytes_per_step=6e8)),
        (device_cases.Longest(device_cases.LLAMA_8B), measured(
            planned_length=149_504, length=151_552,
            attempts=[{"length": 151_552, "fits": 1, "status": "measured", "seconds": None,
                       "xla_bytes": 73_000_000_000, "peak_bytes": 73_000_000_000}])),
        (device_cases.Tests(), {"status": "failed", "reason": "tests/x.py::test_y",
                                "counts": {"passed": 7, "failed": 1}}),
    )  # fmt: skip
    del found["cases"][device_cases.Longest(device_cases.LLAMA_8B).name]["tokens_per_second"]
    page = device_page.page(found)
    cells = f"| {EIGHT.name} | 9,100 | 500 (3) | 28% | 41% | 7.00 | 6.90 | 9.50 |"
    assert cells in page
    assert "| training, remat full | ≥ 9,000 tokens/s | 9,100 | reached |" in page
    assert (
        "| training, the remat that is fastest | ≥ 12,000 tokens/s | 11,900 | not reached |" in page
    )
    assert "| memory at 1 × 2048, remat full | ≤ 7 GB | 7.0 | reached |" in page
    assert "| decoding, 64 sequences | ≥ 9,600 tokens/s | – | not measured yet |" in page
    assert "does not fit: planned 99.0 GB" in page and "failed: tests/x.py::test_y" in page
    assert "151,552 tokens. Planned: 149,504 tokens." in page and "ran, not waited for" in page
    assert "PEFT and bitsandbytes, Llama-3.1-8B nf4" in page and "12,473" in page

    section = device_page.section([found])
    assert section.splitlines()[2] == (
        "| [NVIDIA H100 80GB HBM3](benchmarks/devices/nvidia-h100-80gb-hbm3.md) | 9,100 | 11,900 "
        "| 7.0 GB | 500 | not measured yet | 151,552 |")  # fmt: skip


def test_the_readme_has_what_is_generated():
    text = device_page.README.read_text()
    own = device_page.section(device_record.all_of(device_record.FOLDER))
    assert device_page.inserted(text, own) == text
    for file in device_record.FOLDER.glob("*.json"):
        assert file.with_suffix(".md").read_text() == device_page.page(device_record.read(file))
    assert "not measured yet" in device_page.section([])
    with pytest.raises(ValueError, match="end of speed"):
        device_page.inserted("no markers", own)
