"""The compiled kernel for CPUs; its source is `native/` at the top of the repository."""
