"""Attention for GPUs from torch, in Triton: forward and a deterministic backward for every lowered fact."""
