"""A chat template that prints the date, with one date for a whole run. Imports no jax."""

import datetime
import json
import typing

from lora_jax.data.chats import template_source

if typing.TYPE_CHECKING:
    import transformers

_CALL = "strftime_now"


def is_read(tokenizer: "transformers.PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer's chat template prints the date or the time."""
    return any(_CALL in source for source in _sources(tokenizer))


def stop(tokenizer: "transformers.PreTrainedTokenizerBase", time: str) -> None:
    """Makes the chat template print this time, in ISO 8601, instead of the present one.

    Raises: ValueError if it is not such a time.
    """
    now = datetime.datetime.fromisoformat(time)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {
            name: _stopped(source, now) for name, source in tokenizer.chat_template.items()
        }
    elif tokenizer.chat_template:
        tokenizer.chat_template = _stopped(tokenizer.chat_template, now)


def _sources(tokenizer: "transformers.PreTrainedTokenizerBase") -> list[str]:
    source = tokenizer.chat_template or ""
    return list(source.values()) if isinstance(source, dict) else [source]


def _stopped(source: str, now: datetime.datetime) -> str:
    """The template, with its own strftime_now in front that knows the formats it is called with."""
    import jinja2

    if _CALL not in source:
        return source
    tree = template_source.parsed(source)
    formats = {
        call.args[0].value
        for call in (tree.find_all(jinja2.nodes.Call) if tree else ())
        if isinstance(call.node, jinja2.nodes.Name)
        and call.node.name == _CALL
        and len(call.args) == 1
        and isinstance(call.args[0], jinja2.nodes.Const)
    }
    known = {each: now.strftime(each) for each in sorted(formats)}
    macro = (
        f"{{%- macro {_CALL}(format) -%}}{{{{ {json.dumps(known)}[format] }}}}{{%- endmacro -%}}"
    )
    return macro + source if known else source
