"""Models and adapters over HTTP, in OpenAI's protocol.

May import `generation`, `data` and `tokenizer`, `console` and below. Imports no jax: what computes
is the engine, which is passed in.
"""
