"""Proof that the kernels of a job compute the right thing on this device, before they are used.

A kernel that fails is left out, see kernels/choice.py. May import `generation` and below.
"""
