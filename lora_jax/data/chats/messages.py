"""Messages as people write them → messages as chat templates read them. Imports no jax.

Takes OpenAI's, TRL's and axolotl's {role, content} and ShareGPT's {from, value}.
"""

import ast
import json
import re
import typing
from collections.abc import Mapping, Sequence

from lora_jax.data.chats import colors
from lora_jax.data.chats.template import ChatError, Message

_ROLES = (
    dict.fromkeys(("human", "prompter"), "user")
    | dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "chatbot", "model", "ai"),
                    "assistant")
    | dict.fromkeys(("observation", "tool_response", "tool_result", "function_response",
                     "function_result"), "tool")
)  # fmt: skip
_CALLS = ("function_call", "tool_call")  # roles of ShareGPT and ms-swift, whose content is a call
_WEIGHTS = ("weight", "loss_weight", "train", "training")  # OpenAI, LLaMA-Factory, axolotl
_LOSS = "loss"  # ms-swift's, true or false; a number is what somebody measured
_MEDIA = re.compile("(input_)?(image|audio|video|file)")  # types of parts
_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})  # of a message
SYSTEM = ("system", "developer")
KNOWN = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def read(value: object, field: str = "messages") -> list[Message]:
    """The messages of a field, with role and content. JSON text is parsed.

    Raises: ChatError if they are not a list of messages with a role and text.
    """
    value = _python(parsed(value))
    if not isinstance(value, list):
        found = "text that is not JSON" if isinstance(value, str) else f"a {type(value).__name__}"
        raise ChatError(f"{field} is {found}, not a list of messages")
    if not value:
        raise ChatError(f"{field} is empty")
    return [_message(each, f"message {n} of {field}") for n, each in enumerate(value, start=1)]


def with_system(chat: list[Message], fields: Mapping[str, typing.Any]) -> list[Message]:
    """The chat, begun by the text in the field `system` unless it has a system message itself."""
    system = fields.get("system")
    own = bool(chat) and chat[0]["role"] in SYSTEM
    if own or not isinstance(system, str) or not system.strip():
        return chat
    return [{"role": "system", "content": system}, *chat]


def role_of(message: Mapping[str, typing.Any]) -> str:
    """The role of a message as it is written, in OpenAI's words; "" if it has none."""
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        return ""
    lower = role.strip().lower()
    return _ROLES.get(lower, lower if lower in KNOWN else role)


def read_as(role: str, value: object, field: str) -> list[Message]:
    """The messages of a field that may also be the text of one message with this role."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return read(value, field)


def parsed(value: object) -> object:
    """JSON text, as CSV files have it, as what it stands for; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _python(value: object) -> object:
    """Messages as Python prints them, and so pandas' to_csv, as what they stand for; anything else
    as it is. numpy leaves the commas between them out."""
    if not isinstance(value, str) or not re.match(r"\s*\[\s*\{\s*'", value):
        return value
    try:
        return ast.literal_eval(re.sub(r"\}\s*\n\s*\{", "}, {", value.strip()))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return value


def tools(value: object) -> list[typing.Any]:
    """The tools of an example: a list of objects, or one; each may be JSON text.

    Raises: ChatError if they are something else.
    """
    value = parsed(value)
    if not value or (isinstance(value, str) and not value.strip()):
        return []
    found = [parsed(tool) for tool in (value if isinstance(value, list) else [value])]
    if not all(isinstance(tool, Mapping) for tool in found):
        raise ChatError("tools is not a list of objects")
    return found


def in_text(value: object) -> object:
    """Messages that are written as text, as CSV files have them; anything else as it is."""
    found = _python(parsed(value)) if isinstance(value, str) else None
    are_messages = isinstance(found, list) and all(
        isinstance(each, dict) and any(each.keys() >= keys for keys in _KEYS) for each in found
    )
    return found if found and are_messages else value


def is_trained(message: Message) -> bool:
    """Whether an assistant's message is to be trained: unless it has weight 0 or train false."""
    return message["role"] == "assistant" and all(_weights(message))


def left_out(messages: Sequence[Message]) -> str:
    """Which answer of a chat is not to be trained; "" if there is none."""
    return next((f"message {n} has weight 0" for n, message in enumerate(messages, start=1)
                 if message["role"] == "assistant" and not is_trained(message)), "")  # fmt: skip


def _weights(value: Mapping[str, typing.Any]) -> list[float]:
    """What a message or a part of it says about its share in the loss."""
    given = [value.get(name) for name in _WEIGHTS]
    loss = [value[_LOSS]] if isinstance(value.get(_LOSS), bool) else []
    return [each for each in given if isinstance(each, bool | int | float)] + loss


def _text_as_weight(message: Message) -> str:
    """A weight that is written as text, such as "0", which would count as none; "" without one."""
    texts = (f"{name} {message[name]!r}" for name in _WEIGHTS
             if isinstance(message.get(name), str))  # fmt: skip
    return next(texts, "")


def _message(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise ChatError(f"{where} is a {type(value).__name__}, not an object with role and content")
    message = {name: each for name, each in value.items() if each is not None}
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    message["role"] = role_of(message)
    if not message["role"].strip():
        raise ChatError(f"{where} has no role")
    if message["role"] in _CALLS:  # in place of an assistant's message
        message |= {"role": "assistant", "function_call": message.pop("content", None)}
    if "function_call" in message and "tool_calls" not in message:  # of OpenAI before tools
        message["tool_calls"] = message.pop("function_call")
    if detail := message.keys() & {"train_detail", "training_detail"}:
        raise ChatError(f"{where} has {detail.pop()}, parts of it that are not trained")
    if message["role"] == "assistant" and (text := _text_as_weight(message)):
        raise ChatError(f"{where} has {text}, which is text")
    if message["role"] == "assistant" and not {*_weights(message)} <= {0, 1}:
        raise ChatError(f"{where} has a weight that is neither 0 nor 1")
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], where)
        if not message["tool_calls"]:
            del message["tool_calls"]
    content = message.get("content")
    if isinstance(content, list) and not _is_data(message["role"], content):
        own = own_part if message["role"] == "assistant" else _text
        wrong = [part for part in content if _text(part) is None and not own(part)]
        if wrong:
            part = wrong[0]
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ChatError(f"{where} has a part that is no text: {kind}")
        parts = [part for part in content if isinstance(part, Mapping)]
        if is_trained(message) and any(each != 1 for part in parts for each in _weights(part)):
            raise ChatError(f"{where} has a part that is not trained, not the whole message")
        message["content"] = [
            {"type": "text", **part, "text": _text(part)}
            if isinstance(part, Mapping) and not own_part(part)
            else part
            for part in content
        ]
    elif not isinstance(content, str | None) and message["role"] not in colors.TOOLS:
        raise ChatError(f"the content of {where} is a {type(content).__name__}, not text")
    if content is None and not message.keys() & {"tool_calls", "reasoning_content"}:
        raise ChatError(f"{where} has no content")
    return message


def _is_data(role: str, content: list[typing.Any]) -> bool:
    """Whether a list is what a tool answered, not parts of a message: texts, images and so on."""
    if role not in colors.TOOLS:
        return False
    parts = [part for part in content if isinstance(part, Mapping)]
    # Of {"text": …, "score": …}, a part would lose the score.
    texts = [
        part for part in parts if _text(part) is not None and ("type" in part or len(part) == 1)
    ]
    has_media = any(_MEDIA.match(str(part.get("type"))) for part in parts)
    return not (has_media or 0 < len(texts) == len(content))


def _calls(value: object, where: str) -> list[typing.Any]:
    value = parsed(value)
    if isinstance(value, str) and not value.strip():  # an empty cell
        return []
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list) or not all(isinstance(call, Mapping) for call in value):
        raise ChatError(f"tool_calls of {where} is not a list of objects")
    for call in value:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ChatError(f"a tool call of {where} has no function with a name")
    return [{name: each for name, each in call.items() if each is not None} for call in value]


def _text(part: object) -> str | None:
    """The text of a part of a message's content; None if it is something else, such as an image."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") in colors.TEXTS:
        given = (part.get(name) for name in ("text", "content", "value"))
        return next((text for text in given if isinstance(text, str)), None)
    return None


def own_part(part: object) -> Message:
    """The field of a message that stands for a part with reasoning or a tool call.

    {"reasoning_content": text} or {"tool_calls": [call]}; {} of another part. LLaMA-Factory writes
    both so, Anthropic only reasoning.
    """
    if not isinstance(part, Mapping):
        return {}
    kind = part.get("type")
    if kind in ("reasoning", "thinking"):
        given = [part.get(name) for name in ("value", "text", "content", kind)]
        texts = (text_of({"content": each}) for each in given if isinstance(each, str | list))
        return {"reasoning_content": next(texts, "")}
    call = parsed(part.get("value")) if kind == "tool_call" else None
    if isinstance(call, Mapping) and isinstance(call.get("name"), str):
        return {"tool_calls": [{"type": "function", "function": {**call}}]}
    return {}


def text_of(message: Message) -> str:
    """The text of a message, of all its parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(_text(part) or "" for part in content)
