"""Masks and biases as values, and their lowering to the few facts that kernels understand."""
