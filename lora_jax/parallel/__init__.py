"""Devices, meshes with their sharding rules, and runs of several processes.

May import `kernels`, `models`, `quant`.
"""
