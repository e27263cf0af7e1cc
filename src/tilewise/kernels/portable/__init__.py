"""Everything everywhere in linear memory: one body for NumPy and torch (below), and a scan for jax (`jax_scan.py`).

`walk.py` finds the tiles that some row sees, `local.py` says what is computed in one, `tiled_sum.py` adds them up.
"""
