"""`torch.nn.functional.scaled_dot_product_attention` (torch 2.5 to 2.13), and ours in its place.

Layout (…, H, L, E); a boolean mask's True means "attend", a float mask is added to the scores; causal is top-left.

Kept: the strict signature, the ranks and the broadcasting of torch's math path, autocast, the generator of dropout.
Repaired: a row that sees nothing is 0 (torch: 0 or NaN, by backend); what is masked out never shows, NaN and inf
included; lengths of key and value that differ raise on every path; a float mask of any broadcast shape has a gradient;
every derivative of any order, and all of it in memory linear in L + S.
"""

from .attention import scaled_dot_product_attention
from .installation import install, sdpa, uninstall

__all__ = ["install", "scaled_dot_product_attention", "sdpa", "uninstall"]
