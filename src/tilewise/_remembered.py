"""What was found out once, by what it depends on."""

from __future__ import annotations

from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

MOST = 512


class Remembered(dict[Key, Value]):
    """At most `MOST` values by key; the oldest are forgotten. Threads may share it."""

    def keep(self, key: Key, value: Value) -> None:
        """Remember the value under the key."""
        while len(self) >= MOST:
            try:
                self.pop(next(iter(self)), None)
            except (RuntimeError, StopIteration):  # another thread was faster
                continue
        self[key] = value
