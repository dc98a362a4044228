"""What a linear layer is: how it multiplies, by which weight, and how a stack of layers is scanned.

May import `kernels`.
"""
