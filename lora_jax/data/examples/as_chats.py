"""Examples of texts → chats of a user and an assistant. Imports no jax."""

from collections.abc import Iterable

from lora_jax import errors
from lora_jax.data.chats import messages
from lora_jax.data.chats.template import ChatError, Message
from lora_jax.data.examples import kinds, preferences

_KEPT = (*kinds.BESIDE_CHATS, kinds.ORIGIN)


def convert(examples: Iterable[kinds.Fields], *, in_pairs: bool) -> list[kinds.Fields]:
    """The examples, with those of a prompt or an instruction as chats; others stay what they are.

    The user says the prompt, or the instruction and, on a line of its own, the input. `history`
    has earlier turns as [[user, assistant], …], as LLaMA-Factory writes them; their answers are
    trained as well. in_pairs: the examples are preferences, whose prompt becomes a chat.

    Raises: UserError with all examples whose history is something else.
    """
    found, problems = [], {}
    for example in examples:
        try:
            found.append(_chat(example, in_pairs=in_pairs))
        except ChatError as error:
            problems[kinds.origin(example)] = str(error)
    if problems:
        raise errors.UserError(
            expected="a history of turns, each [what the user says, the answer]",
            found=list(problems.values()),
            where=list(problems),
            do="correct these examples, or write them as messages",
        )
    return found


def used(example: kinds.Fields, *, in_pairs: bool) -> set[str]:
    """The fields of an example that are trained on or go to the chat template."""
    if names := _texts(example, in_pairs=in_pairs):
        of_alpaca = ("input",) if names[0] == "instruction" else ()
        of_turns = ("history",) if kinds.history(example) else ()
        return {*names, *of_alpaca, *of_turns, *kinds.BESIDE_CHATS}
    return preferences.used(example) if in_pairs else kinds.used(example)


def turns(example: kinds.Fields, said: str) -> list[Message]:
    """The turns of an example up to an answer: its history, and what the user says then.

    Raises: ChatError if the history is not one.
    """
    return [*_history(example), {"role": "user", "content": said}]


def user_says(instruction: str, given: str | None) -> str:
    """What the user says of an instruction and its input."""
    return f"{instruction}\n{given}" if given else instruction


def _chat(example: kinds.Fields, *, in_pairs: bool) -> kinds.Fields:
    names = _texts(example, in_pairs=in_pairs)
    if not names:
        return example
    said = example[names[0]]
    if names[0] == "instruction":
        said = user_says(said, example.get("input"))
    before = turns(example, said)
    kept = {name: example[name] for name in _KEPT if name in example}
    if in_pairs:
        return {**kept, "prompt": before, **{name: example[name] for name in names[1:]}}
    return {**kept, "messages": [*before, {"role": "assistant", "content": example[names[1]]}]}


def _texts(example: kinds.Fields, *, in_pairs: bool) -> tuple[str, ...]:
    """The fields of an example's prompt and answers, if they are texts; () of another example."""
    names = kinds.kind_of(example)
    if in_pairs:
        names = (preferences.source(example), "chosen", "rejected")
    if not names or names[0] not in ("prompt", "instruction"):
        return ()
    values = [example.get(name) for name in names]
    if names[0] == "instruction":
        values.append(example.get("input") or "")
    # Messages may be JSON text, as in CSV files.
    are_texts = all(isinstance(each, str) and messages.in_text(each) is each for each in values)
    return names if are_texts else ()


def _history(example: kinds.Fields) -> list[Message]:
    said: list[Message] = []
    for turn in kinds.history(example):
        if not (isinstance(turn, list) and [*map(type, turn)] == [str, str]):
            raise ChatError(f"a history with the turn {str(turn)[:60]}")
        said += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return said
