"""Prompts for generation: lines of text, or the prompts of examples, and their ids.

Imports no jax.
"""

import array
import io
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence

from lora_jax import errors
from lora_jax import tokenizer as tokenizing
from lora_jax.data import encoding
from lora_jax.data.chats import chat, messages
from lora_jax.data.chats.template import Message
from lora_jax.data.examples import as_chats, kinds
from lora_jax.data.formats import compression, files, unicode

if typing.TYPE_CHECKING:
    import transformers

Ids = array.array  # of int: a list of ten thousand long prompts would take a gigabyte


class Prompt(typing.NamedTuple):
    """A text, or the messages of a chat.

    origin: where it is from, for messages. fields: the example, whose tools go to the chat
    template.
    """

    value: str | list[Message]
    origin: str
    fields: Mapping[str, typing.Any] = {}

    @property
    def continues(self) -> bool:
        """Whether it is a chat whose last answer is to be continued, as in transformers and TRL."""
        return isinstance(self.value, list) and self.value[-1]["role"] == "assistant"


def read(path: pathlib.Path, *, as_chat: bool = False) -> list[Prompt]:
    """The prompts of a file.

    Of data files (.jsonl, .json, .csv, .parquet, …): prompt of each example, as a text or messages,
    else messages or conversations, instruction and input, or text. Of all other files: each line
    that is not blank.
    as_chat: an instruction becomes what a user says, and not Alpaca's template.

    Raises: UserError with all lines that have no prompt.
    """
    try:
        with _opened(path) as file:
            if not files.is_data(path) or files.form_of(path).family == "text":
                return [*_lines(path, file.read())]
    except compression.ERRORS as error:
        raise errors.UserError(
            expected="a file of prompts",
            found=getattr(error, "strerror", None) or str(error),
            where=str(path),
            do=errors.similar_path(path),
        ) from None
    found, problems = [], {}
    for record in files.read(path):
        origin = f"{path}:{record.number}"
        example = record.example
        doubts = [doubt for name, doubt in record.doubts.items() if name in kinds.FIELDS]
        if isinstance(example, str) or doubts:
            problems[origin] = doubts[0] if doubts else str(example)
            continue
        try:
            found.append(_prompt(example, origin, as_chat))
        except chat.ChatError as error:
            problems[origin] = str(error)
    if problems:
        raise errors.UserError(
            expected="in each example prompt, as a text or messages, or messages, instruction or "
            "text",
            found=[f"{origin}: {problem}" for origin, problem in problems.items()],
            do="correct these lines",
        )
    return found


def encode(
    prompts: Sequence[Prompt],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    *,
    as_chat: bool = False,
) -> list[Ids]:
    """The ids of each prompt, as training has them.

    as_chat: a text is a user's message, as in as_chats.convert. Chats are rendered in the
    tokenizer's chat template, up to where the assistant's answer begins, or goes on.
    Raises: UserError with all prompts that cannot be rendered.
    """
    is_chat = [as_chat or isinstance(each.value, list) for each in prompts]
    if any(is_chat) and not tokenizer.chat_template:
        raise errors.UserError(
            expected="a tokenizer with a chat template",
            found="none",
            do="--chat-template, or a chat model; or omit --chat"
            if as_chat
            else "--chat-template, or a chat model; or use texts",
        )
    tokenizing.check_text([each.value for each in prompts if isinstance(each.value, str)])
    encoder, problems = chat.Encoder(tokenizer), {}
    found: list[Ids | None] = [None] * len(prompts)
    for n, each in enumerate(prompts):
        if not is_chat[n]:
            continue
        try:
            ids = encoder.prompt(
                chat_of(each), each.fields, generate=not each.continues, continues=each.continues
            )
        except chat.ChatError as error:
            problems[each.origin] = str(error)
            continue
        found[n] = array.array("i", ids)
    if problems:
        raise errors.UserError(
            expected="chats that the tokenizer's chat template renders",
            found=[f"{origin}: {problem}" for origin, problem in problems.items()],
            do="correct these prompts, or omit --chat" if as_chat else "correct these prompts",
        )
    texts = [n for n, chatting in enumerate(is_chat) if not chatting]
    every = encoding.ids_of(tokenizer, [typing.cast(str, prompts[n].value) for n in texts])
    for n, ids in zip(texts, every, strict=True):
        found[n] = array.array("i", ids)
    return typing.cast(list[Ids], found)


def _opened(path: pathlib.Path) -> io.BufferedIOBase:
    """A pipe, such as /dev/stdin, can be opened only once, so its compression is unknown."""
    return compression.opened(path) if path.is_file() else path.open("rb")


def _lines(path: pathlib.Path, raw: bytes) -> Iterator[Prompt]:
    try:
        text = raw.decode(unicode.encoding(raw[:4]))
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise errors.UserError(
            expected="a UTF-8 text file with one prompt per line",
            found=str(error),
            where=f"{path}:{number}",
            do="convert it, e.g. iconv -f latin1 -t utf-8",
        ) from None
    for number, line in enumerate(io.StringIO(text, newline=""), start=1):
        if line.strip():
            yield Prompt(line.rstrip("\r\n"), f"{path}:{number}")


def _prompt(example: Mapping[str, typing.Any], origin: str, as_chat: bool) -> Prompt:
    """The prompt of an example. Raises: ChatError if it has none."""
    present = kinds.fields_present(example)
    prompt = messages.in_text(example.get("prompt"))
    if isinstance(prompt, str):
        return Prompt(prompt, origin, example)
    for name in ("prompt", "messages", "conversations"):
        if name in present:
            turns = messages.with_system(messages.read(example[name], name), example)
            return Prompt(turns, origin, example)
    name = next((name for name in ("instruction", "text") if name in present), None)
    if name is None:
        raise chat.ChatError(f"only the fields {', '.join(present) or '(none)'}")
    for field in (name, "input") if name == "instruction" and example.get("input") else (name,):
        if not isinstance(example[field], str):
            raise chat.ChatError(f"{field} is a {type(example[field]).__name__}")
    if name == "text":
        return Prompt(example["text"], origin)
    rendered, _ = kinds.prompt_and_completion({**example, "output": ""}, kinds.ALPACA)
    said = as_chats.user_says(example["instruction"], example.get("input"))
    return Prompt(said if as_chat else rendered, origin, example)


def chat_of(prompt: Prompt) -> list[Message]:
    """The chat of a prompt; of a text, the one that as_chats.convert makes in training."""
    if isinstance(prompt.value, list):
        return prompt.value
    return messages.with_system(as_chats.turns(prompt.fields, prompt.value), prompt.fields)
