"""Where the table of tile sizes spills registers, with the most bytes of stack that a thread may use.

By architecture, width, dtype, kernel, and words of the problem (see `compile_for.py`). What is not here spills nothing.
"""

SPILLS = {
    ("sm_80", 256, "bfloat16", "d_q_kernel", "+bias"): 8,
    ("sm_80", 256, "bfloat16", "d_dense_kernel", "+bias"): 16,
    ("sm_80", 256, "bfloat16", "d_table_kernel", "+table+causal"): 8,
    ("sm_89", 128, "bfloat16", "forward_kernel", "+softcap+dense+sinks+dropout+table"): 8,
    ("sm_89", 256, "bfloat16", "d_kv_kernel", "+causal"): 16,
    ("sm_90", 128, "bfloat16", "d_kv_kernel", "+softcap+dense+sinks+dropout+table"): 32,
    ("sm_90", 256, "bfloat16", "forward_kernel", "+causal"): 40,
    ("sm_90", 256, "bfloat16", "forward_kernel", "+labels"): 40,
    ("sm_90", 256, "bfloat16", "d_table_kernel", "+table+causal"): 8,
    ("sm_90", 256, "bfloat16", "d_kv_kernel", "+dropout"): 32,
    ("sm_90", 256, "bfloat16", "d_kv_kernel", "+dropout+causal"): 32,
    ("sm_90", 256, "bfloat16", "d_kv_kernel", "+softcap+dense+sinks+dropout+table"): 56,
    ("sm_90", 256, "bfloat16", "d_table_kernel", "+softcap+dense+sinks+dropout+table"): 16,
    ("sm_90", 256, "bfloat16", "d_kv_kernel", "+dropout+causal+atomics"): 8,
    ("sm_100", 256, "bfloat16", "d_table_kernel", "+table+causal"): 56,
}
