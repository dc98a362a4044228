"""Linear layers in general: how they multiply, by which weight, and how a stack is scanned.

May import `kernels`.
"""
