"""Random chats in random templates: the ids are the template's, and the answers are trained.

A template is written twice: for jinja, and as a function that also says whose a character is.
"""

import typing

import hypothesis
import numpy as np
import pytest
import tiny_tokenizer
from hypothesis import strategies as st

from lora_jax import errors, tokenizer
from lora_jax.data import encoding
from lora_jax.data.examples import kinds, preferences

FRAGMENTS = [
    "</s>",
    "<|user|>",
    "[assistant]",
    "assistant",
    "<think>",
    "</think>",
    "user: ",
    "\n\n",
]
TEXT = st.lists(
    st.text(max_size=6) | st.sampled_from(FRAGMENTS) | st.sampled_from(["yes", "4", "a b", "?"]),
    max_size=4,
).map("".join)


class Layout(typing.NamedTuple):
    """What a template writes around the messages."""

    before: str
    header: str  # with ROLE in it
    space: str  # behind the header of an answer
    closing: str
    end: str  # of the chat
    trims: bool
    thinks: bool  # an empty block, in the last answer only

    def source(self) -> str:
        def quoted(text: str) -> str:
            return "'" + text.replace("\n", "\\n") + "'"

        header = quoted(self.header).replace("ROLE", "' + m.role + '")
        content = "(m.content | trim)" if self.trims else "m.content"
        think = f"{{% if loop.last %}}{{{{ {quoted('<think></think>')} }}}}{{% endif %}}"
        prompt = quoted(self.header.replace("ROLE", "assistant"))
        return (
            f"{{{{ {quoted(self.before)} }}}}{{% for m in messages %}}{{{{ {header} }}}}"
            f"{{% if m.role == 'assistant' %}}{{{{ {quoted(self.space)} }}}}"
            f"{think if self.thinks else ''}{{% endif %}}"
            f"{{{{ {content} + {quoted(self.closing)} }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}"
            f"{{% else %}}{{{{ {quoted(self.end)} }}}}{{% endif %}}"
        )

    def rendered(self, chat: list[dict[str, str]]) -> tuple[str, str]:
        """(text, for each character: A if it must be trained, . if it must not, ? if it may)."""
        text, whose = self.before, "." * len(self.before)
        for n, message in enumerate(chat):
            content = message["content"].strip() if self.trims else message["content"]
            answers = message["role"] == "assistant"
            think = "<think></think>" if self.thinks and answers and n + 1 == len(chat) else ""
            header = self.header.replace("ROLE", message["role"])
            space = self.space if answers else ""
            text += header + space + think + content + self.closing
            # An answer that has no letter is not found, and nor is its border of white space.
            mark = "A" if any(map(str.isalnum, content)) else "?"
            said = "".join(mark if not c.isspace() else "?" for c in content)
            closed = mark * len(self.closing.rstrip())
            whose += "." * len(header)
            whose += "?" * len(space + think) + said if answers else "." * len(content)
            whose += (closed.ljust(len(self.closing), "?")) if answers else "." * len(self.closing)
        end = "?" if chat[-1]["role"] == "assistant" else "."
        return text + self.end, whose + end * len(self.end)


LAYOUTS = st.builds(
    Layout,
    before=st.sampled_from(["", "<s>", "system: be brief\n"]),
    header=st.sampled_from(["<|ROLE|>\n", "[ROLE]", "ROLE: ", "### ROLE\n", "<s>ROLE\n"]),
    space=st.sampled_from(["", " "]),
    closing=st.sampled_from(["</s>", "<end>\n", "</s>\n", "\n\n"]),
    end=st.sampled_from(["", "</s>"]),
    trims=st.booleans(),
    thinks=st.booleans(),
)
CHATS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": TEXT}
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer.load(tiny_tokenizer.save(tmp_path_factory.mktemp("tokenizer")))


@hypothesis.given(LAYOUTS, CHATS)
def test_exactly_the_answers_are_trained(tok, layout, chat):
    tok.chat_template = layout.source()
    text, whose = layout.rendered(chat)
    try:
        (example,) = encoding.encode([{"messages": chat}], tok, 10_000, 2).rows
    except errors.UserError as error:  # no answer with a letter
        assert "A" not in whose and "a token to train on" in str(error)
        return
    ids, trained = example
    assert ids.tolist() == tok.apply_chat_template(chat, return_dict=True)["input_ids"]
    offsets = tok(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    for (start, end), is_trained in zip(offsets, trained.tolist(), strict=True):
        marks = set(whose[start:end])
        if marks and marks <= {"A"}:
            assert is_trained, (text, text[start:end], start)
        if marks and marks <= {"."}:
            assert not is_trained, (text, text[start:end], start)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "tool_calls", "function_call", "weight",
                     "name", "reasoning_content"]),
    st.sampled_from(["user", "assistant", "gpt", "function_call"]) | JSON
    | st.just([{"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}])
    | st.just([{"type": "text", "text": "ab"}]),
    max_size=4,
)  # fmt: skip
ROWS = st.dictionaries(
    st.sampled_from(["messages", "conversations", "prompt", "completion", "chosen", "rejected",
                     "tools", "chat_template_kwargs", "text", "system", "instruction", "input",
                     "preferred_output", "non_preferred_output"]),
    st.lists(MESSAGE, max_size=3) | MESSAGE | JSON,
    max_size=4,
)  # fmt: skip


@hypothesis.given(ROWS, st.booleans())
def test_any_row_is_encoded_or_one_error(tok, row, in_pairs):
    tok.chat_template = Layout("", "[ROLE]", "", "</s>", "", True, False).source()
    encode = encoding.encode_pairs if in_pairs else encoding.encode
    used = preferences.used if in_pairs else kinds.used
    assert all(isinstance(name, str) for name in used(row))
    try:
        encoded = encode([row], tok, 10_000, 2)
    except errors.UserError:
        return
    for ids, trained in encoded.rows:
        assert ids.dtype == np.int32 and trained.dtype == bool and trained[1:].any()
