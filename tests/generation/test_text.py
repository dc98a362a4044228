"""Token ids → streamed text, and stop strings."""

import json
import pathlib

import cases
import hypothesis
import pytest
import tiny_tokenizer
from hypothesis import strategies as st

from lora_jax import assets, tokenizer
from lora_jax.generation import text

STORIES = pathlib.Path(__file__).parents[1] / "golden" / "models" / "stories260K"
ADDED = ["<|a b|>", "東", " x", "▁▁y", "é Ġ"]  # with spaces, in no byte alphabet, and both
READERS = ("byte fallback", "no dummy space", "metaspace", "stories", "byte level", "demo")
DECODERS = ("byte fallback", "metaspace", "byte level")  # which the others have too
EACH = [*DECODERS, *cases.long("no dummy space", "stories", "demo")]


def _with_added(source: pathlib.Path, folder: pathlib.Path, decoder: dict | None = None):
    """The tokenizer in `source` with more added tokens, every other one special."""
    config = json.loads((source / "tokenizer.json").read_text())
    tokens = config["added_tokens"]
    first = max([*config["model"]["vocab"].values(), *(each["id"] for each in tokens)]) + 1
    for i, content in enumerate(ADDED):
        tokens.append(
            {"id": first + i, "content": content, "special": i % 2 == 0, "normalized": False,
             "single_word": False, "lstrip": True, "rstrip": True}
        )  # fmt: skip
    config["decoder"] = decoder or config["decoder"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(config))
    return tokenizer.load(folder)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readers")
    tiny = tiny_tokenizer.save(folder / "tiny")
    demo = pathlib.Path(assets.__file__).parent / "demo"
    steps = json.loads((tiny / "tokenizer.json").read_text())["decoder"]["decoders"]
    no_strip = {"type": "Sequence", "decoders": steps[:3]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return {
        "byte fallback": _with_added(tiny, folder / "0"),
        "no dummy space": _with_added(tiny, folder / "1", no_strip),
        "metaspace": _with_added(tiny, folder / "2", metaspace),
        "stories": tokenizer.load(STORIES),
        "byte level": _with_added(demo, folder / "3"),
        "demo": tokenizer.load(demo),
    }


def _sequences(reader) -> st.SearchStrategy[list[int]]:
    """Ids of whole words, of single bytes, of any token, and of none."""
    size = len(reader)
    of = [text.token_bytes(reader, i) for i in range(size)]
    single = [i for i in range(size) if len(of[i]) == 1]
    words = ["東京", " two  words", "naïve\n", "😀😀", "\ufffd", "<s>"]
    whole = [reader(word, add_special_tokens=False).input_ids for word in words]
    one = st.one_of(
        st.sampled_from(single),
        st.integers(0, size + 20),
        st.sampled_from([i for i in single if of[i] >= b"\x80"] or single),
    )
    chunks = st.one_of(st.sampled_from(whole), one.map(lambda id: [id]))
    return st.lists(chunks, max_size=12).map(lambda parts: [id for part in parts for id in part])


def _streamed(reader, prompt, ids, skip=True):
    stream = text.Detokenizer(reader, prompt, skip_special_tokens=skip)
    return [*(stream.push(id) for id in ids), stream.finish()]


@pytest.fixture(scope="module")
def sequences(readers):
    return {name: _sequences(reader) for name, reader in readers.items()}


@pytest.mark.parametrize("name", EACH)
@cases.few()
@hypothesis.given(data=st.data())
def test_the_pieces_are_the_whole_decode(readers, sequences, name, data):
    reader = readers[name]
    prompt, ids = (data.draw(sequences[name]) for _ in range(2))
    skip = data.draw(st.booleans())
    whole = tokenizer.continuation(reader, prompt, ids, skip_special_tokens=skip)
    assert "".join(_streamed(reader, prompt, ids, skip)) == whole
    complete = reader.decode(
        [*prompt, *ids], skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )
    assert complete.endswith(whole)


@pytest.mark.parametrize("name", EACH)
@cases.few()
@hypothesis.given(data=st.data())
def test_what_is_held_is_the_rest_of_the_decode(readers, sequences, name, data):
    reader = readers[name]
    prompt, ids = (data.draw(sequences[name]) for _ in range(2))
    stream, got = text.Detokenizer(reader, prompt), ""
    for n, id in enumerate(ids, 1):
        got += stream.push(id)
        if stream.held:
            assert got + stream.held == tokenizer.continuation(reader, prompt, ids[:n])


def test_clean_up_does_not_change_a_continuation(tmp_path):
    folder = tiny_tokenizer.save(
        tmp_path,
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )
    reader = tokenizer.load(folder)
    ids = reader("ab .", add_special_tokens=False).input_ids
    assert reader.decode(ids) == "ab."
    assert tokenizer.continuation(reader, [], ids) == "".join(_streamed(reader, [], ids)) == "ab ."


def _byte_ids(reader, data: bytes) -> list[int]:
    return [reader.backend_tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]


def test_pieces_come_as_soon_as_they_are_certain(readers):
    reader = readers["byte level"]
    single = {text.token_bytes(reader, i): i for i in range(300)}
    ids = [single[bytes([byte])] for byte in "é😀".encode() + b"\x80\xe6a"]
    assert _streamed(reader, [], ids) == ["", "é", "", "", "", "😀", "\ufffd", "", "\ufffda", ""]
    # A character that begins in the prompt is new as a whole; a broken one is the prompt's.
    assert _streamed(reader, ids[:1], ids[1:2]) == ["é", ""]
    assert _streamed(reader, ids[:1], ids[-1:]) == ["a", ""]

    reader = readers["byte fallback"]
    letter = reader.backend_tokenizer.token_to_id("c")
    ids = [*_byte_ids(reader, "é\n".encode()), letter]
    assert _streamed(reader, [], ids) == ["", "", "", "é\nc", ""]
    broken = _byte_ids(reader, b"\n\xe6a\n")
    assert _streamed(reader, [], broken) == ["", "", "\ufffd" * 3, "\ufffd", ""]
    assert _streamed(reader, [], broken[:2]) == ["", "", "\ufffd" * 2]


def test_the_first_space_depends_on_the_prompt(readers):
    reader = readers["byte fallback"]
    ids = reader("ab ab", add_special_tokens=False).input_ids
    assert "".join(_streamed(reader, [], ids)) == "ab ab"
    assert "".join(_streamed(reader, [tiny_tokenizer.BOS], ids)) == "ab ab"
    assert "".join(_streamed(reader, [tiny_tokenizer.BOS], ids, skip=False)) == " ab ab"
    assert "".join(_streamed(reader, ids, [tiny_tokenizer.EOS, *ids])) == " ab ab"
    assert "".join(_streamed(reader, ids, [tiny_tokenizer.EOS], skip=False)) == "</s>"
    spaces = _byte_ids(reader, b"  ")  # the decoder strips one of these too
    assert "".join(_streamed(reader, [], spaces)) == reader.decode(spaces) == " "
    assert "".join(_streamed(reader, ids, spaces)) == "  "


def test_a_long_run_of_bytes_is_not_held_for_ever(readers):
    reader = readers["byte fallback"]
    pieces = _streamed(reader, [], _byte_ids(reader, "é".encode() * 200))
    assert "".join(pieces) == "é" * 200
    silent = max(map(len, "".join(".x"[bool(piece)] for piece in pieces).split("x")))
    assert silent <= 70


def test_a_token_costs_the_same_at_every_position(readers):
    decoded = []

    class Backend:
        def __getattr__(self, name):
            return getattr(backend, name)

        def decode(self, ids, **settings):
            decoded.append(len(ids))
            return backend.decode(ids, **settings)

    class Reader:
        backend_tokenizer = Backend()

    for name in READERS:
        backend = readers[name].backend_tokenizer
        ids = backend.encode("ab 東 cd" * 50, add_special_tokens=False).ids
        _streamed(Reader(), ids, ids)
    assert max(decoded) <= 2


@pytest.mark.parametrize("name", READERS)
def test_the_bytes_of_tokens_are_the_text(readers, name):
    reader = readers[name]
    for string in ("ab  ab\n", "naïve 東京 😀"):
        if name == "metaspace" and not string.isascii():
            continue  # it has no byte fallback
        if name == "metaspace":
            string = string.strip()
        ids = reader(string, add_special_tokens=False).input_ids
        joined = b"".join(text.token_bytes(reader, id) for id in ids).decode()
        # The added token 東 takes no spaces beside it.
        assert joined.removeprefix(" ").replace(" ", "") == string.replace(" ", "")
    assert text.token_bytes(reader, len(reader) + 5) == b""


def test_the_bytes_of_single_tokens(readers):
    reader = readers["byte fallback"]
    found = {
        token: text.token_bytes(reader, reader.backend_tokenizer.token_to_id(token))
        for token in ("<0xE6>", "<0x0A>", "▁ab", "<|a b|>", "</s>")
    }
    assert found == {
        "<0xE6>": b"\xe6", "<0x0A>": b"\n", "▁ab": b" ab", "<|a b|>": b"<|a b|>", "</s>": b"</s>"
    }  # fmt: skip
    reader = readers["demo"]
    singles = {text.token_bytes(reader, i) for i in range(len(reader))}
    assert {bytes([byte]) for byte in range(256)} <= singles


def _naive(whole: str, stops: list[str]) -> tuple[int, str] | None:
    """(end, stop) of the match that ends first, the longest of several."""
    found = [(whole.find(stop) + len(stop), stop) for stop in stops if stop in whole]
    return min(found, key=lambda each: (each[0], -len(each[1])), default=None)


SHORT = st.text("ab", min_size=1, max_size=4)


@hypothesis.example(["a", "ab"], ["b", "ab"], False)  # both end there: the longest
@hypothesis.given(
    st.lists(st.text("abc", max_size=6), max_size=8),
    st.lists(SHORT, max_size=3),
    st.booleans(),
)
def test_stop_strings_cut_where_a_search_of_the_whole_text_does(pieces, stops, include):
    whole, search = "".join(pieces), text.StopStrings(stops, include=include)
    emitted, matched, seen = "", None, ""
    for piece in pieces:
        out, stop = search.push(piece)
        emitted += out
        matched = matched or stop
        seen += piece
        if not matched:
            beginnings = [stop[:n] for stop in stops for n in range(len(stop))]
            keep = max((len(each) for each in beginnings if seen.endswith(each)), default=0)
            assert emitted == seen[: len(seen) - keep]  # no more is withheld than may match
        assert (_naive(seen, stops) is not None) == (matched is not None)
    emitted += search.finish()
    if expected := _naive(whole, stops):
        end, stop = expected
        assert (emitted, matched) == (whole[: end if include else end - len(stop)], stop)
    else:
        assert (emitted, matched) == (whole, None)


def test_a_stop_string_may_end_in_what_is_held(readers):
    reader = readers["byte fallback"]
    ids = [reader.backend_tokenizer.token_to_id("c"), *_byte_ids(reader, b"\n\n")]
    stream, search = text.Detokenizer(reader, []), text.StopStrings(["\n\n"])
    steps = [search.push(stream.push(id), stream.held) for id in ids]
    assert steps == [("c", None), ("", None), ("", "\n\n")]
    assert search.push("more") == ("", None)
    # What is held and does not match comes again.
    search = text.StopStrings(["xyz"])
    assert search.push("a", "xy") == ("a", None)
    assert search.push("xy") == ("", None)
    assert search.finish() == "xy"
