"""What a training job needs, from shapes alone: memory, operations and time, and what XLA plans.

Loads no weights and needs no accelerator. May import `generation`, `optim` and below.
"""
