"""Where the table of tile sizes spills registers, with the most bytes of stack that a thread may use.

By architecture, width, dtype, kernel, and words of the problem (see `compile_for.py`). What is not here spills nothing,
or, beside the kernels whose tiles the table holds, little.

`shares_kernel`, which works for far rows alone, holds tiles of queries and of the gradient of the output at once.
At width 512 tiles have as few rows as products take. What spills there are mostly the kernels for inputs that are not
finite, which hold two accumulators at once: fewer keys in a tile would have the common ones read queries more often.
"""

SPILLS = {
    ("sm_80", 128, "bfloat16", "d_kv_kernel", "+bias"): 16,
    ("sm_80", 128, "bfloat16", "d_kv_kernel", "+dense"): 24,
    ("sm_80", 256, "bfloat16", "d_q_kernel", "+bias"): 8,
    ("sm_80", 256, "bfloat16", "d_dense_kernel", "+bias"): 16,
    ("sm_80", 256, "bfloat16", "d_table_kernel", "+table+causal"): 8,
    ("sm_80", 256, "bfloat16", "shares_kernel", ""): 272,
    ("sm_80", 256, "bfloat16", "shares_kernel", "+causal"): 304,
    ("sm_80", 256, "bfloat16", "shares_kernel", "+softcap+sinks+causal"): 328,
    ("sm_80", 256, "bfloat16", "shares_kernel", "+labels"): 392,
    ("sm_80", 256, "bfloat16", "decode_kernel", "decode+group64"): 8,
    ("sm_80", 512, "bfloat16", "careful_d_kv_kernel", "+causal"): 160,
    ("sm_80", 512, "bfloat16", "careful_d_kv_kernel", "+table+causal"): 176,
    ("sm_80", 512, "bfloat16", "careful_d_kv_kernel", "+softcap+dense+sinks+dropout+table"): 384,
    ("sm_89", 256, "bfloat16", "d_kv_kernel", "+causal"): 16,
    ("sm_89", 256, "bfloat16", "d_kv_kernel", "+causal+atomics"): 16,
    ("sm_89", 256, "bfloat16", "d_table_kernel", "+table+causal"): 8,
    ("sm_89", 256, "bfloat16", "d_table_kernel", "+softcap+dense+sinks+dropout+table"): 8,
    ("sm_89", 512, "bfloat16", "careful_d_kv_kernel", "+causal"): 1008,
    ("sm_89", 512, "bfloat16", "careful_d_kv_kernel", "+causal+atomics"): 1008,
    ("sm_89", 512, "bfloat16", "careful_d_kv_kernel", "+table+causal"): 864,
    ("sm_89", 512, "bfloat16", "careful_d_kv_kernel", "+softcap+dense+sinks+dropout+table"): 936,
    ("sm_89", 512, "bfloat16", "d_table_kernel", "+table+causal"): 16,
    ("sm_90", 128, "bfloat16", "d_kv_kernel", "+softcap+dense+sinks+dropout+table"): 32,
    ("sm_90", 256, "bfloat16", "forward_kernel", "+causal"): 40,
    ("sm_90", 256, "bfloat16", "forward_kernel", "+labels"): 40,
    ("sm_90", 256, "bfloat16", "d_table_kernel", "+table+causal"): 8,
    ("sm_90", 256, "bfloat16", "d_kv_kernel", "+dropout"): 32,
    ("sm_90", 256, "bfloat16", "d_kv_kernel", "+dropout+causal"): 32,
    ("sm_90", 256, "bfloat16", "d_kv_kernel", "+softcap+dense+sinks+dropout+table"): 56,
    ("sm_90", 256, "bfloat16", "d_table_kernel", "+softcap+dense+sinks+dropout+table"): 16,
    ("sm_90", 256, "bfloat16", "d_kv_kernel", "+dropout+causal+atomics"): 8,
    ("sm_90", 512, "float32", "careful_d_kv_kernel", "+causal"): 168,
    ("sm_100", 128, "bfloat16", "d_kv_kernel", "+softcap+dense+sinks+dropout+table"): 24,
    ("sm_100", 128, "bfloat16", "d_q_kernel", "+causal"): 8,
    ("sm_100", 256, "bfloat16", "d_q_kernel", "+causal"): 8,
    ("sm_100", 256, "bfloat16", "d_table_kernel", "+table+causal"): 56,
    ("sm_100", 512, "bfloat16", "d_kv_kernel", "+table+causal"): 8,
    ("sm_100", 512, "bfloat16", "careful_d_kv_kernel", "+softcap+dense+sinks+dropout+table"): 208,
    ("sm_100", 512, "float32", "careful_d_kv_kernel", "+causal"): 232,
    ("gfx942", 512, "float32", "d_kv_kernel", "+causal"): 772,
    ("gfx942", 512, "float32", "careful_d_kv_kernel", "+causal"): 660,
    ("gfx942", 512, "float32", "d_q_kernel", "+causal"): 632,
    ("gfx942", 512, "float32", "careful_d_q_kernel", "+causal"): 600,
}
