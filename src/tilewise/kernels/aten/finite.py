"""When results of torch's operators may be kept.

The operators multiply what is masked by zero, so that NaN or infinity in a masked key, value or query reaches rows that
do not see it: 0 * NaN is NaN. What reaches a row that way is never finite. So where a call can hold masked pairs,
results that are finite are right, and others are computed again by a kernel that reads only what is seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import AttentionProblem


def can_leak(problem: AttentionProblem) -> bool:
    """Whether some pair may be masked: by the mask, or by -inf in a bias."""
    return not problem.mask.trivial or bool(problem.bias.dense)


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, when no result can be looked at."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def all_finite(*arrays: Tensor | None) -> bool:
    """Whether every element is finite, in one pass over each; sums that overflow count as not finite."""
    sums = [
        array.sum(dtype=torch.float64 if array.dtype == torch.float64 else torch.float32)
        for array in arrays
        if array is not None
    ]
    return bool(torch.isfinite(torch.stack([total.double() for total in sums])).all())
