"""tilewise for jax: masks, biases and dropout as pytrees, and the door behind `tilewise.attention` for jax arrays."""
