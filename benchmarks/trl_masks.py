"""Compares ids and loss masks with TRL's, on random rows and TRL's own published templates.

Needs trl (its templates come with it) and transformers, not jax:

    python benchmarks/trl_masks.py --tokenizer FOLDER --rows 1000

TRL marks answers by templates of its own, which it keeps beside the published ones. A row counts as
equal if its ids are TRL's and its mask differs at most in white space behind the end of a turn, or
in what the generation prompt opens. Rows that TRL's template renders differently, or refuses, have
no mask to compare with; their ids are compared with the published template's.

Known differences: TRL trains the end of a turn whose tool call the template leaves out (llama3),
and what is in front of the answer to a tool (deepseek_r1_distill). Where a turn ends within a token
(`><`) or in a character of several tokens, the masks differ in these.
"""

import argparse
import collections
import importlib.util
import pathlib
import random
import re
import sys

import numpy as np

from lora_jax import errors, tokenizer
from lora_jax.data import encoding

WORDS = "The cat sat on a mat ; it is 42 , or «naïve» 東京 \n\n user assistant x=y? {}".split(" ")


def text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12))).strip() or "a"


def call(rng: random.Random) -> list[dict]:
    arguments = {rng.choice("abc"): rng.choice([1, True, text(rng), [1, "a"]]) for _ in range(2)}
    return [{"type": "function", "function": {"name": "look_up", "arguments": arguments}}]


def chat(rng: random.Random) -> list[dict]:
    messages = [{"role": "system", "content": text(rng)}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": text(rng)})
        if rng.random() < 0.2:
            messages.append({"role": "assistant", "content": "", "tool_calls": call(rng)})
            messages.append({"role": "tool", "name": "look_up", "content": text(rng)})
        thought = f"<think>\n{text(rng)}\n</think>\n\n" if rng.random() < 0.2 else ""
        messages.append({"role": "assistant", "content": thought + text(rng)})
    return messages


def load(folder: pathlib.Path, template: str):
    """The tokenizer, with a template whose markers are tokens, as they are in its own model."""
    reader = tokenizer.load(folder)
    markers = re.findall(r"<[|｜][^|｜\s']*[|｜]>|<(?:start|end)_of_turn>|</?think>", template)
    reader.add_special_tokens({"additional_special_tokens": sorted(set(markers))})
    reader.chat_template = template
    return reader


def rendered(reader, messages: list[dict]) -> str:
    return reader.apply_chat_template(messages, tokenize=False)


def as_parts(messages: list[dict]) -> list[dict]:
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]


def compare(plain, marked, messages: list[dict]) -> str:
    """How a row compares."""
    given = messages
    try:
        said = [each["content"] for each in messages if each["role"] in ("user", "assistant")]
        text = rendered(plain, messages)
        if any(each.rpartition("</think>")[2].strip() not in text for each in said):
            messages = as_parts(messages)  # as templates of models with images want it
        own = plain.apply_chat_template(messages, return_dict=True)["input_ids"]
    except Exception:
        return "refused by the template"
    try:
        theirs = marked.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception:
        theirs = {"input_ids": None}
    try:
        ((ids, trained),) = encoding.encode(
            [{"messages": given}], plain, 100_000, plain.eos_token_id
        ).rows
    except errors.UserError as error:
        return f"refused here: {error.found}"
    if ids.tolist() != own:
        return "other ids"
    if theirs["input_ids"] != own:
        return "ids equal, TRL's template renders otherwise"
    mask = np.array(theirs["assistant_masks"], bool)
    differ = [plain.decode([i]) for i in ids[trained ^ mask]]
    opens = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)[-40:]
    wrong = [each for each in differ if each.strip() and each.strip() not in opens]
    return f"other mask: {wrong[:3]}" if wrong else "equal"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    package = importlib.util.find_spec("trl")
    folder = pathlib.Path(package.submodule_search_locations[0]) / "chat_templates"
    pairs = {}
    for twin in sorted(folder.glob("*_training.jinja")):
        name = twin.name.removesuffix("_training.jinja")
        if (folder / f"{name}.jinja").exists():
            published = (folder / f"{name}.jinja").read_text()
            pairs[name] = load(given.tokenizer, published), load(given.tokenizer, published)
            pairs[name][1].chat_template = twin.read_text()
    rng = random.Random(given.seed)
    found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for n in range(given.rows):
        name = sorted(pairs)[n % len(pairs)]
        result = compare(*pairs[name], chat(rng))
        found[result.partition(":")[0]][name] += 1
        if result.startswith(("other", "refused here")):
            print(f"{name}: {result}")
    for result, counts in found.items():
        print(f"{counts.total():5} {result}")
    return int(any(result.startswith(("other", "refused here")) for result in found))


if __name__ == "__main__":
    sys.exit(main())
