"""A tokenizer built like LLaMA's (BOS, dummy space, byte fallback), small enough to read."""

import json
import pathlib

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

_MERGES = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("c", "d"), ("▁", "▁")]
_CHARACTERS = [
    "▁",
    *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!#<>/[]|_'",
]
_PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *("".join(pair) for pair in _MERGES),
    *_CHARACTERS,
]
VOCAB_SIZE = len(_PIECES)
BOS, EOS = 1, 2


def save(folder: pathlib.Path, **config) -> pathlib.Path:
    """Writes tokenizer.json, special_tokens_map.json and tokenizer_config.json (`config` wins)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(_PIECES)},
            _MERGES,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in _PIECES[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {
        **special,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **config}))
    return folder
