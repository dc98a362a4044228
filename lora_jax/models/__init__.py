"""LLaMA and its relatives as plain Flax NNX models, and their config.json.

May import `kernels`, `layers`.
"""
