"""What holds for every test: how hard hypothesis searches, and that fresh memory is loud."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Compilation and shared machines make single examples slow without making them wrong.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("default", max_examples=50, **_COMMON)
settings.register_profile("thorough", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("TILEWISE_HYPOTHESIS", "default"))
