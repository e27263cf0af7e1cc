"""A pytest plugin: the tests run on the compiled module at $TILEWISE_SANITIZED. Used by tools/sanitize.sh."""

import importlib.util
import os
import sys

_spec = importlib.util.spec_from_file_location("tilewise._native", os.environ["TILEWISE_SANITIZED"])
assert _spec and _spec.loader
sys.modules["tilewise._native"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["tilewise._native"])
