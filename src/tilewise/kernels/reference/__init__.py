"""The oracle: the definition, written plainly, dense, in float64."""
