"""Arrays in, arrays out: one module or folder for each operation, with its form for each platform.

Imports jax alone.
"""
