"""500 streamed requests at once to eight adapters: none lost, none mixed up, memory flat.

    python load.py [--requests 500] [--rounds 3]

Half of the requests are greedy, half have a seed. Each text is compared with the same request sent
alone. The times to the first token are compared with a straight line, and with the order of the
requests in the queue.
"""

import argparse
import asyncio
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import openai
import server

NAMES = ["stories260K", *(f"a{number}" for number in range(8))]
PROMPTS = ["Once upon a time", "The dog", "One day, Lily", "A big red ball", "Tom was sad"]


def request(number: int) -> dict:
    """Request `number`: the model, the prompt, the length and the kind of decoding differ."""
    sampling = {"temperature": 0} if number % 2 else {"temperature": 1, "seed": number % 40}
    return {
        "model": NAMES[number % len(NAMES)],
        "prompt": PROMPTS[number % len(PROMPTS)] + " and" * (number % 7),
        "max_tokens": 8 + number % 41,
        **sampling,
    }


async def open_stream(client: openai.AsyncOpenAI, number: int) -> openai.AsyncStream:
    """The stream of a request, which is in the server's queue by then."""
    return await client.completions.create(
        **request(number), stream=True, stream_options={"include_usage": True}
    )


async def read(stream: openai.AsyncStream) -> dict:
    text, first, usage, reasons = "", None, None, []
    async for chunk in stream:
        for choice in chunk.choices:
            first = first or time.monotonic()
            text += choice.text
            reasons += [choice.finish_reason] if choice.finish_reason else []
        usage = chunk.usage or usage
    assert len(reasons) == 1 and usage is not None, (reasons, usage)
    return {"text": text, "first": first, "usage": usage}


async def ask(client: openai.AsyncOpenAI, number: int) -> dict:
    return await read(await open_stream(client, number))


def rss(pid: int) -> float:
    """MiB of a process."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise AssertionError


async def run(url: str, pid: int, count: int, rounds: int) -> int:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    kinds = {str(request(n)): n for n in range(count)}
    alone = {kind: await ask(client, n) for kind, n in kinds.items()}
    print(f"{len(kinds)} different requests alone; {rss(pid):.0f} MiB", flush=True)
    wrong, memory = 0, []
    for turn in range(rounds):
        start = time.monotonic()
        results = await asyncio.gather(
            *(ask(client, n) for n in range(count)), return_exceptions=True
        )
        took = time.monotonic() - start
        lost = [each for each in results if isinstance(each, BaseException)]
        good = [(n, each) for n, each in enumerate(results) if not isinstance(each, BaseException)]
        mixed = [n for n, each in good if each["text"] != alone[str(request(n))]["text"]]
        wrong += len(lost) + len(mixed)
        memory.append(rss(pid))
        order = sorted(each["first"] - start for _, each in good)
        tokens = sum(each["usage"].completion_tokens for _, each in good)
        # How far the time to first token is from proportional to the place in the queue.
        ideal = [order[0] + (order[-1] - order[0]) * n / len(order) for n in range(len(order))]
        print(
            f"round {turn + 1}: {took:.1f} s, {tokens / took:.0f} tokens/s, lost {len(lost)}, "
            f"mixed up {len(mixed)}, {memory[-1]:.0f} MiB; first token: median "
            f"{statistics.median(order):.2f} s, last {order[-1]:.2f} s, off the queue's line by "
            f"{max(abs(a - b) for a, b in zip(order, ideal, strict=True)) / order[-1]:.0%}",
            flush=True,
        )
        for each in lost[:3]:
            print("  lost:", repr(each)[:300])
        for n in mixed[:3]:
            print("  mixed:", request(n), results[n]["text"], alone[str(request(n))]["text"])
    # One after the other into the queue, so that each has a place in it.
    tasks = [asyncio.create_task(read(await open_stream(client, n))) for n in range(count)]
    firsts = [each["first"] for each in await asyncio.gather(*tasks)]
    later = [sum(b < a for b in firsts[n + 1 :]) for n, a in enumerate(firsts)]
    print(f"in order: at most {max(later)} later requests had their first token before an earlier")
    await client.close()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make = [server.PYTHON, pathlib.Path(__file__).with_name("adapters.py"), folder]
        subprocess.run(make, check=True, env=server.ENV)
        adapters = [f"--adapter=a{n}={folder}/a{n}" for n in range(8)]
        with server.process("--model", server.STORIES, "--slots", 8, *adapters) as (url, process):
            return asyncio.run(run(url, process.pid, given.requests, given.rounds))


if __name__ == "__main__":
    sys.exit(main())
