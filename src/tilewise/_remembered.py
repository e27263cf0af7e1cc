"""What was found out once, by what it depends on."""

from __future__ import annotations

from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

MOST = 512


class Remembered(dict[Key, Value]):
    """At most `most` values by key; the oldest are forgotten. Threads may share it."""

    def __init__(self, most: int = MOST) -> None:
        super().__init__()
        self.most = most

    def keep(self, key: Key, value: Value) -> None:
        """Remember the value under the key."""
        while len(self) >= self.most:
            try:
                self.pop(next(iter(self)), None)
            except (RuntimeError, StopIteration):  # another thread was faster
                continue
        self[key] = value
