"""Examples of fields → token ids with loss masks. Imports no jax.

How an example is encoded depends on its kind: see kinds.py. A .txt file is one stream of tokens,
cut into blocks of seq_len.
"""

import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from lora_jax import errors
from lora_jax import tokenizer as tokenizing
from lora_jax.data.chats import chat, messages
from lora_jax.data.examples import kinds, preferences, token_ids
from lora_jax.data.formats import files

if typing.TYPE_CHECKING:
    import transformers

IGNORED = -100  # the label of a token that is not trained, as in torch and Hugging Face
_AT_ONCE = 4096  # strings passed to the tokenizer at once

Example = tuple[np.ndarray, np.ndarray]  # ids int32 [T], which of them are trained bool [T]


class Encoded(typing.NamedTuple):
    """Examples of at most seq_len tokens, their lengths before cutting, and where each is from.

    num_cut: how many were cut. num_skipped: how many had nothing to train. num_chats: how many are
    chats. num_lost: in how many of those the chat template leaves out an answer or a tool call that
    should be trained. num_no_reasons: in how many it leaves out the reasoning of the last answer.
    """

    rows: list[Example]
    lengths: list[int]
    origins: list[str]
    num_cut: int
    num_skipped: int
    num_chats: int = 0
    num_lost: int = 0
    num_no_reasons: int = 0

    @property
    def losses(self) -> list[str]:
        """What the chat template leaves out, one line each."""
        found = {"an answer or a tool call": self.num_lost,
                 "the reasoning of the last answer": self.num_no_reasons}  # fmt: skip
        return [
            f"the chat template leaves out {what} in {number} of them: not trained"
            for what, number in found.items()
            if number
        ]


def encode(
    dataset: Iterable[kinds.Fields],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    seq_len: int,
    eos: int,
    *,
    may_be_empty: bool = False,
    split_texts: bool = False,
    train_on_inputs: bool = False,
) -> Encoded:
    """Token ids and loss masks of all examples, cut at seq_len, in the data set's order.

    An example without a trained token after its first position has nothing to predict and is
    skipped.
    may_be_empty: no example may remain, as in a block of a stream. split_texts: a longer `text` is
    cut into several examples, and nothing of it is left out. train_on_inputs: every token of an
    example is trained, also of its prompt.

    Raises:
      errors.UserError: an example lacks fields, a chat cannot be masked, or no example remains.
    """
    if files.STREAM in next(iter(dataset), {}):
        examples = _blocks(_joined([row[files.STREAM] for row in dataset]), tokenizer, seq_len)
        origins = [f"block {number}" for number in range(1, len(examples) + 1)]
        chats: Sequence[chat.Encoded] = ()
    else:
        examples, chats = _encode_all(dataset, tokenizer, eos, train_on_inputs)
        origins = [kinds.origin(fields) for fields in dataset]
        if split_texts:
            parts = [
                (part, origin)
                for fields, example, origin in zip(dataset, examples, origins, strict=True)
                for part in (
                    _parts(example, seq_len) if kinds.kind_of(fields) == ("text",) else [example]
                )
            ]
            examples, origins = map(list, zip(*parts, strict=True)) if parts else ([], [])
    found = _cut(examples, origins, seq_len, group=1, may_be_empty=may_be_empty)
    return _with_chats(found, chats)


def encode_pairs(
    dataset: Iterable[kinds.Fields],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    seq_len: int,
    eos: int,
    *,
    may_be_empty: bool = False,
) -> Encoded:
    """As `encode`, but each preference becomes two examples: prompt + chosen, prompt + rejected.

    What chosen and rejected have in common at their beginning belongs to the prompt, of which
    nothing is trained. A pair is skipped if one of its examples has nothing to train, or if they
    are equal; it counts as one.

    Raises:
      errors.UserError: an example lacks fields, a chat cannot be masked, or no pair remains.
    """
    chats = chat.Encoder(tokenizer)
    texts: list[dict[str, typing.Any]] = []
    examples: dict[int, tuple[Example, ...]] = {}
    origins, problems, rendered = [], {}, []
    for n, fields in enumerate(dataset):
        origins += [kinds.origin(fields)] * 2
        fields = preferences.plain(fields)
        try:
            pair = preferences.read(fields)
            if isinstance(pair, preferences.Texts):
                texts += [{"prompt": pair.prompt, "completion": answer} for answer in pair.answers]
                continue
            encoded = [chats.encode(each, fields, pair.num_prompt) for each in pair.chats]
        except chat.ChatError as error:
            problems[kinds.origin(fields)] = str(error)
            continue
        examples[n] = tuple((each.ids, each.trained) for each in encoded)
        rendered.append(max(encoded, key=lambda each: (each.loses, each.loses_reasoning)))
    if problems:
        raise errors.UserError(
            expected=f"in each example {', '.join(kinds.PREFERENCE)}, as strings or message lists; "
            "no prompt if the answers begin with it",
            found=list(problems.values()),
            where=list(problems),
            do="correct these examples, or map their fields, e.g. --columns prompt=question",
        )
    joined = iter(_encode_texts(texts, tokenizer, eos))
    num_pairs = len(origins) // 2
    pairs = [examples.get(n) or (next(joined), next(joined)) for n in range(num_pairs)]
    flat = [example for pair in pairs for example in pair]
    found = _cut(flat, origins, seq_len, group=2, may_be_empty=may_be_empty)
    return _with_chats(found, rendered)


def _with_chats(found: Encoded, chats: Sequence[chat.Encoded]) -> Encoded:
    return found._replace(
        num_chats=len(chats),
        num_lost=sum(each.loses for each in chats),
        num_no_reasons=sum(each.loses_reasoning for each in chats),
    )


def prompts(
    dataset: Iterable[kinds.Fields], tokenizer: "transformers.PreTrainedTokenizerBase"
) -> list[tuple[np.ndarray, str]]:
    """(prompt ids int32 [T], expected completion) of each example, for exact-match evaluation.

    For examples with prompt/completion or instruction/output; the ids are those that training uses.
    """
    kind_of_each = kinds.kinds_of(dataset)
    each = list(zip(dataset, kind_of_each, strict=True))
    if wrong := [
        example
        for example, kind in each
        if kind in (("text",), token_ids.KIND) or kinds.is_chat(example, kind)
    ]:
        raise errors.UserError(
            expected="examples with prompt and completion, or instruction and output, as strings",
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
    whole = [
        group
        for group in groups
        if all(examples[n][1][1:seq_len].any() for n in group)
        and (len(group) == 1 or not np.array_equal(*(examples[n][0][:seq_len] for n in group)))
    ]
    if not whole and not may_be_empty:
        raise errors.UserError(
            expected="at least one example with a token to train on",
            found=f"none in {len(examples)} examples of at most {seq_len} tokens",
            where=origins[0] if origins else None,
            do="raise --seq-len if the prompts fill it, or check the completions",
        )
    kept = [n for group in whole for n in group]
    return Encoded(
        rows=[tuple(array[:seq_len] for array in examples[n]) for n in kept],
        lengths=[len(examples[n][0]) for n in kept],
        origins=[origins[n] for n in kept],
        num_cut=sum(len(ids) > seq_len for ids, _ in examples),
        num_skipped=len(groups) - len(whole),
    )


def _parts(example: Example, seq_len: int) -> list[Example]:
    """The example in parts of at most seq_len tokens."""
    starts = range(0, max(1, len(example[0])), seq_len)
    return [tuple(array[start : start + seq_len] for array in example) for start in starts]


def _example(ids: Iterable, trained: Iterable) -> Example:
    return np.array(ids, np.int32), np.array(trained, bool)


def _joined(lines: Sequence[str]) -> str:
    """The lines as one text. A file whose last line does not end is followed by another file."""
    ended = (each if each.endswith(("\n", "\r")) else f"{each}\n" for each in lines[:-1])
    return "".join([*ended, *lines[-1:]])


def _blocks(
    text: str, tokenizer: "transformers.PreTrainedTokenizerBase", seq_len: int
) -> list[Example]:
    (ids,) = tokenizing.encode(tokenizer, [text])
    blocks = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
    return [_example(block, [True] * len(block)) for block in blocks if len(block) > 1]


def _encode_all(
    dataset: Iterable[kinds.Fields],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    eos: int,
    train_on_inputs: bool,
) -> tuple[list[Example], list[chat.Encoded]]:
    """(the examples, those of them that are chats)."""
    kind_of_each = kinds.kinds_of(dataset)
    chats = chat.Encoder(tokenizer)
    found: dict[int, chat.Encoded] = {}
    ready: dict[int, Example] = {}
    texts: list[dict[str, typing.Any]] = []
    problems = {}
    for n, (fields, kind) in enumerate(zip(dataset, kind_of_each, strict=True)):
        if kinds.is_chat(fields, kind):
            try:
                said, num_prompt = _messages(fields, kind)
                if train_on_inputs and (left_out := messages.left_out(said)):
                    raise chat.ChatError(f"{left_out}, which --train-on-inputs would train")
                found[n] = chats.encode(said, fields, num_prompt)
            except chat.ChatError as error:
                problems[kinds.origin(fields)] = str(error)
        elif kind == token_ids.KIND:
            ready[n] = token_ids.read(fields)
        elif kind == ("text",):
            texts.append({"prompt": None, "completion": fields["text"]})
        else:
            prompt, completion = kinds.prompt_and_completion(fields, kind)
            texts.append({"prompt": prompt, "completion": completion})
    if problems:
        raise errors.UserError(
            expected="chats that the tokenizer's chat template renders",
            found=list(problems.values()),
            where=list(problems),
            do="correct these examples or the template, or use prompt and completion instead",
        )
    ready |= {n: (each.ids, each.trained) for n, each in found.items()}
    joined = iter(_encode_texts(texts, tokenizer, eos))
    examples = [ready.get(n) or next(joined) for n in range(len(kind_of_each))]
    if train_on_inputs:
        examples = [(ids, np.ones_like(trained)) for ids, trained in examples]
    return examples, [*found.values()]


def _messages(
    fields: kinds.Fields, kind: tuple[str, ...]
) -> tuple[list[dict[str, typing.Any]], int]:
    """(a chat's messages, how many at its beginning are the prompt)."""
    if kind in kinds.CHATS:
        return messages.with_system(messages.read(fields[kind[0]], kind[0]), fields), 0
    given = [fields[name] for name in kind]
    if all(isinstance(each, str) for each in given):
        given = [messages.in_text(each) for each in given]
    prompt = messages.with_system(messages.read_as("user", given[0], "prompt"), fields)
    return prompt + messages.read_as("assistant", given[1], "completion"), len(prompt)


def _encode_texts(
    texts: Sequence[Mapping[str, typing.Any]],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    eos: int,
) -> Iterator[Example]:
    """The ids of prompt + completion + EOS, of which the prompt is not trained. Without a prompt
    (None) everything is."""
    before = ids_of(tokenizer, [each["prompt"] or "" for each in texts])
    whole = ids_of(tokenizer, [(each["prompt"] or "") + each["completion"] for each in texts])
    for each, prompt_ids, ids in zip(texts, before, whole, strict=True):
        if each["prompt"] is None:
            prompt_ids = []
        # Generation starts from prompt_ids, so training must use exactly these tokens.
        elif ids[: len(prompt_ids)] != prompt_ids:
            ids = prompt_ids + _continuation(each["completion"], tokenizer)
        if len(ids) == len(prompt_ids) or ids[-1] != eos:  # a completion may end with it already
            ids = [*ids, eos]
        trained = len(ids) - len(prompt_ids)
        yield _example(ids, [False] * len(prompt_ids) + [True] * trained)


def ids_of(
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
