"""The masks that cuDNN knows by name, as keywords of `jax.nn.dot_product_attention`."""

from __future__ import annotations

import re
from typing import Any

from ...problem import AttentionProblem

# The causal mask whose diagonal begins at the first key, alone or with a window to the left.
_CAUSAL = re.compile(r'causal\((?P<align>"start")?\)(?: & window\((?P<left>\d+), (?:0|None)(?:, "start")?\))?')


def keywords(problem: AttentionProblem) -> dict[str, Any] | None:
    """The keywords that stand for the problem's mask, or None where cuDNN has no name for it."""
    mask = problem.mask
    if mask.text == "none":
        return {}
    found = _CAUSAL.fullmatch(mask.text)
    if not found or mask.labels or mask.bits or mask.batch or mask.heads:
        return None
    if found["left"] is None:
        return {"is_causal": True}
    return {"is_causal": True, "local_window_size": (int(found["left"]), 0)}
