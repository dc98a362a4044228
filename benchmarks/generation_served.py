"""The work of generation.py done by `lora-jax serve`, asked over HTTP in streams.

python benchmarks/generation_served.py MODEL FORMAT

It answers the lines of JSON that generation.py writes.
"""

import atexit
import concurrent.futures
import http.client
import json
import pathlib
import subprocess
import sys
import threading

import generation
import generation_peers


class Served:
    """A server for each number of slots. how: float32, bfloat16 or a format of --quant."""

    def __init__(self, model: str, how: str):
        self._model = pathlib.Path(model)
        dense = how in ("float32", "bfloat16")
        self._flags = ["--dtype", how if dense else "bfloat16"]
        self._flags += ["--quant", "none" if dense else how]
        if not (self._model / "tokenizer.json").exists():
            generation.words(self._model).save_pretrained(self._model)
        self._ports: dict[int, int] = {}

    def _port(self, slots: int) -> int:
        if slots not in self._ports:
            command = [sys.executable, "-m", "lora_jax", "serve", "--model", str(self._model)]
            command += ["--port", "0", "--slots", str(slots), "--context", "1024", *self._flags]
            started = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            atexit.register(started.kill)
            for line in started.stdout:
                if line.startswith("serve ") and "://" in line:
                    address = line.split()[1].removesuffix("/v1;")
                    self._ports[slots] = int(address.rpartition(":")[2])
                    break
            else:
                raise RuntimeError(f"the server ended with {started.wait()}")
            threading.Thread(target=started.stdout.read, daemon=True).start()
        return self._ports[slots]

    def generate(self, prompts, counts, slots):
        port = self._port(slots)
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            asked = [pool.submit(_ask, port, prompt, count)
                     for prompt, count in zip(prompts, counts, strict=True)]  # fmt: skip
            return [each.result() for each in asked]


def _ask(port: int, prompt: list[int], count: int) -> list[int]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = {
        "prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    kind = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), kind)
    response, tokens = connection.getresponse(), []
    if response.status != 200:
        raise RuntimeError(response.read().decode())
    for line in response:
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                tokens += choice.get("token_ids", [])
    connection.close()
    return tokens


if __name__ == "__main__":
    generation_peers.serve(Served(*sys.argv[1:]))
