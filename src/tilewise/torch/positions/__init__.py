"""Positions turned into queries and keys: rotary embedding, and its scalings for longer texts."""
