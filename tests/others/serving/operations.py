"""What an operator sees: clients that die, SIGTERM, a port in use, keys, a missing adapter.

python operations.py
"""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import server

LONG = {"prompt": "Once upon a time", "max_tokens": 480, "ignore_eos": True, "stream": True}
BODY = ["-H", "Content-Type: application/json", "-d", json.dumps(LONG)]


def curl(url, *more):
    command = ["curl", "-sN", f"{url}/v1/completions", *BODY, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def get(url, key=None):
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(asked) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def running(url):
    return int(re.search(r"^lora_jax_requests_running (\d+)", get(f"{url}/metrics")[1], re.M)[1])


def a_killed_client_frees_its_slot(_):
    with server.running("--model", server.STORIES, "--slots", 1) as url:
        clients = [curl(url)]
        assert clients[0].stdout.readline().startswith("data:")
        clients += [curl(url) for _ in range(3)]  # which wait
        for client in clients:
            client.kill()
        end = time.monotonic() + 2
        while running(url):
            assert time.monotonic() < end
        assert 'choices_total{reason="stop"}' not in get(f"{url}/metrics")[1]


def sigterm_drains(_):
    with server.process("--model", server.STORIES) as (url, process):
        client = curl(url)
        client.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert "data: [DONE]" in client.stdout.read()
        assert process.wait(30) == 0


def a_port_in_use_is_one_clear_error(_):
    with server.running("--model", server.STORIES) as url:
        port = url.rpartition(":")[2]
        start = time.monotonic()
        code, said = ended("--model", server.STORIES, "--port", port)
        assert code == 2 and f"--port {port}" in said and "Traceback" not in said, said
        assert "compiling" not in said, said
        print(f"        after {time.monotonic() - start:.1f} s")


def an_adapter_that_is_not_there_is_one_clear_error(_):
    code, said = ended("--model", server.STORIES, "--adapter", "a=/nowhere/adapter")
    assert code == 2 and "/nowhere/adapter" in said and "Traceback" not in said, said


def a_key_guards_all_but_health(_):
    with server.running("--model", server.STORIES, "--api-key", "secret") as url:
        assert get(f"{url}/health")[0] == 200
        for path in ("/v1/models", "/metrics", "/version", "/tokenizer_info"):
            assert get(url + path)[0] == 401 and get(url + path, "wrong")[0] == 401
            assert get(url + path, "secret")[0] == 200
        assert "invalid_api_key" in curl(url).stdout.read()
        assert "[DONE]" in curl(url, "-H", "Authorization: Bearer secret").stdout.read()


def ended(*flags):
    command = [server.PYTHON, "-m", "lora_jax", "serve", *map(str, flags)]
    said = subprocess.run(
        command, env=server.ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return said.returncode, said.stdout


CHECKS = (a_killed_client_frees_its_slot, sigterm_drains, a_port_in_use_is_one_clear_error,
          an_adapter_that_is_not_there_is_one_clear_error, a_key_guards_all_but_health)  # fmt: skip

if __name__ == "__main__":
    sys.exit(server.report(None, *CHECKS))
