"""Ours in the place of `jax.nn.dot_product_attention`, for a block or for good.

Whoever looks the function up when it is called gets ours: `flax.nnx` (where there is no dropout), Keras on jax,
`jax.nn` itself. Whoever took it earlier keeps jax's: `from jax.nn import dot_product_attention`, and functions that
`jax.jit` has already traced. `flax.linen` never calls `jax.nn`; give its modules
`attention_fn=tilewise.jax.attention_fn`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import jax

from .attention import dot_product_attention

_NAME = "dot_product_attention"


class _Place:
    """The name in `jax.nn`, and how many want ours there; what stood there before is put back after the last."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._wanted = 0
        self._before = None
        self.installed = False

    def enter(self) -> None:
        with self._lock:
            if not self._wanted:
                self._before = getattr(jax.nn, _NAME)
                setattr(jax.nn, _NAME, dot_product_attention)
            self._wanted += 1

    def leave(self) -> None:
        with self._lock:
            self._wanted -= 1
            if not self._wanted:
                setattr(jax.nn, _NAME, self._before)


_place = _Place()


@contextmanager
def sdpa() -> Iterator[None]:
    """Within the block `jax.nn.dot_product_attention` is ours, in every thread. Blocks may be nested.

    Example:
        with tilewise.jax.sdpa():
            logits = model(tokens)
    """
    _place.enter()
    try:
        yield
    finally:
        _place.leave()


def install() -> None:
    """Put ours in the place of `jax.nn.dot_product_attention`; a second call changes nothing."""
    if not _place.installed:
        _place.installed = True
        _place.enter()


def uninstall() -> None:
    """Undo `install`; without one before, nothing."""
    if _place.installed:
        _place.installed = False
        _place.leave()
