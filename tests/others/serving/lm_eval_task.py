"""lm-eval's local-completions against the server, equal to the log-likelihoods of lora_jax itself.

    python lm_eval_task.py    # and with --own FILE in the environment of lora_jax

A task of multiple choice and one of whole texts, on stories260K. lm-eval finds the tokenizer with
/tokenizer_info and needs none of its own. It then encodes contexts without BOS, whatever its
add_bos_token says.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import server

ROWS = [  # (context, continuations: the first one is right)
    ("Once upon a time, there was a little", [" girl", " dog", " cloud", " moon named"]),
    ("Lily and Tom went to the", [" park", " store to buy", " sky", " red"]),
    ("The cat was very", [" happy", " sad and cried", " blue", " box"]),
    ("He saw a big, red", [" ball", " apple on the tree", " mom", " ran"]),
    ("“Thank you”, said the", [" bird", " girl", " boy 🙂", " naïve fish"]),
    ("One day, a boy named Tim", [" went", " was playing", " tree", " the"]),
    ("The sun was shining and the birds were", [" singing", " blue", " mom", " ate a car"]),
    ("She put the toy in the", [" box", " happy", " jumped", " sky and sad"]),
    ("Mom said, “Be", [" careful", " nice to him", " dog", " 17"]),
    ("They played together all", [" day", " night long", " cat", " because"]),
    ("The dog ran after the", [" ball", " cat up the tree", " sleepy", " said"]),
    ("Tom was sad because he lost his", [" toy", " red hat", " happy", " and"]),
    ("The bird could fly very", [" high", " far away", " table", " named"]),
    ("Anna wanted to eat the", [" cake", " cookie", " cloud", " of"]),
    ("It was time to go", [" home", " to bed", " a", " yellow"]),
    ("The boy and the girl were best", [" friends", " toys", " park", " ran"]),
    ("He said sorry and gave her a", [" hug", " big hug", " sad", " the"]),
    ("The little fish lived in the", [" sea", " big blue water", " happy", " said"]),
    ("She opened the door and saw a", [" cat", " big surprise", " to", " slowly"]),
    ("From that day on, they were", [" friends", " always kind", " door", " the"]),
]
CHOICES = """\
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: 0
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}]
metadata: {version: 1}
"""
TEXTS = """\
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}{{choices[0]}}"
metric_list: [{metric: word_perplexity}]
metadata: {version: 1}
"""


def own(path: str) -> None:
    """Prints the log-likelihood of each (context, continuation) in a file, computed by lora_jax."""
    import numpy as np

    from lora_jax import tokenizer
    from lora_jax.checkpoints import loader

    model, reader = loader.load(server.STORIES), tokenizer.load(server.STORIES)
    pairs, lengths, rows = json.loads(pathlib.Path(path).read_text()), [], []
    for context, continuation in pairs:
        # lm-eval asks /tokenize for ids without BOS, and puts it before whole texts itself.
        known = reader(context, add_special_tokens=False).input_ids or [reader.bos_token_id]
        ids = reader(context + continuation, add_special_tokens=False).input_ids
        rows.append(ids if context else [*known, *ids])
        lengths.append(len(known))
    batch = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(batch, rows, strict=True):
        row[: len(ids)] = ids
    logits = np.asarray(model(batch), np.float64)
    top = logits.max(-1, keepdims=True)
    logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    found = [
        float(own[np.arange(known - 1, len(ids) - 1), ids[known:]].sum())
        for own, known, ids in zip(logprobs, lengths, rows, strict=True)
    ]
    print(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--own")
    given = parser.parse_args()
    if given.own:
        own(given.own)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        rows = folder / "rows.jsonl"
        rows.write_text("".join(
            json.dumps({"text": text, "choices": choices}) + "\n" for text, choices in ROWS
        ))  # fmt: skip
        for task, text in (("choices", CHOICES), ("texts", TEXTS)):
            (folder / f"{task}.yaml").write_text(text.replace("ROWS", str(rows)))
        with server.running("--model", server.STORIES) as url:
            model = f"model=stories260K,base_url={url}/v1/completions,tokenizer_backend=remote,"
            subprocess.run(
                [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args",
                 model + "num_concurrent=4", "--tasks", "choices,texts", "--include_path", folder,
                 "--log_samples", "--output_path", folder / "out"],
                check=True,
            )  # fmt: skip
        pairs, theirs = [], []
        for path in sorted((folder / "out").rglob("samples_*.jsonl")):
            for line in path.read_text().splitlines():
                sample = json.loads(line)
                for asked, answer in zip(
                    sample["arguments"].values(), sample["resps"], strict=True
                ):
                    values = [*asked.values()]
                    pairs.append(values if len(values) == 2 else ["", *values])
                    theirs.append(float(answer[0][0] if len(values) == 2 else answer[0]))
        (folder / "pairs.json").write_text(json.dumps(pairs))
        command = [server.PYTHON, __file__, "--own", folder / "pairs.json"]
        ours = json.loads(subprocess.run(
            command, check=True, env=server.ENV, capture_output=True, text=True
        ).stdout.splitlines()[-1])  # fmt: skip
    for pair, one, other in zip(pairs, ours, theirs, strict=True):
        print(f"{one:12.5f} {other:12.5f}  {pair}")
    right = [max(each[n : n + 4]) == each[n] for each in (ours, theirs) for n in range(0, 80, 4)]
    print(f"right of 20: {sum(right[:20])} by lora_jax, {sum(right[20:])} by lm-eval")
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{len(ours)} log-likelihoods; the largest difference is {worst:.1e}")
    return int(worst > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
