"""cuDNN's attention as jax.nn reaches it, on NVIDIA GPUs; asked for by name, and not yet run on a GPU from here."""
