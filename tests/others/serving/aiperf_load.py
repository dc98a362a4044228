"""NVIDIA's aiperf as the load: 100 streams of random lengths, 16 at a time, on stories260K.

    python aiperf_load.py

aiperf writes what it measured below a folder of its own; the last lines say how many failed.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import server

LOAD = (
    "--endpoint-type completions --streaming --request-count 100 --concurrency 16 "
    "--warmup-request-count 16 --synthetic-input-tokens-mean 100 "
    "--synthetic-input-tokens-stddev 60 --output-tokens-mean 100 --output-tokens-stddev 60 "
    "--random-seed 0 --request-timeout-seconds 300 --ui none"
)
SHOWN = ("request_count", "error_request_count", "output_token_throughput", "time_to_first_token",
         "inter_token_latency", "input_sequence_length", "output_sequence_length")  # fmt: skip


def main() -> int:
    aiperf = pathlib.Path(sys.executable).with_name("aiperf")
    with tempfile.TemporaryDirectory() as folder, server.running("--model", server.STORIES) as url:
        subprocess.run(
            [aiperf, "profile", "--model", "stories260K", "--tokenizer", server.STORIES, "--url",
             url, "--artifact-dir", folder, *LOAD.split(), "--extra-inputs", "ignore_eos:true"],
            check=True,
        )  # fmt: skip
        found = json.loads(pathlib.Path(folder, "profile_export_aiperf.json").read_text())
    for name in SHOWN:
        print(name, json.dumps(found.get(name)))
    failed = (found.get("error_request_count") or {"avg": 0})["avg"]
    print(f"{found['request_count']['avg']:.0f} answered, {failed:.0f} failed")
    return int(failed or found["request_count"]["avg"] != 100)


if __name__ == "__main__":
    sys.exit(main())
