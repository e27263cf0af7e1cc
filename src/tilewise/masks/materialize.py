"""The slow, dense picture of a mask: for the reference kernel, tests and eyes."""

from __future__ import annotations

import numpy as np

from .._arrays import to_numpy
from .algebra import Mask
from .lower import LoweredMask
from .site import Site


def materialize(mask: Mask, q_len: int, k_len: int, *, batch: int = 1, heads: int = 1) -> np.ndarray:
    """(batch, heads, q_len, k_len) booleans, each from the mask's element-wise definition; quadratic on purpose.

    This is the other road to the same answer as lowering, so that one can be held against the other.

    Args:
        mask: a mask whose operands are on the host.
        q_len, k_len, batch, heads: Sq, Sk, B and Hq of the call it is for.

    Raises:
        ValueError, TypeError: beginning with "mask:", when an operand does not fit the sizes.
    """
    site = Site(batch, heads, q_len, k_len)
    mask.check(site)
    b, h, i, j = np.ix_(*(np.arange(size) for size in (batch, heads, q_len, k_len)))
    return np.array(np.broadcast_to(mask.visible(site, b, h, i, j), (batch, heads, q_len, k_len)))


def picture(lowered: LoweredMask) -> np.ndarray:
    """(B, Hq, Sq, Sk) booleans from the lowered facts; quadratic."""
    site = lowered.site
    full = (site.batch, site.heads, site.q_len, site.k_len)
    seen = lowered.visible(slice(0, site.q_len), slice(0, site.k_len))
    return np.ones(full, bool) if seen is None else np.broadcast_to(to_numpy(seen), full)
