"""Devices, the mesh with its sharding rules, and runs of several processes.

May import `kernels`, `models`, `quant`.
"""
