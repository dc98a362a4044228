"""Random inputs for longer than the suite has them: python benchmarks/fuzz.py --minutes 30.

Runs the tests with Hypothesis again and again, each time with another seed, and stops at the first
failure, whose input pytest prints.
"""

import argparse
import itertools
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    given = parser.parse_args()
    end = time.time() + 60 * given.minutes
    for seed in itertools.count(given.seed):
        if time.time() > end:
            return 0
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "hypothesis", "--hypothesis-profile=long",
             f"--hypothesis-seed={seed}", "-q"],
            cwd=ROOT,
        )  # fmt: skip
        if ran.returncode:
            print(f"failed with seed {seed}")
            return 1
        print(f"seed {seed}: clean, {max(0, end - time.time()) / 60:.0f} min left", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
