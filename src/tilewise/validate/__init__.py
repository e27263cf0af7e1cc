"""Arrays and options become a problem and its operands, or an error that begins with the argument's name.

Everything is checked before any work is done, and nothing the caller owns is changed.
"""

from .arrays import LAYOUTS, Arrays, check_arrays, restore
from .call import Call, mask_operands, prepare, problem_of
from .options import Checked, check_invariance, check_options, check_sinks

__all__ = [
    "LAYOUTS",
    "Arrays",
    "Call",
    "Checked",
    "check_arrays",
    "check_invariance",
    "check_options",
    "check_sinks",
    "mask_operands",
    "prepare",
    "problem_of",
    "restore",
]
