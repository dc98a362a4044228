"""Tokens of a request → pieces, and where they end."""

import pytest
import tiny_tokenizer

from lora_jax import tokenizer
from lora_jax.generation import config, output, request


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return tokenizer.load(tiny_tokenizer.save(tmp_path_factory.mktemp("reader")))


def pieces(reader, tokens, **how):
    """The pieces of these tokens, to the last one."""
    ids = [token if isinstance(token, int) else reader.convert_tokens_to_ids(token)
           for token in tokens]  # fmt: skip
    asked = request.Request((1,), config.Sampling(**how), {})
    own, found = output.Output(asked, reader, (tiny_tokenizer.EOS,)), []
    for id_ in ids:
        found.append(own.push(id_))
        if found[-1].finish_reason:
            break
    return found


def ended(reader, tokens, **how):
    """(text, finish_reason, stop_reason, number of tokens)"""
    found = pieces(reader, tokens, **how)
    text = "".join(piece.text for piece in found)
    return text, found[-1].finish_reason, found[-1].stop_reason, len(found)


def test_a_stop_string_in_bytes_that_are_not_certain_stops_at_its_token(reader):
    newlines = ["a", "<0x0A>", "<0x0A>", "<0x0A>", "b"]
    assert ended(reader, newlines, stop=("\n",)) == ("a", "stop", "\n", 2)
    assert ended(reader, newlines, stop=("\n\n",)) == ("a", "stop", "\n\n", 3)


def test_text_withheld_for_a_stop_string_precedes_the_stop_token(reader):
    how = {"stop": ("cdx",), "include_stop": True, "skip_special_tokens": False}
    assert ended(reader, ["c", "d", "</s>"], **how) == ("cd</s>", "stop", None, 3)
    assert ended(reader, ["c", "d", "</s>"], stop=("cdx",)) == ("cd", "stop", None, 3)
    assert ended(reader, ["c", "d"], stop=("cdx",), max_new_tokens=2) == ("cd", "length", None, 2)


def test_the_last_token_may_complete_a_stop_string(reader):
    assert ended(reader, ["a", "c", "d"], stop=("cd",), max_new_tokens=3) == ("a", "stop", "cd", 3)


def test_stop_tokens(reader):
    assert ended(reader, ["a", "</s>"]) == ("a", "stop", None, 2)
    assert ended(reader, ["a", "</s>", "b"], ignore_eos=True, max_new_tokens=3) == (
        "ab", "length", None, 3,
    )  # fmt: skip
    b = reader.convert_tokens_to_ids("b")
    assert ended(reader, ["a", "b"], stop_token_ids=(b,)) == ("a", "stop", b, 2)
    assert ended(reader, ["b", "a", "b"], stop_token_ids=(b,), min_tokens=2)[1:] == ("stop", b, 3)


def test_before_min_tokens_stop_strings_do_not_count(reader):
    assert ended(reader, ["a", "b", "a"], stop=("a",), min_tokens=2) == ("ab", "stop", "a", 3)


def test_a_request_that_ends_from_outside_gives_what_was_withheld(reader):
    asked = request.Request((1,), config.Sampling(stop=("cdx",)), {})
    own = output.Output(asked, reader, ())
    own.push(reader.convert_tokens_to_ids("c"))
    assert own.end("abort") == request.Piece("c", finish_reason="abort")
