"""`jax.nn.dot_product_attention` (jax 0.4.31 to 0.10, layout BTNH), and how to put ours in its place.

Kept: the signature, the ranks and dtypes taken, causal masks and windows that count from the first key, zeros where a
query lies beyond its length, a residual in key's dtype through which no gradient flows (`tilewise.attention` with
`return_lse=True` has it in float32 and with a gradient).

Repaired:

- memory is linear in T + S, forward and backward, and masks are never expanded;
- a row that sees no key is 0 and its residual -inf; in jax it is the mean of all values, masked ones included;
- float64 is float64 throughout; in jax its softmax is computed in float32;
- `bias` and `mask` may have a head axis of K (one entry for each group of query heads), on which jax asserts;
- NaN or infinity in a masked key or value reaches no row that does not see it.

`implementation="cudnn"` is jax's own function, for it is asked for by name; "xla" and None let tilewise choose, and any
other name is that of a kernel of tilewise.
"""

from .attention import dot_product_attention
from .installation import install, sdpa, uninstall

__all__ = ["dot_product_attention", "install", "sdpa", "uninstall"]
