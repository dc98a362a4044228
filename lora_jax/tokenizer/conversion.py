"""Tokenizers that have no tokenizer.json → tokenizers.Tokenizer, with the ids that the model saw.

  tokenizer.model            SentencePiece, or tiktoken's list of tokens
  vocab.json and merges.txt  byte-level BPE, as of GPT-2 and Qwen2
  tekken.json                Mistral's

Imports no jax.
"""

import json
import os
import pathlib
import shutil
import tempfile
import typing

from lora_jax import errors

if typing.TYPE_CHECKING:
    import sentencepiece
    import tokenizers

FILES = ("tokenizer.model", "vocab.json", "tekken.json")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
# What two tokenizers are compared with: scripts, forms that normalizers change, spaces.
_PROBE = (
    "Hello  world,\n  naïve 12 tests: x=y; 東京 \t end ", " Здравствуй мир", "مرحبا", "हिन्दी",
    "한국어", "e\u0301 ﬁ ２ ①", "😀👩‍👧 ไทย", "   ", "",
)  # fmt: skip


class Converted(typing.NamedTuple):
    """A tokenizer, and the settings that hold where tokenizer_config.json says nothing."""

    backend: "tokenizers.Tokenizer"
    settings: dict[str, typing.Any]


def convert(folder: pathlib.Path) -> Converted:
    """The tokenizer in the first of FILES that is in a folder.

    Raises: UserError if it cannot be read, a package is missing, or the result would encode text
    differently from the file's own library.
    """
    name = next(name for name in FILES if (folder / name).is_file())
    return {
        "tokenizer.model": _of_model,
        "vocab.json": _of_vocabulary,
        "tekken.json": _of_tekken,
    }[name](folder)


def _of_model(folder: pathlib.Path) -> Converted:
    path = folder / "tokenizer.model"
    if _is_tiktoken(path):
        return _by_transformers(folder, path, do="pip install tiktoken, or copy tokenizer.json")
    try:
        import sentencepiece
    except ImportError as error:
        raise errors.UserError(
            expected="tokenizer.json, or the sentencepiece package to convert tokenizer.model",
            found="tokenizer.model alone, and sentencepiece is not installed",
            where=str(path),
            do="pip install sentencepiece",
        ) from error
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        raise errors.UserError(
            expected="a SentencePiece model",
            found=f"{type(error).__name__}: {error}",
            where=str(path),
            do="copy tokenizer.json of the base model into the folder",
        ) from error
    backend = _bpe(model)
    if not _agrees(backend, model):
        backend = _by_transformers(folder, path, do="copy tokenizer.json").backend
    if not _agrees(backend, model):
        raise errors.UserError(
            expected="a SentencePiece model of type BPE, unigram or char",
            found="another type: the converted tokenizer encodes differently",
            where=str(path),
            do="copy tokenizer.json of the base model into the folder",
        )
    ids = {"unk_token": model.unk_id(), "bos_token": model.bos_id(), "eos_token": model.eos_id()}
    named = {key: model.id_to_piece(i) for key, i in ids.items() if i >= 0}
    return _with_bos(backend, named)


def _agrees(backend: "tokenizers.Tokenizer", model: "sentencepiece.SentencePieceProcessor") -> bool:
    """Whether two tokenizers encode texts alike: the probe, and what the model's own pieces make.

    Of these, the symbols that a user added to the model have the score 0.
    """
    plain = [
        i for i in range(len(model))
        if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i))
    ]  # fmt: skip
    symbols = [model.decode([i]) for i in plain if model.get_score(i) == 0][:8]
    runs = [plain[start : start + 6] for start in range(0, len(plain), max(6, len(plain) // 64))]
    texts = [
        *_PROBE, *map(model.decode, runs), *(f"a{symbol}b {symbol} {symbol}c" for symbol in symbols)
    ]  # fmt: skip
    return all(
        backend.encode(text, add_special_tokens=False).ids == model.encode(text) for text in texts
    )


def _is_tiktoken(path: pathlib.Path) -> bool:
    """Whether a file is a list of tokens in base64, each with its rank, as LLaMA 3's."""
    with path.open("rb") as file:
        words = file.readline(4096).split()
    return len(words) == 2 and words[0].isascii() and words[1].isdigit()


def _of_tekken(folder: pathlib.Path) -> Converted:
    way = "copy tokenizer.json of the base model, or pip install mistral-common"
    backend = _by_transformers(folder, folder / "tekken.json", do=way).backend
    tokens = zip(_NAMED, ("<s>", "</s>", "<unk>", "<pad>"), strict=True)
    named = {name: token for name, token in tokens if backend.token_to_id(token) is not None}
    return _with_bos(backend, named)


def _with_bos(backend: "tokenizers.Tokenizer", named: dict[str, str]) -> Converted:
    """A tokenizer that puts a BOS in front, as LLaMA's and Mistral's do."""
    from tokenizers import processors

    if bos := named.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    return Converted(backend, {"add_bos_token": True, **named})


def _of_vocabulary(folder: pathlib.Path) -> Converted:
    """The tokenizer of the class that tokenizer_config.json names, else of the model type's."""
    if not (folder / "merges.txt").is_file():
        raise errors.UserError(
            expected="vocab.json and merges.txt", found="no merges.txt", where=str(folder),
            do="copy merges.txt or tokenizer.json of the base model into the folder",
        )  # fmt: skip
    way = 'set "tokenizer_class" in tokenizer_config.json to that of the base model, such as '
    way += '"GPT2Tokenizer" or "Qwen2Tokenizer", or copy its tokenizer.json'
    converted = _by_transformers(folder, folder / "vocab.json", do=way)
    words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocabulary = converted.backend.get_vocab()
    if any(vocabulary.get(word) != i for word, i in words.items()):
        raise errors.UserError(
            expected="a class of tokenizers that reads vocab.json and merges.txt",
            found="another", where=str(folder), do=way,
        )  # fmt: skip
    return converted


def _by_transformers(folder: pathlib.Path, path: pathlib.Path, *, do: str) -> Converted:
    """The tokenizer as transformers converts it from one file, and its named tokens.

    do: what the error says if it cannot.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    read = transformers.PreTrainedTokenizerFast
    names = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", path.name]
    if path.name == "vocab.json":
        read, names = transformers.AutoTokenizer, [*names, "merges.txt", "config.json"]
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            for name in names:
                if (folder / name).is_file():
                    shutil.copy(folder / name, pathlib.Path(temporary) / name)
            found = read.from_pretrained(temporary, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the Rust library raises bare Exceptions
        raise errors.UserError(
            expected="a tokenizer that transformers reads",
            found=f"{type(error).__name__}: {' '.join(str(error).split())}",
            where=str(path),
            do=do,
        ) from error
    finally:
        transformers.logging.set_verbosity(before)
    named = {name: getattr(found, name) for name in _NAMED}
    vocabulary = found.get_vocab()
    return Converted(
        found.backend_tokenizer,
        {name: token for name, token in named.items() if token in vocabulary},
    )


def _bpe(model: "sentencepiece.SentencePieceProcessor") -> "tokenizers.Tokenizer":
    """A SentencePiece BPE model without a text normalizer, as LLaMA's.

    Every split of a piece into two pieces is a merge, in the order of the pieces' scores. The
    normalizer adds the dummy space and replaces spaces, as SentencePiece does (transformers 5.23's
    converter adds no dummy space before a leading space).
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers

    pieces = {model.id_to_piece(i): i for i in range(len(model))}
    merges = []
    for piece, i in pieces.items():
        if model.is_control(i) or model.is_byte(i) or model.is_unknown(i):
            continue
        splits = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        splits = [(a, b) for a, b in splits if a in pieces and b in pieces]
        splits.sort(key=lambda ab: (pieces[ab[0]], pieces[ab[1]]))
        merges += [(model.get_score(i), ab) for ab in splits]
    merges.sort(key=lambda scored: -scored[0])  # stable: equal scores keep the order of the pieces

    unk = model.id_to_piece(model.unk_id())
    backend = tokenizers.Tokenizer(
        models.BPE(
            pieces, [ab for _, ab in merges], unk_token=unk, fuse_unk=True, byte_fallback=True
        )
    )
    dummy = model.normalize("a") != "a"
    collapses = "▁▁" not in model.normalize("a  b")
    squeeze = [
        normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""),
        normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
    ]
    backend.normalizer = normalizers.Sequence(
        squeeze * collapses + [normalizers.Prepend("▁")] * dummy + [normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * dummy
    )
    special = [p for p, i in pieces.items() if model.is_control(i) or model.is_unknown(i)]
    backend.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in special])
    return backend
