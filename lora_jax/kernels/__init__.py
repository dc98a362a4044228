"""Operations on arrays, one module or folder each, with an implementation for each platform.

platform, partition and packed say for what device, for which part of a mesh, and on which weight
format they compute. Imports jax only.
"""
