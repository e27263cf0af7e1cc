"""Measuring on the user's own machine: ours and every installed peer, in one process, beside the machine's limits."""
