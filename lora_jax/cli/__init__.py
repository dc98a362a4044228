"""The command `lora-jax`: one module for each verb.

May import everything else. jax is imported only when a verb runs.
"""
