"""What runs inside the kernels and is shared by them: one idea a file, each a `triton.jit` function."""
