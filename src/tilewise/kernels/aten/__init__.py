"""torch's own fused attention operators, where they compute exactly what was asked for."""
