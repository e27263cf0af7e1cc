"""Where tilewise plugs into libraries built on jax: flax and equinox."""
