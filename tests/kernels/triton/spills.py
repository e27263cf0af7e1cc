"""Where the table of tile sizes spills registers, with the most bytes of stack that a thread may use.

By architecture, width, dtype, kernel, and words of the problem (see `compile_for.py`). What is not here spills nothing.
"""

SPILLS = {
    ("sm_90", 256, "bfloat16", "forward_kernel", "+causal"): 40,
    ("sm_90", 256, "bfloat16", "forward_kernel", "+labels"): 40,
    ("sm_90", 256, "bfloat16", "d_table_kernel", "+table+causal"): 8,
}
