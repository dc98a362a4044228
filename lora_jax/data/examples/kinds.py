"""The kinds of examples, by their fields, and the prompt and completion of one.

  messages, or conversations      a chat; the loss is on the assistant's turns
  prompt, completion              strings: joined as they are; the loss is on completion + EOS;
                                  message lists: a chat; the loss is on completion's answers
  instruction, [input,] output    Alpaca's template; the loss is on output + EOS
  text                            the loss is on everything, EOS included
  input_ids                       tokens, with labels or masks that say which are trained

An example is of the first kind whose fields are all present. For DPO it is a preference instead:
chosen and rejected, and the prompt if these do not begin with it; strings or message lists. The
prompt may also be messages, conversations, or instruction with input. With a chat, system is its
system message, and tools and chat_template_kwargs go to the chat template.
"""

import typing
from collections.abc import Iterable, Mapping

from lora_jax import errors
from lora_jax.data.chats import messages
from lora_jax.data.examples import token_ids

ALPACA = ("instruction", "output")
KINDS = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ALPACA,
    ("text",),
    token_ids.KIND,
)
PREFERENCE = ("prompt", "chosen", "rejected")
CHATS = (("messages",), ("conversations",))
BESIDE_CHATS = ("system", "tools", "chat_template_kwargs")
BESIDE = ("input", *BESIDE_CHATS, *token_ids.BESIDE)
PROMPTS = ("prompt", "messages", "conversations", "instruction")  # of a preference; one of them
FIELDS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output",
          "text", "chosen", "rejected", *token_ids.KIND, *BESIDE_CHATS)  # fmt: skip
NAMED = (*FIELDS, *token_ids.BESIDE)  # the fields that columns may be mapped to
# Of LLaMA-Factory's rows. Without its turns, the answer would be to another question.
HISTORY = "a history of turns, which --as-chat puts into the chat template"
# The field that says where an example is from ("train.jsonl:17"), for messages. Not content.
ORIGIN = "_origin"

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

Fields = Mapping[str, typing.Any]


def kinds_of(examples: Iterable[Fields]) -> list[tuple[str, ...]]:
    """The kind of each example.

    Raises: UserError with all examples that are of no kind, whose fields are not strings, or that
    have a history beside texts.
    """
    kinds, found, where = [], [], []
    for example in examples:
        kind = kind_of(example)
        kinds.append(kind)
        wrong = [] if is_chat(example, kind) else _wrong(example, kind)
        if not kind or wrong:
            found.append(
                ", ".join(wrong)
                or f"only the fields {', '.join(map(_shown, fields_present(example))) or '(none)'}"
            )
            where.append(origin(example))
    if found:
        known = ", or ".join(" + ".join(kind) for kind in KINDS)
        raise errors.UserError(
            expected=f"in each example the fields of {known}",
            found=found,
            where=where,
            do="train on preferences with --dpo"
            if all("chosen, rejected" in fields for fields in found)
            else "correct these examples, or map their fields, e.g. --columns "
            "prompt=question,completion=answer",
        )
    return kinds


def _shown(name: str) -> str:
    """A field's name; in quotes if it has spaces around it, as behind commas in a CSV file."""
    return name if name == name.strip() else repr(name)


def used(example: Fields) -> set[str]:
    """The fields of an example that are trained on or go to the chat template."""
    kind = kind_of(example)
    beside = {ALPACA: ("input",), token_ids.KIND: token_ids.BESIDE}.get(kind, ())
    return {*kind, *(BESIDE_CHATS if is_chat(example, kind) else beside)}


def kind_of(example: Fields) -> tuple[str, ...]:
    """The kind of an example; () if it is of none."""
    present = set(fields_present(example))
    return next((kind for kind in KINDS if present.issuperset(kind)), ())


def is_chat(example: Fields, kind: tuple[str, ...]) -> bool:
    """Whether an example is made of messages. Of prompt and completion both may be JSON text."""
    if kind != ("prompt", "completion"):
        return kind in CHATS
    values = [example[field] for field in kind]
    return any(isinstance(each, list) for each in values) or not any(
        messages.in_text(each) is each for each in values
    )


def _wrong(example: Fields, kind: tuple[str, ...]) -> list[str]:
    """What is wrong with token ids; of texts, the fields that are no strings, and a history."""
    if kind == token_ids.KIND:
        return token_ids.problems(example)
    optional = ("input",) if kind == ALPACA and example.get("input") else ()
    wrong = [
        f"{field} is a {type(example[field]).__name__}"
        for field in (*kind, *optional)
        if not isinstance(example[field], str)
    ]
    return wrong or ([HISTORY] if kind not in ((), ("text",)) and history(example) else [])


def history(example: Fields) -> list[typing.Any]:
    """The turns before, of rows as LLaMA-Factory has them; [] without a list of them."""
    found = messages.parsed(example.get("history"))
    return found if isinstance(found, list) else []


def prompt_and_completion(example: Fields, kind: tuple[str, ...]) -> tuple[str, str]:
    """(prompt, completion) of an example that is neither a text nor a chat."""
    if kind == ("prompt", "completion"):
        return example["prompt"], example["completion"]
    template = ALPACA_INPUT if example.get("input") else ALPACA_NO_INPUT
    return template.format_map(example), example["output"]


def fields_present(example: Fields) -> list[str]:
    """The names of the fields that have a value."""
    return [name for name, value in example.items() if value is not None and name != ORIGIN]


def origin(example: Fields) -> str:
    """Where an example is from, for messages."""
    return example.get(ORIGIN, "an example built in memory")
