"""Examples of fields → token ids with loss masks. Imports no jax.

How an example is encoded depends on its kind: see kinds.py. A .txt file is one stream of tokens,
cut into blocks of seq_len.
"""

import typing
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lora_jax import errors
from lora_jax import tokenizer as tokenizing
from lora_jax.data import chat, files, kinds

if typing.TYPE_CHECKING:
    import datasets
    import transformers

IGNORED = -100  # the label of a token that is not trained, as in torch and Hugging Face
_AT_ONCE = 4096  # strings passed to the tokenizer at once

Example = tuple[np.ndarray, np.ndarray]  # ids int32 [T], which of them are trained bool [T]


class Encoded(typing.NamedTuple):
    """Examples of at most seq_len tokens, their lengths before cutting, and where each is from.

    num_cut: how many were cut. num_skipped: how many had nothing to train.
    """

    examples: list[Example]
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
    """Token ids and loss masks of all examples, cut at seq_len, in the data set's order.

    An example without a trained token after its first position has nothing to predict and is
    skipped.
    may_be_empty: no example may remain, as in a block of a stream.

    Raises:
      errors.UserError: an example lacks fields, a chat cannot be masked, or no example remains.
    """
    if files.STREAM in dataset.column_names:
        examples = _blocks("".join(row[files.STREAM] for row in dataset), tokenizer, seq_len)
        origins = [f"block {number}" for number in range(1, len(examples) + 1)]
    else:
        examples = _encode_all(dataset, tokenizer, eos)
        origins = [kinds.origin(fields) for fields in dataset]
    return _cut(examples, origins, seq_len, group=1, may_be_empty=may_be_empty)


def encode_pairs(
    dataset: "datasets.Dataset",
    tokenizer: "transformers.PreTrainedTokenizerBase",
    seq_len: int,
    eos: int,
    *,
    may_be_empty: bool = False,
) -> Encoded:
    """As `encode`, but each preference becomes two examples: prompt + chosen, prompt + rejected.

    The three fields are strings, which are joined, or message lists, which are concatenated. A pair
    is skipped if one of its examples has nothing to train; it counts as one.

    Raises:
      errors.UserError: an example lacks fields, a chat cannot be masked, or no pair remains.
    """
    answers, origins, found, where = [], [], [], []
    for example in dataset:
        parts = [example.get(field) for field in kinds.PREFERENCE]
        if all(isinstance(part, str) for part in parts):
            pair = [{"prompt": parts[0], "completion": answer} for answer in parts[1:]]
        elif all(isinstance(part, list) for part in parts):
            pair = [{"messages": parts[0] + answer} for answer in parts[1:]]
        else:
            found.append(", ".join(kinds.fields_present(example)) or "(nothing)")
            where.append(kinds.origin(example))
            continue
        answers += [fields | {kinds.ORIGIN: kinds.origin(example)} for fields in pair]
        origins += [kinds.origin(example)] * 2
    if found:
        raise errors.UserError(
            expected=f"in each example {', '.join(kinds.PREFERENCE)}, all strings or all message "
            "lists",
            found=[f"the fields {fields}" for fields in found],
            where=where,
            do="correct these examples, or map their fields, e.g. --columns chosen=better",
        )
    examples = _encode_all(answers, tokenizer, eos)
    return _cut(examples, origins, seq_len, group=2, may_be_empty=may_be_empty)


def prompts(
    dataset: "datasets.Dataset", tokenizer: "transformers.PreTrainedTokenizerBase"
) -> list[tuple[np.ndarray, str]]:
    """(prompt ids int32 [T], expected completion) of each example, for exact-match evaluation.

    For examples with prompt/completion or instruction/output; the ids are those that training uses.
    """
    kind_of_each = kinds.kinds_of(dataset)
    each = list(zip(dataset, kind_of_each, strict=True))
    if wrong := [example for example, kind in each if kind in (("text",), ("messages",))]:
        raise errors.UserError(
            expected="examples with prompt and completion, or instruction and output",
            found=[", ".join(kinds.fields_present(example)) for example in wrong],
            where=[kinds.origin(example) for example in wrong],
            do="exact match needs a prompt and an expected answer: map them with --columns",
        )
    pairs = [kinds.prompt_and_completion(example, kind) for example, kind in each]
    ids = tokenizing.encode(tokenizer, [prompt for prompt, _ in pairs])
    return [
        (np.array(i, np.int32), completion) for i, (_, completion) in zip(ids, pairs, strict=True)
    ]


def _cut(
    examples: Sequence[Example], origins: list[str], seq_len: int, *, group: int, may_be_empty: bool
) -> Encoded:
    """Examples cut at seq_len. Of every `group` in turn, all are skipped if one has nothing left to
    train."""
    groups = [range(n, n + group) for n in range(0, len(examples), group)]
    whole = [group for group in groups if all(examples[n][1][1:seq_len].any() for n in group)]
    if not whole and not may_be_empty:
        raise errors.UserError(
            expected="at least one example with a token to train on",
            found=f"none in {len(examples)} examples of at most {seq_len} tokens",
            where=origins[0] if origins else None,
            do="raise --seq-len if the prompts fill it, or check the completions",
        )
    kept = [n for group in whole for n in group]
    return Encoded(
        examples=[tuple(array[:seq_len] for array in examples[n]) for n in kept],
        lengths=[len(examples[n][0]) for n in kept],
        origins=[origins[n] for n in kept],
        num_cut=sum(len(ids) > seq_len for ids, _ in examples),
        num_skipped=len(groups) - len(whole),
    )


def _example(ids: Iterable, trained: Iterable) -> Example:
    return np.array(ids, np.int32), np.array(trained, bool)


def _blocks(
    text: str, tokenizer: "transformers.PreTrainedTokenizerBase", seq_len: int
) -> list[Example]:
    (ids,) = tokenizing.encode(tokenizer, [text])
    blocks = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
    return [_example(block, [True] * len(block)) for block in blocks if len(block) > 1]


def _encode_all(
    dataset: "datasets.Dataset | list[dict]",
    tokenizer: "transformers.PreTrainedTokenizerBase",
    eos: int,
) -> list[Example]:
    kind_of_each = kinds.kinds_of(dataset)
    examples: list[Example | None] = [None] * len(dataset)
    if ("messages",) in kind_of_each and not tokenizer.chat_template:
        raise errors.UserError(
            expected="a tokenizer with a chat template, to render the examples' messages",
            found="none",
            where=str(tokenizer.name_or_path),
            do="start from the chat variant of the model, or use prompt and completion instead",
        )
    pairs, texts, problems = {}, {}, {}
    for n, (fields, kind) in enumerate(zip(dataset, kind_of_each, strict=True)):
        if kind == ("messages",):
            try:
                examples[n] = chat.encode(fields["messages"], tokenizer)
            except chat.ChatError as error:
                problems[kinds.origin(fields)] = str(error)
        elif kind == ("text",):
            texts[n] = fields["text"]
        else:
            pairs[n] = kinds.prompt_and_completion(fields, kind)
    if problems:
        raise errors.UserError(
            expected="chats that the tokenizer's chat template renders turn by turn",
            found=list(problems.values()),
            where=list(problems),
            do="correct these examples or the template, or use prompt and completion instead",
        )
    for n, ids in zip(texts, _ids(tokenizer, list(texts.values())), strict=True):
        examples[n] = _example([*ids, eos], [True] * (len(ids) + 1))
    before = _ids(tokenizer, [prompt for prompt, _ in pairs.values()])
    whole = _ids(tokenizer, [prompt + answer for prompt, answer in pairs.values()])
    for (n, (_, answer)), prompt_ids, ids in zip(pairs.items(), before, whole, strict=True):
        # Generation starts from prompt_ids, so training must use exactly these tokens.
        if ids[: len(prompt_ids)] != prompt_ids:
            ids = prompt_ids + _continuation(answer, tokenizer)
        trained = len(ids) - len(prompt_ids) + 1
        examples[n] = _example([*ids, eos], [False] * len(prompt_ids) + [True] * trained)
    return typing.cast(list[Example], examples)


def _ids(
    tokenizer: "transformers.PreTrainedTokenizerBase", texts: Sequence[str]
) -> Iterator[list[int]]:
    """The ids of each string. Some strings at a time: lists of numbers take many times the memory
    of arrays."""
    for first in range(0, len(texts), _AT_ONCE):
        yield from tokenizing.encode(tokenizer, texts[first : first + _AT_ONCE])


def _continuation(text: str, tokenizer: "transformers.PreTrainedTokenizerBase") -> list[int]:
    """The ids of `text` where it follows other text, without the space that LLaMA's SentencePiece
    puts in front. It is encoded after a character that does not merge with it."""
    for anchor in ("\n", "=", "a"):
        front, ids = tokenizer([anchor, anchor + text], add_special_tokens=False).input_ids
        if ids[: len(front)] == front:
            return ids[len(front) :]
    return tokenizer(text, add_special_tokens=False).input_ids
