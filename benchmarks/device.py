"""Measures lora_jax on this machine's GPU or TPU: speed, memory, tests. See devices/README.md.

python benchmarks/device.py [--part N] [--minutes M]   → benchmarks/devices/<chip>.json and .md
python benchmarks/device.py --page                     the pages and README.md from these files
python benchmarks/device.py --tiny --out FOLDER        a rehearsal on any device

Each result is written at once, so that a call which was ended continues with what is missing. Each
case is a process of its own. Weights are random and nothing is downloaded.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import device_cases
import device_page
import device_process
import device_record

from lora_jax import errors

ROOT = pathlib.Path(__file__).parents[1]
MINUTES, PART_MINUTES, TINY_MINUTES = 9.0, 8.0, 2.0  # of all parts, of one, of a rehearsal
MOST = 3  # times the expected seconds, after which a case has failed


def doctor(run: device_process.Run, most: float) -> dict[str, Any]:
    """What the command prints as JSON."""
    if importlib.util.find_spec("lora_jax.cli.doctor") is None:
        reason = "this version has no `lora-jax doctor`"
        return {"status": device_record.UNAVAILABLE, "reason": reason}
    code, out, log = run.start([sys.executable, "-m", "lora_jax", "doctor", "--json"], most)
    with contextlib.suppress(json.JSONDecodeError):
        return {"status": device_record.MEASURED, "found": json.loads(out)}
    return device_process.failed(f"exit code {code}: {log.strip()[-300:]}")


def contract_tests(
    run: device_process.Run, case: device_cases.Tests, most: float
) -> dict[str, Any]:
    """The counts of pytest's last line, and the tests that failed."""
    command = [sys.executable, "-m", "pytest", "-m", "device", "-n", "0", "-rfE", *case.chosen]
    code, out, log = run.start(command, most, LORA_JAX_TEST_DEVICE="1")
    if code is None:
        return device_process.failed(f"no result in {most:.0f} s")
    last = next((line for line in reversed(out.splitlines()) if " in " in line), "")
    counts = {name: int(number) for number, name in
              re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}  # fmt: skip
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", out, re.MULTILINE)
    if code or not counts.get("passed"):
        reason = ", ".join(failures) or f"exit code {code}: {(log or out).strip()[-300:]}"
        return device_process.failed(reason) | {"counts": counts}
    return {"status": device_record.MEASURED, "counts": counts}


def longest(
    run: device_process.Run,
    case: device_cases.Longest,
    most: float,
    before: dict[str, Any],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Lengths are tried until the longest is known; `keep` is called with what is known so far."""
    found = {name: before[name] for name in ("planned_length", "attempts") if name in before}
    if not found:
        planned = run.ask({"what": "case", "case": device_cases.fields(case)}, most)
        if "planned_length" not in planned:
            return planned
        found = {"planned_length": planned["planned_length"], "attempts": []}
    while True:
        tried = found["attempts"]
        fits = [each["length"] for each in tried if each["fits"]]
        fails = [each["length"] for each in tried if not each["fits"]]
        length = device_cases.next_length(
            found["planned_length"], fits, fails, case.unit, case.most
        )
        if length is None:
            break
        asked = {"what": "attempt", "case": device_cases.fields(case.step(length))}
        each = run.ask(asked, most)
        if each["status"] not in device_record.FINAL:
            return found | each
        fit = each["status"] == device_record.MEASURED
        found["attempts"] = [*tried, {"length": length, "fits": fit, **each}]
        keep(found | {"status": device_record.BEGUN, "reason": "the next call continues"})
        print(f"  {length:,} tokens: {'fits' if fit else each['reason']}", flush=True)
    if not fits:
        return found | {"status": device_record.TOO_LARGE, "reason": "no length fits"}
    return found | {"status": device_record.MEASURED, "length": max(fits)}


def measure(
    run: device_process.Run,
    planned: device_cases.Planned,
    before: dict[str, Any],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The outcome of a case. before: what an earlier call found, from which a search continues."""
    case, most = planned.case, max(60.0, MOST * planned.expected)
    if isinstance(case, device_cases.Doctor):
        return doctor(run, most)
    if isinstance(case, device_cases.Tests):
        return contract_tests(run, case, most)
    if isinstance(case, device_cases.Longest):
        return longest(run, case, most, before, keep)
    asked = {"what": "case", "case": device_cases.fields(case)}
    return run.ask(asked, most, peer=case.peer)


def with_shares(
    case: device_cases.Case, found: dict[str, Any], peak: float | None
) -> dict[str, Any]:
    """The outcome with the utilization of a training step."""
    if not isinstance(case, device_cases.Train) or "tokens_per_second" not in found:
        return found
    weights = device_cases.num_weights(device_cases.MODELS[case.model])
    rate = found["tokens_per_second"]
    shares = {f"mfu_{per}n": device_cases.mfu(rate, weights, per, peak) for per in (4, 6)}
    return found | shares


def commit() -> str | None:
    """Of the checkout, with -dirty if its code differs; None where there is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    with contextlib.suppress(OSError):
        own = [":!benchmarks/devices", ":!README.md"]  # what measuring writes
        changed = git("status", "--porcelain", "-uno", "--", ".", *own)
        if found := git("rev-parse", "--short", "HEAD"):
            return found + "-dirty" * bool(changed)
    return None


def measure_all(
    run: device_process.Run,
    cases: Sequence[device_cases.Planned],
    file: pathlib.Path,
    record: dict[str, Any],
    again: bool,
) -> list[str]:
    """Measures what is missing, writes it to the file, and returns the names of what is left."""
    left = []
    for planned in cases:
        case = planned.case
        if not again and device_record.is_done(record, case):
            continue
        if run.left < planned.expected:
            left.append(case.name)
            continue

        def keep(found: dict[str, Any], case=case) -> None:
            found = with_shares(case, found, record["device"]["peak_flops"])
            mark = {"date": datetime.datetime.now().isoformat(" ", "seconds"), "commit": commit()}
            record["cases"][case.name] = {"settings": device_cases.fields(case), **found, **mark}
            device_record.write(file, record)

        before = None if again else device_record.outcome(record, case)
        start = time.monotonic()
        try:
            found = measure(run, planned, before or {}, keep)
        except device_process.OutOfTime:
            left.append(case.name)
            continue
        keep(found)
        taken = time.monotonic() - start
        print(f"{case.name}: {device_page.summary(found)} ({taken:.0f} s)", flush=True)
    return left


def opened(run: device_process.Run, folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """(the file of this machine's device, its record).

    Raises: UserError where there is no device to measure.
    """
    try:
        facts = run.ask({"what": "facts"}, 180)
    except device_process.OutOfTime:
        facts = device_process.failed("the time was over before the device was opened")
    if "kind" not in facts:
        raise errors.UserError("a device that JAX can open", facts["reason"], do="call again")
    if facts["platform"] == "cpu" and not run.tiny:
        raise errors.UserError(
            "a GPU or TPU", "a CPU", do="install JAX for the device, or rehearse: --tiny --out DIR"
        )
    file = device_record.path(folder, facts["kind"])
    record = device_record.read(file)
    if record["cases"] and record["tiny"] != run.tiny:
        raise errors.UserError(
            f"{'a rehearsal' if run.tiny else 'measurements'}", "the other", str(file)
        )
    new = {"date": str(datetime.date.today()), "commit": commit(), "tiny": run.tiny}
    return file, new | {"device": facts, "cases": record["cases"]}


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    everything = device_cases.full()
    parts = sorted({planned.part for planned in everything})
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", type=int, choices=parts, help="measure this part only")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    minutes = f"{MINUTES:g}, with --part {PART_MINUTES:g}, with --tiny {TINY_MINUTES:g}"
    parser.add_argument("--minutes", type=float, metavar="M",
                        help=f"that the call may take (default: {minutes})")  # fmt: skip
    parser.add_argument("--spent", type=float, default=0, metavar="S",
                        help="seconds of them that are over (default: 0)")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="rehearse, on any device")
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER", default=device_record.FOLDER,
                        help="for the files (default: benchmarks/devices)")  # fmt: skip
    parser.add_argument("--peer-python", metavar="PYTHON", default=sys.executable,
                        help="with torch, peft and bitsandbytes (default: this one)")  # fmt: skip
    parser.add_argument("--page", action="store_true", help="only write the pages and README.md")
    given = parser.parse_args(argv)
    if given.tiny and given.out.resolve() == device_record.FOLDER:
        parser.error("expected --out FOLDER with --tiny: a rehearsal is no measurement")
    if shutil.which(given.peer_python) is None:
        parser.error(f"expected a program as --peer-python, found none: {given.peer_python}")
    if given.minutes is None:
        of_all = TINY_MINUTES if given.tiny else MINUTES
        given.minutes = of_all if given.part is None else min(of_all, PART_MINUTES)
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = parsed(argv)
    if given.page:
        device_page.write_all(given.out)
        return 0
    run = device_process.Run(given.minutes - given.spent / 60, given.peer_python, given.tiny)
    try:
        file, record = opened(run, given.out)
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return 2
    everything = device_cases.tiny() if given.tiny else device_cases.full()
    cases = [each for each in everything if given.part in (None, each.part)]
    try:
        left = measure_all(run, cases, file, record, given.again)
    except KeyboardInterrupt:
        print(f"\nended; {file} has what was measured", flush=True)
        return 130
    finally:
        device_page.write_all(given.out)
    if left:
        print("left out, as the time is over:", *left, sep="\n  ")
        print("The same command continues with them.")
    known = [device_record.outcome(record, each.case) for each in cases]
    return int(any(each and each["status"] == device_record.FAILED for each in known))


if __name__ == "__main__":
    sys.exit(main())
