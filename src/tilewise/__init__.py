"""tilewise: exact attention for NumPy, PyTorch and JAX; one call, one mask language, any length in linear memory."""

from ._api import attention, explain
from .contract import Dropout, Plan
from .environment import warn as _warn_of_environment
from .errors import KernelRefused, PeerLost, QuadraticMemory, TilewiseError
from .kernels.state import merge
from .masks.algebra import Mask
from .masks.biases import Bias, alibi, relative, t5
from .masks.draw import draw
from .masks.materialize import materialize
from .masks.primitives import blocks, causal, dense, documents, intervals, lengths, predicate, prefix, window
from .threads import get_num_threads, set_num_threads
from .version import __version__

__all__ = [
    "Bias",
    "Dropout",
    "KernelRefused",
    "Mask",
    "PeerLost",
    "Plan",
    "QuadraticMemory",
    "TilewiseError",
    "__version__",
    "alibi",
    "attention",
    "blocks",
    "causal",
    "dense",
    "documents",
    "draw",
    "explain",
    "get_num_threads",
    "intervals",
    "lengths",
    "materialize",
    "merge",
    "predicate",
    "prefix",
    "relative",
    "set_num_threads",
    "t5",
    "window",
]

_warn_of_environment()
