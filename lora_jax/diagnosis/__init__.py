"""What a machine has, what JAX says about it, and what is wrong with the installation.

`system` reads, `problems` judges. JAX is only asked in a process of its own, because it may abort
or hang. May import no other room.
"""
