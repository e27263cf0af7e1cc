"""Times cases with the tilewise found in a folder: `python worker.py FOLDER`, one case per line, answers likewise.

Runs as a program of its own, so that it can serve another revision; it asks of it what every revision has.
"""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any


def main(folder: str) -> None:
    """Read requests until the end: {"load": file, "mask": text, "dtype": name, "training": bool} or {"run": true}."""
    # An editable install finds its package before any folder is looked into.
    kept = [finder for finder in sys.meta_path if not re.search("Editable|ScikitBuild", type(finder).__name__)]
    sys.meta_path[:] = kept
    sys.path.insert(0, folder)
    import numpy as np
    import torch

    import tilewise

    assert tilewise.__file__ is not None and tilewise.__file__.startswith(folder), tilewise.__file__
    run: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "load" in asked:
            held = np.load(asked["load"])
            tensors = [torch.from_numpy(held[name]).to(getattr(torch, asked["dtype"])) for name in ("q", "k", "v")]
            operand = torch.from_numpy(held["operand"]) if "operand" in held else None
            mask = eval(asked["mask"], {**vars(tilewise), "operand": operand})
            run = _prepared(torch, tilewise.attention, tensors, mask, asked["training"])
            run()
        begin = time.perf_counter()
        run()
        print(json.dumps(time.perf_counter() - begin), flush=True)


def _prepared(torch: Any, attention: Any, tensors: list[Any], mask: Any, training: bool) -> Any:
    if not training:
        return lambda: attention(*tensors, mask=mask)
    leaves = [x.requires_grad_() for x in tensors]
    return lambda: torch.autograd.grad(attention(*leaves, mask=mask).float().sum(), leaves)


if __name__ == "__main__":
    main(sys.argv[1])
