"""The compiled module, internal and untyped here; `native/bind/module.cpp` documents its functions."""

from typing import Any

def __getattr__(name: str) -> Any: ...
