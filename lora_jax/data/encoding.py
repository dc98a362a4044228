"""Rows of fields → rows of token ids with loss masks. Imports no jax.

Of the kinds of rows (see sources.KINDS)
  messages                        a chat; the loss is on the assistant's turns
  prompt, completion              joined as they stand; the loss is on completion + EOS
  instruction, [input,] output    Alpaca's template; the loss is on output + EOS
  text                            the loss is on everything, EOS included
Preferences (see encode_pairs) have prompt, chosen and rejected: texts, or lists of messages.
A .txt file is one stream of tokens, cut into blocks of seq_len.
"""

import re
import typing
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lora_jax import errors
from lora_jax import tokenizer as tokenizing
from lora_jax.data import files, sources

if typing.TYPE_CHECKING:
    import datasets
    import transformers

IGNORED = -100  # label of a token that is not trained, as in torch and Hugging Face
# https://github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)


_AT_ONCE = 4096  # texts given to the tokenizer

Row = tuple[np.ndarray, np.ndarray]  # ids int32 [T], which of them are trained bool [T]


class Encoded(typing.NamedTuple):
    """Rows of at most seq_len tokens, what they had before, and where each is from.

    num_cut, num_skipped: how many rows were cut, and how many had nothing to train on.
    """

    rows: list[Row]
    lengths: list[int]
    origins: list[str]
    num_cut: int
    num_skipped: int


def encode(
    dataset: "datasets.Dataset",
    tokenizer: "transformers.PreTrainedTokenizerBase",
    seq_len: int,
    eos: int,
    *,
    may_be_empty: bool = False,
) -> Encoded:
    """Token ids and loss masks of all rows, cut at seq_len, in the dataset's order.

    A row without a trained token after its first position (nothing to predict) is skipped.
    may_be_empty: it is no error if no row remains, as in a part of the data.

    Raises:
      errors.UserError: a row lacks fields, a chat cannot be masked, or no row remains.
    """
    if files.STREAM in dataset.column_names:
        rows = _blocks("".join(dataset[files.STREAM]), tokenizer, seq_len)
        origins = [f"block {number}" for number in range(1, len(rows) + 1)]
    else:
        rows = _encode_rows(dataset, tokenizer, eos)
        origins = [_origin(row) for row in dataset]
    return _cut(rows, origins, seq_len, together=1, may_be_empty=may_be_empty)


def encode_pairs(
    dataset: "datasets.Dataset",
    tokenizer: "transformers.PreTrainedTokenizerBase",
    seq_len: int,
    eos: int,
    *,
    may_be_empty: bool = False,
) -> Encoded:
    """As `encode`, of prompts with a chosen and a rejected answer: two rows each, in this order.

    The three are texts, or lists of messages that are joined. A pair of which one row has nothing
    to train is skipped, and counts as one.

    Raises:
      errors.UserError: a row lacks fields, a chat cannot be masked, or no pair remains.
    """
    rows, origins, found, where = [], [], [], []
    for row in dataset:
        parts = [row.get(field) for field in sources.PREFERENCE]
        if all(isinstance(part, str) for part in parts):
            pair = [{"prompt": parts[0], "completion": answer} for answer in parts[1:]]
        elif all(isinstance(part, list) for part in parts):
            pair = [{"messages": parts[0] + answer} for answer in parts[1:]]
        else:
            found.append(", ".join(_present(row)) or "(nothing)")
            where.append(_origin(row))
            continue
        rows += [made | {sources.ORIGIN: _origin(row)} for made in pair]
        origins += [_origin(row)] * 2
    if found:
        raise errors.UserError(
            expected="in each row " + ", ".join(sources.PREFERENCE) + ", all texts or all lists of "
            "messages",
            found=[f"the fields {fields}" for fields in found],
            where=where,
            do="correct these rows, or map their fields, e.g. --columns chosen=better",
        )
    made = _encode_rows(rows, tokenizer, eos)
    return _cut(made, origins, seq_len, together=2, may_be_empty=may_be_empty)


def _cut(
    rows: Sequence[Row], origins: list[str], seq_len: int, *, together: int, may_be_empty: bool
) -> Encoded:
    """Rows cut at seq_len, without groups of so many of which one has nothing left to train."""
    groups = [range(n, n + together) for n in range(0, len(rows), together)]
    whole = [group for group in groups if all(rows[n][1][1:seq_len].any() for n in group)]
    if not whole and not may_be_empty:
        raise errors.UserError(
            expected="at least one row with a token to train on",
            found=f"none in {len(rows)} rows of at most {seq_len} tokens",
            where=origins[0] if origins else None,
            do="raise --seq-len if the prompts fill it, or check the completions",
        )
    kept = [n for group in whole for n in group]
    return Encoded(
        rows=[tuple(array[:seq_len] for array in rows[n]) for n in kept],
        lengths=[len(rows[n][0]) for n in kept],
        origins=[origins[n] for n in kept],
        num_cut=sum(len(ids) > seq_len for ids, _ in rows),
        num_skipped=len(groups) - len(whole),
    )


def prompts(
    dataset: "datasets.Dataset", tokenizer: "transformers.PreTrainedTokenizerBase"
) -> list[tuple[np.ndarray, str]]:
    """(prompt ids int32 [T], expected completion) of each row, for exact-match evaluation.

    For rows with prompt/completion or instruction/output; the ids are those that training saw.
    """
    kinds = _kinds(dataset)
    if wrong := [
        row for row, kind in zip(dataset, kinds, strict=True) if kind in (("text",), ("messages",))
    ]:
        raise errors.UserError(
            expected="rows with prompt and completion, or instruction and output",
            found=[", ".join(_present(row)) for row in wrong],
            where=[_origin(row) for row in wrong],
            do="exact match needs a prompt and an expected answer: map them with --columns",
        )
    pairs = [_pair(row, kind) for row, kind in zip(dataset, kinds, strict=True)]
    ids = tokenizing.encode(tokenizer, [prompt for prompt, _ in pairs])
    return [
        (np.array(i, np.int32), completion) for i, (_, completion) in zip(ids, pairs, strict=True)
    ]


def _row(ids: Iterable, trained: Iterable) -> Row:
    return np.array(ids, np.int32), np.array(trained, bool)


def _blocks(
    text: str, tokenizer: "transformers.PreTrainedTokenizerBase", seq_len: int
) -> list[Row]:
    (ids,) = tokenizing.encode(tokenizer, [text])
    blocks = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
    return [_row(block, [True] * len(block)) for block in blocks if len(block) > 1]


def _encode_rows(
    dataset: "datasets.Dataset | list[dict]",
    tokenizer: "transformers.PreTrainedTokenizerBase",
    eos: int,
) -> list[Row]:
    kinds = _kinds(dataset)
    rows: list[Row | None] = [None] * len(dataset)
    if ("messages",) in kinds and not tokenizer.chat_template:
        raise errors.UserError(
            expected="a tokenizer with a chat template, to render the rows' messages",
            found="none",
            where=str(tokenizer.name_or_path),
            do="start from the chat variant of the model, or use prompt and completion instead",
        )
    pairs, texts, problems = {}, {}, {}
    for n, (row, kind) in enumerate(zip(dataset, kinds, strict=True)):
        if kind == ("messages",):
            try:
                rows[n] = _chat(row["messages"], tokenizer)
            except _ChatError as error:
                problems[_origin(row)] = str(error)
        elif kind == ("text",):
            texts[n] = row["text"]
        else:
            pairs[n] = _pair(row, kind)
    if problems:
        raise errors.UserError(
            expected="chats that the tokenizer's chat template renders turn by turn",
            found=list(problems.values()),
            where=list(problems),
            do="correct these rows or the template, or use prompt and completion instead",
        )
    for n, ids in zip(texts, _ids(tokenizer, list(texts.values())), strict=True):
        rows[n] = _row([*ids, eos], [True] * (len(ids) + 1))
    before = _ids(tokenizer, [prompt for prompt, _ in pairs.values()])
    whole = _ids(tokenizer, [prompt + answer for prompt, answer in pairs.values()])
    for (n, (_, answer)), prompt_ids, ids in zip(pairs.items(), before, whole, strict=True):
        # Generation starts from prompt_ids, so they must be what training saw, token by token.
        if ids[: len(prompt_ids)] != prompt_ids:
            ids = prompt_ids + _continuation(answer, tokenizer)
        trained = len(ids) - len(prompt_ids) + 1
        rows[n] = _row([*ids, eos], [False] * len(prompt_ids) + [True] * trained)
    return typing.cast(list[Row], rows)


def _ids(
    tokenizer: "transformers.PreTrainedTokenizerBase", texts: Sequence[str]
) -> Iterator[list[int]]:
    """Of some at a time: as lists of numbers all would take many times the memory of arrays."""
    for first in range(0, len(texts), _AT_ONCE):
        yield from tokenizing.encode(tokenizer, texts[first : first + _AT_ONCE])


def _continuation(text: str, tokenizer: "transformers.PreTrainedTokenizerBase") -> list[int]:
    """Ids of `text` as it follows other text: without the space that LLaMA's SentencePiece puts in
    front of every text. It is encoded behind a character that does not merge with it."""
    for anchor in ("\n", "=", "a"):
        front, ids = tokenizer([anchor, anchor + text], add_special_tokens=False).input_ids
        if ids[: len(front)] == front:
            return ids[len(front) :]
    return tokenizer(text, add_special_tokens=False).input_ids


class _ChatError(Exception):
    """What is wrong with one chat."""


def _chat(messages: object, tokenizer: "transformers.PreTrainedTokenizerBase") -> Row:
    """Ids of a chat; trained are the assistant's turns, with what the template ends them with."""
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and m.get("content") is not None
        for m in messages
    ):
        raise _ChatError("messages is not a list of {role, content}")
    # Arrow gives every message the fields of all; templates test whether a field exists.
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]

    def render(upto: int, **options: object) -> typing.Any:
        import jinja2

        try:
            return tokenizer.apply_chat_template(
                messages[:upto], tokenize=True, return_dict=True, verbose=False, **options
            )
        except jinja2.TemplateError as error:
            raise _ChatError(f"the chat template refuses it: {error}") from error

    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        rendered = render(len(messages), return_assistant_tokens_mask=True)
        return _row(rendered["input_ids"], rendered["assistant_masks"])

    ids = render(len(messages))["input_ids"]
    trained = np.zeros(len(ids), bool)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(i, add_generation_prompt=True)["input_ids"]
            after = render(i + 1)["input_ids"]
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise _ChatError(f"turn {i + 1} changes the tokens of the turns before it")
            trained[len(before) : len(after)] = True
    return _row(ids, trained)


def _pair(row: dict, kind: tuple[str, ...]) -> tuple[str, str]:
    """(prompt, completion) of a row that is not a text and not a chat."""
    if kind == ("prompt", "completion"):
        return row["prompt"], row["completion"]
    template = ALPACA_INPUT if row.get("input") else ALPACA_NO_INPUT
    return template.format_map(row), row["output"]


def _kinds(dataset: "datasets.Dataset | list[dict]") -> list[tuple[str, ...]]:
    """The kind of each row; one error for all rows that have none or hold no text."""
    kinds, found, where = [], [], []
    for row in dataset:
        present = _present(row)
        kind = next((kind for kind in sources.KINDS if set(kind) <= set(present)), ())
        kinds.append(kind)
        wrong = [f for f in kind if f != "messages" and not isinstance(row[f], str)]
        if not kind or wrong:
            found.append(
                ", ".join(f"{f} is a {type(row[f]).__name__}" for f in wrong)
                or f"only the fields {', '.join(present) or '(none)'}"
            )
            where.append(_origin(row))
    if found:
        known = ", or ".join(" + ".join(kind) for kind in sources.KINDS)
        raise errors.UserError(
            expected=f"in each row the texts of {known}",
            found=found,
            where=where,
            do="train on preferences with --dpo"
            if all("chosen, rejected" in fields for fields in found)
            else "correct these rows, or map their fields, e.g. --columns "
            "prompt=question,completion=answer",
        )
    return kinds


def _present(row: dict) -> list[str]:
    return [name for name, value in row.items() if value is not None and name != sources.ORIGIN]


def _origin(row: dict) -> str:
    return row.get(sources.ORIGIN, "a row built in memory")
