"""The sizes of published models. Imports nothing."""

MODELS = {  # name: (vocab, hidden, ffn, layers, heads, kv heads, tied)
    "Llama-3.2-1B": (128256, 2048, 8192, 16, 32, 8, True),
    "Llama-3.2-3B": (128256, 3072, 8192, 28, 24, 8, True),
    "Llama-2-7B": (32000, 4096, 11008, 32, 32, 32, False),
    "Llama-3.1-8B": (128256, 4096, 14336, 32, 32, 8, False),
    "Llama-2-13B": (32000, 5120, 13824, 40, 40, 40, False),
    "Llama-3.1-70B": (128256, 8192, 28672, 80, 64, 8, False),
}
