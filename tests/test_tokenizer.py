"""Folders → tokenizers, text → ids."""

import base64
import functools
import io
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


SCRIPTS = [*TEXTS, "Здравствуй, мир 12345", "مرحبا हिन्दी 한국어 ไทย", "e\u0301 ﬁ ２ don't\r\n\tI'M"]
LLAMA = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
SYMBOLS = {"user_defined_symbols": ("<|im_start|>", "<|im_end|>")}


@functools.cache
def sentencepiece_model(**how):
    """A SentencePiece model of 340 pieces, as bytes."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = [f"{a}{b}  {b}{a}{a} the cat's {a} mat, {b}" for a in "abcdefgh" for b in "xyzuvw"]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=trained,
        vocab_size=340,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
        **{"model_type": "bpe", "byte_fallback": True, **how},
    )
    return trained.getvalue()


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


@pytest.mark.parametrize("length", [2, "1e30", None])
def test_model_max_length_changes_nothing(folder, length):
    tiny_tokenizer.save(folder, model_max_length=length, chat_template="{{ messages[0].content }}")
    loaded = tokenizer.load(folder)
    assert len(tokenizer.encode(loaded, ["ab cd ab"])[0]) > 2
    assert len(tokenizer.chat_prompt(loaded, "ab cd ab")) > 2
    assert loaded.model_max_length > 10**9  # of which transformers would warn


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
    composite = {"eos_token_id": 8, "text_config": {"eos_token_id": 5}}
    (folder / "config.json").write_text(json.dumps(composite))
    assert tokenizer.eos_ids(loaded, folder) == (7, 2, 9, 8)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 5}}))
    assert tokenizer.eos_ids(loaded, folder) == (5,)
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


@pytest.mark.parametrize(
    "how",
    [
        LLAMA,
        LLAMA | {"add_dummy_prefix": False},
        LLAMA | {"byte_fallback": False},
        LLAMA | SYMBOLS,
        LLAMA | {"control_symbols": ("[INST]", "[/INST]")},
        {"normalization_rule_name": "identity"},
        {},
        LLAMA | {"model_type": "unigram"},
        {"model_type": "unigram", "byte_fallback": False, **SYMBOLS},
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf"},
        LLAMA | {"model_type": "char", "byte_fallback": False},
    ],
    ids=lambda how: "-".join(map(str, how.values())) or "nfkc",
)
def test_sentencepiece_alone_is_converted_exactly(tmp_path, how):
    import sentencepiece

    model = sentencepiece_model(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in how.items()}
    )
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ 1 + 1 }}"})
    )
    loaded = tokenizer.load(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in [*SCRIPTS, "ab  baa the cat's", "gxgx  the  mat", "<|im_start|>ab<|im_end|> cd"]:
        ids = reference.encode(text)
        assert loaded(text).input_ids == [reference.bos_id(), *ids]
        if reference.unk_id() not in ids:
            assert loaded.decode(ids) == reference.decode(ids)
    assert loaded.eos_token_id == reference.eos_id()
    assert loaded.chat_template == "{{ 1 + 1 }}"
    assert [path.name for path in tmp_path.iterdir() if path.name == "tokenizer.json"] == []


def test_sentencepiece_alone_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**LLAMA))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(errors.UserError, match="pip install sentencepiece"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("how", [{"model_type": "word"}, {"treat_whitespace_as_suffix": True}])
def test_other_sentencepiece_models_are_refused(tmp_path, how):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**how))
    with pytest.raises(errors.UserError, match="encodes differently"):
        tokenizer.load(tmp_path)


def vocabulary(folder, model_type, **config):
    """A folder with vocab.json and merges.txt."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    trained.train_from_iterator([*SCRIPTS * 3, "12 123 1234 é"], trainer)
    folder.mkdir(exist_ok=True)
    trained.model.save(str(folder))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


ADDED = {
    str(300 + n): {"content": text, "special": True, "normalized": False}
    for n, text in enumerate(("<|im_start|>", "<|im_end|>"))
}
NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "added_tokens_decoder": ADDED}


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {"tokenizer_class": "GPT2Tokenizer"}),
        ("llama", {"tokenizer_class": "GPT2Tokenizer", **NAMED, "chat_template": "{{ 1 }}"}),
        ("llama", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
        ("qwen2", {}),
        ("qwen3", {"tokenizer_class": "Qwen2Tokenizer", **NAMED, "bos_token": None}),
    ],
)
def test_vocab_and_merges_are_read_as_by_transformers(tmp_path, model_type, config):
    import transformers

    folder = vocabulary(tmp_path, model_type, **config)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    loaded = tokenizer.load(folder)
    for text in [*SCRIPTS, "<|im_start|>user\nab<|im_end|>"]:
        ids = reference(text).input_ids
        assert loaded(text).input_ids == ids
        assert loaded.decode(ids) == reference.decode(ids)
    for name in ("bos_token_id", "eos_token_id", "chat_template"):
        assert getattr(loaded, name) == getattr(reference, name)
    assert len(loaded) == len(reference)


def test_vocab_and_merges_of_an_adapter_are_copied(tmp_path):
    adapter = vocabulary(tmp_path / "adapter", "llama", tokenizer_class="GPT2Tokenizer")
    base = tiny_tokenizer.save(tmp_path / "base")
    assert len(tokenizer.load(base, adapter)) == len(tokenizer.load(adapter)) == 300
    merged = tmp_path / "merged"
    merged.mkdir()
    tokenizer.copy(adapter, merged)
    assert (
        tokenizer.load(merged)("naïve 12").input_ids
        == tokenizer.load(adapter)("naïve 12").input_ids
    )


def test_vocab_and_merges_without_a_class_are_refused(tmp_path):
    for config in ({}, {"tokenizer_class": "LlamaTokenizer"}):
        with pytest.raises(errors.UserError, match='set "tokenizer_class"'):
            tokenizer.load(vocabulary(tmp_path, "llama", **config))
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(errors.UserError, match=r"no merges\.txt"):
        tokenizer.load(tmp_path)


def tekken(folder, **entries):
    """A folder with Mistral's kind of file: 256 bytes, and two tokens more."""
    tokens = [bytes([n]) for n in range(256)] + [b"ab", b" ab"]
    special = [{"rank": n, "token_str": token, "is_control": True}
               for n, token in enumerate(("<unk>", "<s>", "</s>", "[INST]"))]  # fmt: skip
    config = {"pattern": r" ?\p{L}+|\p{N}|\s+|[^\s]", "default_vocab_size": 268,
              "default_num_special_tokens": 10}  # fmt: skip
    vocab = [{"rank": n, "token_bytes": base64.b64encode(token).decode()}
             for n, token in enumerate(tokens)]  # fmt: skip
    raw = {"config": config, "vocab": vocab, "special_tokens": special} | entries
    (folder / "tekken.json").write_text(json.dumps(raw))
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    return folder


def test_tekken_is_read(tmp_path):
    pytest.importorskip("transformers", "5.24", reason="older ones need mistral-common")
    loaded = tokenizer.load(tekken(tmp_path))
    assert loaded("ab ab\n[INST]é").input_ids == [1, 266, 267, 10 + 10, 3, 10 + 0xC3, 10 + 0xA9]
    assert loaded.decode([266, 267, 205, 179], skip_special_tokens=True) == "ab abé"
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"add_bos_token": false, "eos_token": "[INST]"}'
    )
    loaded = tokenizer.load(tmp_path)
    assert loaded("ab").input_ids == [266] and loaded.eos_token_id == 3


def test_files_that_need_a_package_name_it(tmp_path):
    old = tekken(tmp_path)
    raw = json.loads((old / "tekken.json").read_text())
    del raw["special_tokens"]  # of Mistral NeMo's time: the package knows them
    (old / "tekken.json").write_text(json.dumps(raw))
    with pytest.raises(errors.UserError, match="mistral-common"):
        tokenizer.load(old)
    (tmp_path / "tekken.json").unlink()
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # LLaMA 3's
    with pytest.raises(errors.UserError, match="pip install tiktoken"):
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


def test_tokens_are_added_and_saved(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}<|end|>")
    loaded, size = tokenizer.load(folder), tiny_tokenizer.VOCAB_SIZE
    text = "ab<|end|>  word ab"
    assert len(loaded(text).input_ids) > 9
    assert tokenizer.add(loaded, (), (), size) == ()
    ids = tokenizer.add(loaded, ["word"], ["<|end|>"], size - 1)
    assert ids == (size - 1, size, size + 1)  # the last of its own has no row
    found = loaded(text).input_ids
    assert found.count(size) == found.count(size + 1) == 1
    assert loaded.decode(found, skip_special_tokens=True).split() == ["ab", "word", "ab"]

    tokenizer.save(loaded, folder, tmp_path)
    again = tokenizer.load(folder, tmp_path)
    assert tokenizer.missing(tokenizer.load(folder), tmp_path) == ["word", "<|end|>"]
    assert tokenizer.missing(again, tmp_path) == tokenizer.missing(again, folder) == []
    assert again(text).input_ids == found and again.eos_token == loaded.eos_token
    assert again.get_chat_template() == "{{ messages[0].content }}<|end|>"
    import transformers

    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == found
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 2048
    with pytest.raises(errors.UserError, match=rf"'word', which has the id {size}"):
        tokenizer.add(again, ["word"], [], size + 2)


def test_a_tokenizer_without_tokenizer_json_gets_tokens(tmp_path):
    """It is saved as tokenizer.json, which replaces the file it was converted from."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**LLAMA))
    loaded = tokenizer.load(tmp_path)
    (new,) = tokenizer.add(loaded, [], ["<|end|>"], len(loaded))
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapter.mkdir()
    tokenizer.save(loaded, tmp_path, adapter)
    shutil.copytree(tmp_path, merged, ignore=shutil.ignore_patterns("adapter", "merged"))
    tokenizer.copy(adapter, merged)
    for each in (tokenizer.load(tmp_path, adapter), tokenizer.load(merged)):
        assert each("a<|end|> b").input_ids == loaded("a<|end|> b").input_ids
        assert new in each("a<|end|> b").input_ids
    assert not (merged / "tokenizer.model").exists()
