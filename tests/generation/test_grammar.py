"""Random tokens that a grammar allows: their text always follows it. And what is refused."""

import json
import pathlib
import re
import sys
import time

import numpy as np
import pytest
import tiny_tokenizer

from lora_jax import assets, errors, tokenizer
from lora_jax.generation import grammar

pytest.importorskip("llguidance", reason="llguidance is not installed")

STORIES = pathlib.Path(__file__).parents[1] / "golden/models/stories260K"
PADDING = 37  # rows of the head beyond the vocabulary
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "kind": {"enum": ["a/b", "é", None, 3]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 40},
                  "minItems": 1, "maxItems": 3},
        "format": {"type": "string", "format": "phone", "maxLength": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Byte-level BPE, and SentencePiece with byte fallback."""
    tiny = tiny_tokenizer.save(tmp_path_factory.mktemp("tiny"))
    folders = {"bytes": assets.FOLDER, "pieces": STORIES, "tiny": tiny}
    readers = {name: tokenizer.load(folder) for name, folder in folders.items()}
    return {
        name: (reader, grammar.Grammar(reader, len(reader) + PADDING, [reader.eos_token_id]))
        for name, reader in readers.items()
    }


def allowed(matcher, num_tokens):
    mask = np.full(-(-num_tokens // 32), -1, np.int32)
    matcher.mask(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def walk(reader, compiled, text, seed, most=400):
    """The text of random tokens that are allowed; None if it is not complete after `most`."""
    random, ids = np.random.default_rng(seed), []
    matcher = compiled.matcher(text)
    while not matcher.finished and len(ids) < most:
        may = allowed(matcher, len(reader) + PADDING)
        assert len(may) and may[-1] < len(reader)
        token = int(random.choice(may))
        assert matcher.accept(token)
        if token == reader.eos_token_id:
            break
        ids.append(token)
    else:
        if not matcher.finished:
            return None
    prompt = reader("Tom", add_special_tokens=False).input_ids
    return tokenizer.continuation(reader, prompt, ids)


@pytest.mark.parametrize("kind", ["bytes", "pieces", "tiny"])
@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{3}-[a-f]{1,4}",
        r"^(yes|no)$",
        r"a/b\/c",
        "x[\n/\\\\]{1,3}y",
        r"é+😀?!",
        r"[A-Z]\s?\w{2}",
    ],
)
def test_random_texts_match_a_regular_expression(readers, kind, pattern):
    texts = [walk(*readers[kind], grammar.regex(pattern), seed) for seed in range(5)]
    complete = [text for text in texts if text is not None]
    assert complete
    assert all(re.fullmatch(pattern, text) for text in complete), complete
    assert "\\d" not in pattern or all(map(str.isascii, complete))


@pytest.mark.parametrize("kind", ["bytes", "pieces", "tiny"])
def test_random_texts_are_valid_by_a_schema(readers, kind):
    found = [walk(*readers[kind], grammar.json_schema(SCHEMA), seed) for seed in range(20)]
    texts = [text for text in found if text is not None]
    assert len(texts) >= 10
    for text in texts:
        value = json.loads(text)
        assert {"name", "kind", "sizes"} <= value.keys() <= {*SCHEMA["properties"]}
        assert 1 <= len(value["name"]) <= 6 and value["kind"] in ("a/b", "é", None, 3)
        assert 1 <= len(value["sizes"]) <= 3
        assert all(type(size) is int and -5 <= size <= 40 for size in value["sizes"])
        assert len(value.get("format", "")) <= 3
    assert len(set(texts)) == len(texts)


def test_random_texts_are_objects(readers):
    found = [walk(*readers["bytes"], grammar.json_object(), seed) for seed in range(20)]
    texts = [text for text in found if text is not None]
    assert texts and all(isinstance(json.loads(text), dict) for text in texts)


def test_a_text_is_one_of_the_choices(readers):
    options = ["yes", 'no "quotes" \\ / \n', "", "naïve 😀"]
    found = {walk(*readers["bytes"], grammar.choice(options), seed) for seed in range(40)}
    assert found == set(options)


def test_a_very_ambiguous_grammar_fails_before_its_tokens_take_long(readers):
    """With llguidance's own limits they take ten times as long."""
    reader, compiled = readers["pieces"]
    matcher = compiled.matcher(grammar.lark("start: x\nx: x x x x | x x x | x x | /[a-z ]/"))
    word, most = reader.convert_tokens_to_ids("▁friend"), 0.0
    with pytest.raises(errors.UserError, match=r"(?s)Current row.*max is 500"):
        while most < 1:
            start = time.thread_time()
            allowed(matcher, len(reader) + PADDING)
            matcher.accept(word)
            most = max(most, time.thread_time() - start)
    assert 0 < most < 0.2


@pytest.mark.parametrize("form", ["{}", 'start: "a" data\ndata: %json {}'])
def test_a_schema_may_have_hundreds_of_optional_properties(readers, form):
    """Each is four items of the parser."""
    reader, compiled = readers["bytes"]
    properties = {f"p{n}": {"type": "integer"} for n in range(400)}
    schema = grammar.schema_text({"type": "object", "properties": properties})
    whole = form == "{}"
    given = grammar.json_schema(json.loads(schema)) if whole else grammar.lark(form.format(schema))
    matcher = compiled.matcher(given)
    for token in reader(f'{"" if whole else "a"}{{"p9":1', add_special_tokens=False).input_ids:
        assert token in allowed(matcher, len(reader) + PADDING)
        matcher.accept(token)


def test_choices_may_be_thousands(readers):
    reader, compiled = readers["bytes"]
    matcher = compiled.matcher(grammar.choice([f"option {number}" for number in range(5000)]))
    for token in reader("option 4711", add_special_tokens=False).input_ids:
        assert token in allowed(matcher, len(reader) + PADDING) and matcher.accept(token)
    assert matcher.accept(reader.eos_token_id)


def test_a_rule_of_lark_may_use_a_schema(readers):
    rules = 'start: "<" name ">" %json {"type": "boolean"}\nname: /[a-c]+/'
    texts = [walk(*readers["tiny"], grammar.lark(rules), seed) for seed in range(5)]
    assert all(re.fullmatch(r"<[a-c]+>(true|false)", text) for text in texts)


def test_eos_is_allowed_where_a_text_may_end_and_only_there(readers):
    reader = readers["bytes"][0]
    compiled = grammar.Grammar(reader, len(reader), [reader.eos_token_id, 5, 99999])
    matcher = compiled.matcher(grammar.regex("aa?"))
    token = reader.convert_tokens_to_ids("a")
    ends = {5, reader.eos_token_id}
    assert not ends & {*allowed(matcher, len(reader)).tolist()} and not matcher.finished
    assert not compiled.matcher(grammar.regex("aa?")).accept(reader.eos_token_id)
    assert matcher.accept(token) and not matcher.finished
    assert {*allowed(matcher, len(reader)).tolist()} == {token, *ends}
    assert matcher.accept(token) and matcher.finished
    assert {*allowed(matcher, len(reader)).tolist()} == ends
    assert matcher.accept(5) and matcher.finished


def test_a_token_that_is_not_allowed_is_not_accepted(readers):
    reader, compiled = readers["bytes"]
    for token in (reader.convert_tokens_to_ids("b"), len(reader) + 1, 10**9):
        assert not compiled.matcher(grammar.regex("a")).accept(token)


def test_requests_with_one_grammar_do_not_disturb_each_other(readers):
    reader, compiled = readers["bytes"]
    one, other = (compiled.matcher(grammar.choice(["ab", "cd"])) for _ in range(2))
    assert one.accept(reader.convert_tokens_to_ids("a"))
    assert other.accept(reader.convert_tokens_to_ids("c"))
    assert one.accept(reader.convert_tokens_to_ids("b")) and one.finished
    assert not other.finished


def test_a_head_with_fewer_rows_than_the_vocabulary_has_no_other_tokens(readers):
    reader = readers["bytes"][0]
    size = len(reader) - 45
    matcher = grammar.Grammar(reader, size, [reader.eos_token_id]).matcher(grammar.regex(r"\w+"))
    assert allowed(matcher, size)[-1] < size


def test_a_row_of_a_batch_is_written_in_place_and_the_others_stay(readers):
    reader, compiled = readers["bytes"]
    batch = np.full((3, -(-(len(reader) + PADDING) // 32)), 7, np.int32)
    compiled.matcher(grammar.regex("a")).mask(batch[1])
    assert (batch[[0, 2]] == 7).all()
    token = reader.convert_tokens_to_ids("a")
    assert batch[1, token // 32] == np.int32(1 << token % 32) and np.count_nonzero(batch[1]) == 1
    with pytest.raises(ValueError, match="int32"):
        compiled.matcher(grammar.regex("a")).mask(batch[1, 1:])


def test_spaces_between_parts_of_json_come_to_an_end(readers):
    reader, compiled = readers["bytes"]
    matcher = compiled.matcher(grammar.json_object())
    assert matcher.accept(reader.convert_tokens_to_ids("{"))
    space, count = reader.convert_tokens_to_ids("Ġ"), 0
    while space in allowed(matcher, len(reader) + PADDING):
        assert matcher.accept(space)
        count += 1
        assert count < 100
    assert count >= 16  # deep indentation


def nested(depth):
    return {"type": "object", "properties": {"a": nested(depth - 1)}} if depth else {}


UNIQUE = {"type": "array", "uniqueItems": True}
AHEAD = {"type": "string", "pattern": r"^(?!^[-+.]*$)\d*$"}  # as pydantic writes a Decimal


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grammar.json_schema({"type": "objct"}), "Invalid type: objct"),
        (lambda: grammar.json_schema(UNIQUE), "uniqueItems"),
        (lambda: grammar.json_schema(AHEAD), "look-around"),
        (lambda: grammar.json_schema({"pattern": "a("}, lenient=True), "unclosed group"),
        (lambda: grammar.json_schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (lambda: grammar.json_schema(False), "nsatisfiable"),
        (lambda: grammar.json_schema([]), "expected: a JSON schema"),
        (lambda: grammar.json_schema({"const": b"a"}), "not JSON serializable"),
        (lambda: grammar.json_schema({"const": "\ud800"}), "surrogate"),
        (lambda: grammar.json_schema(nested(200)), "recursion"),
        (lambda: grammar.regex("a("), "unclosed group"),
        (lambda: grammar.regex(r"(a)\1"), "backreferences are not supported"),
        (lambda: grammar.regex("\ud800"), "surrogate"),
        (lambda: grammar.lark('a: "b"'), "no start rule"),
        (lambda: grammar.lark('start: start "a"'), "NoExtension"),
        (lambda: grammar.lark(" "), "rule `start`"),
        (lambda: grammar.choice([]), "list of texts"),
        (lambda: grammar.choice("abc"), "list of texts"),
        (lambda: grammar.lark("start: " + '"a" ' * 300_000), "1000000 characters"),
        (lambda: "nonsense", "llguidance can compile"),
    ],
)  # fmt: skip
def test_a_bad_grammar_is_refused_with_its_reason(readers, make, message):
    with pytest.raises(errors.UserError) as caught:
        readers["tiny"][1].matcher(make())
    assert message in " ".join(str(caught.value).split())
    assert len(str(caught.value)) < 1000


def test_lenient_schemas_leave_out_what_cannot_be_enforced(readers):
    one_of = {"oneOf": [{"type": "object"}, {"required": ["a"]}]}
    for schema in (UNIQUE, one_of, AHEAD):
        readers["tiny"][1].matcher(grammar.json_schema(schema, lenient=True))


def test_names_of_properties_are_no_keywords(readers):
    schema = {"type": "object", "properties": {"format": {"const": 1}}, "required": ["format"],
              "additionalProperties": False}  # fmt: skip
    text = walk(*readers["bytes"], grammar.json_schema(schema), 0)
    assert json.loads(text) == {"format": 1}
    assert schema["properties"] == {"format": {"const": 1}}


def test_without_llguidance_the_error_says_what_installs_it(monkeypatch, readers):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(errors.UserError, match=r'pip install "lora-jax\[serve\]"'):
        grammar.Grammar(readers["tiny"][0], 10, [2])
    grammar.json_object()  # a setting of a request, which another process may serve
