"""Attention for GPUs from torch, in Triton: forward and backward for every lowered fact, and keys in pages."""
