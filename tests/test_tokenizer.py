"""Folders → tokenizers, text → ids."""

import json
import shutil
import sys

import pytest
import tiny_tokenizer

from lora_jax import errors, tokenizer

TEXTS = ["ab ab", "  two  spaces\n\n  and a line ", " x", "naïve 東京 😀", "a\tb", "cd.", "   "]


@pytest.fixture
def folder(tmp_path):
    return tiny_tokenizer.save(tmp_path / "model")


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A SentencePiece BPE model trained as LLaMA's was: byte fallback, spaces kept."""
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("spm") / "tokenizer"
    words = [f"{a}{b}  {b}{a}{a} the cat's {a} mat, {b}" for a in "abcdefgh" for b in "xyzuvw"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(path),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return path.with_suffix(".model")


def test_tokenizer_json_is_read_as_it_is(folder):
    import tokenizers

    loaded = tokenizer.load(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        # transformers' LlamaTokenizer, which the config names, encodes "  two" differently.
        assert loaded(text).input_ids == backend.encode(text).ids
        assert loaded.decode(loaded(text).input_ids[1:]) == text
    assert (loaded.bos_token_id, loaded.eos_token_id) == (tiny_tokenizer.BOS, tiny_tokenizer.EOS)


def test_tokenizer_config_is_respected(folder):
    tiny_tokenizer.save(folder, add_bos_token=False, chat_template="{{ messages[0].content }}")
    loaded = tokenizer.load(folder)
    assert tiny_tokenizer.BOS not in loaded("ab").input_ids
    chat = [{"role": "user", "content": "ab"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == "ab"
    (folder / "chat_template.jinja").write_text("from the file")
    assert tokenizer.load(folder).apply_chat_template(chat, tokenize=False) == "from the file"


def test_code_in_the_folder_does_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('executed')\nclass Evil: pass\n")
    tiny_tokenizer.save(folder, auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    assert tokenizer.load(folder)("ab").input_ids[0] == tiny_tokenizer.BOS


def test_encode_adds_one_bos_and_no_eos(folder):
    bos, eos = tiny_tokenizer.BOS, tiny_tokenizer.EOS
    tiny_tokenizer.save(folder, add_eos_token=True)
    loaded = tokenizer.load(folder)
    assert loaded("ab").input_ids[-1] == eos  # what encode must undo
    plain, marked, empty = tokenizer.encode(loaded, ["ab cd", "<s>ab cd", ""])
    assert plain.count(bos) == marked.count(bos) == 1
    assert plain[0] == marked[0] == bos
    assert eos not in plain
    assert empty == [bos]
    assert tokenizer.encode(loaded, []) == []

    without = tokenizer.load(tiny_tokenizer.save(folder, add_bos_token=False))
    assert tokenizer.encode(without, ["ab cd"]) == [plain[1:]]


def test_eos_ids_are_collected(folder):
    loaded = tokenizer.load(folder)
    assert tokenizer.eos_ids(loaded, folder) == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 9]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 8}))
    assert tokenizer.eos_ids(loaded, folder) == (2, 7, 9, 8)
    loaded.eos_token = None
    assert tokenizer.eos_ids(loaded, folder) == (7, 2, 9, 8)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text("{}")
    with pytest.raises(errors.UserError, match="eos_token"):
        tokenizer.eos_ids(loaded, folder)


@pytest.mark.parametrize(
    "given, expected",
    [("</s>", (2,)), (["</s>", "<unk>"], (2, 0)), (7.0, (2, 7)), ("not a token", (2,))],
)
def test_eos_ids_may_be_texts_of_tokens(folder, given, expected):
    (folder / "config.json").write_text("\ufeff" + json.dumps({"eos_token_id": given}))
    assert tokenizer.eos_ids(tokenizer.load(folder), folder) == expected


@pytest.mark.parametrize("given", [2.5, {}, [[2]], float("nan")])
def test_an_eos_id_that_is_none_is_named(folder, given):
    (folder / "config.json").write_text(json.dumps({"eos_token_id": given}))
    with pytest.raises(errors.UserError, match="eos_token_id"):
        tokenizer.eos_ids(tokenizer.load(folder), folder)


def test_sentencepiece_alone_is_converted_exactly(sentencepiece_model, tmp_path):
    import sentencepiece

    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ 1 + 1 }}"})
    )
    loaded = tokenizer.load(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    for text in [*TEXTS, "ab  baa the cat's", "gxgx  the  mat"]:
        assert loaded(text).input_ids == [reference.bos_id(), *reference.encode(text)]
        assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text
    assert loaded.eos_token_id == reference.eos_id()
    assert loaded.chat_template == "{{ 1 + 1 }}"
    assert [path.name for path in tmp_path.iterdir() if path.name == "tokenizer.json"] == []


def test_sentencepiece_alone_without_the_package(sentencepiece_model, tmp_path, monkeypatch):
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(errors.UserError, match="pip install sentencepiece"):
        tokenizer.load(tmp_path)


def test_other_sentencepiece_models_are_refused(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the {a}{b} cat" for a in "abcdefgh" for b in "xyzuvw"]),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="unigram",
        vocab_size=24,
        minloglevel=2,
    )
    with pytest.raises(errors.UserError, match="BPE"):
        tokenizer.load(tmp_path)


def test_missing_and_broken_tokenizers(tmp_path):
    with pytest.raises(errors.UserError, match=r"tokenizer\.json or tokenizer\.model"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.UserError, match=str(tmp_path)):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(errors.UserError, match="git lfs pull"):
        tokenizer.load(tmp_path)


def test_text_that_is_not_unicode_is_reported(folder):
    with pytest.raises(errors.UserError, match="UTF-8"):
        tokenizer.encode(tokenizer.load(folder), ["ab", "caf\udce9"])


@pytest.mark.parametrize("text", ["[" * 10**5, "{", "\udcff", "[]", "null"])
def test_a_json_file_that_cannot_be_read_is_named(folder, text):
    path = folder / "generation_config.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(errors.UserError, match="a JSON object") as error:
        tokenizer.eos_ids(tokenizer.load(folder), folder)
    assert error.value.where == str(path)
