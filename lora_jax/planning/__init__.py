"""What a job takes before it starts: memory, operations, time; and what XLA makes of its programs.

May import `generation`, `optim` and below. Needs no weights and no accelerator.
"""
