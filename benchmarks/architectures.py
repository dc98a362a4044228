"""The sizes of published models. Imports nothing."""

MODELS = {  # name: (vocab, hidden, ffn, layers, heads, kv heads, tied)
    "Llama-3.2-1B": (128256, 2048, 8192, 16, 32, 8, True),
    "Llama-3.2-3B": (128256, 3072, 8192, 28, 24, 8, True),
    "Llama-2-7B": (32000, 4096, 11008, 32, 32, 32, False),
    "Llama-3.1-8B": (128256, 4096, 14336, 32, 32, 8, False),
    "Llama-2-13B": (32000, 5120, 13824, 40, 40, 40, False),
    "Llama-3.1-70B": (128256, 8192, 28672, 80, 64, 8, False),
}
_GEMMA = {"model_type": "gemma3_text", "query_pre_attn_scalar": 256}
RELATIVES = {  # name: config.json; all have tied heads
    "Gemma 3 1B": _GEMMA | {
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
        "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
        "sliding_window": 512,
    },
    "Gemma 3 12B": _GEMMA | {
        "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360,
        "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8,
        "sliding_window": 1024,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
}  # fmt: skip
