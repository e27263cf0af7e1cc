"""Ctrl-C ends a long call of the native kernels, forward, backward and tangents, and leaves the library usable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tilewise._native")

# Each of these calls takes a minute of processor time or far more. Keys of stride 0 make a long axis cost no memory.
_PROGRAM = """
import signal, sys, threading, time
import numpy as np, tilewise as tw
from support.portable_cases import planned
from tilewise.contract import Tangents
from tilewise.kernels.native.backward import backward
from tilewise.kernels.native.tangent import tangent

# A shell ignores SIGINT for what it starts in the background, and Python leaves an ignored signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

small = [np.random.default_rng(n).standard_normal((1, 2, 70, 32)).astype(np.float32) for n in range(3)]
expected = tw.attention(*small, kernel="native").tobytes()

def differentiate(q_len, k_len, dim, **options):
    q, k = (np.zeros((1, 1, length, dim), np.float32) for length in (q_len, k_len))
    plan, operands = planned(q, k, k, kernel="native", tiles=None, **options)
    backward(plan, operands, q, np.zeros((1, 1, q_len), np.float32), q, None)

def attend(q_len, k_len, dim):
    keys = np.broadcast_to(np.float32(0.1), (1, 1, 1, dim)).copy()
    keys = np.broadcast_to(keys, (1, 1, k_len, dim))
    tw.attention(np.zeros((1, 1, q_len, dim), np.float32), keys, keys, kernel="native")

def push(q_len, k_len, dim):
    keys = np.broadcast_to(np.zeros((1, 1, 1, dim), np.float32), (1, 1, k_len, dim))
    q = np.zeros((1, 1, q_len, dim), np.float32)
    plan, operands = planned(q, keys, keys, kernel="native", tiles=None)
    tangent(plan, operands, q, np.zeros((1, 1, q_len), np.float32), Tangents(q, keys, keys))

CALLS = {
    "many items": lambda: attend(300_000, 300_000, 64),
    "one long item": lambda: attend(100, 1 << 33, 8),
    "backward": lambda: differentiate(200_000, 200_000, 64),
    "tangents": lambda: push(300_000, 300_000, 64),
    "tangents of one long item": lambda: push(100, 1 << 33, 8),
    "one long segment": lambda: differentiate(30_000, 300_000, 8, bias=tw.relative(np.zeros(329_999, np.float32))),
}

def interrupt():
    sent.append(time.process_time())
    signal.raise_signal(signal.SIGINT)

for name in sys.argv[1:]:
    sent = []
    threading.Timer(0.3, interrupt).start()
    try:
        CALLS[name]()
    except KeyboardInterrupt:
        print(name, time.process_time() - sent[0], sep=": ", flush=True)
    else:
        sys.exit(name + ": was not interrupted")
    assert tw.attention(*small, kernel="native").tobytes() == expected
"""

_HANDLER = """
import signal, sys, threading, time
import ml_dtypes, numpy as np, tilewise as tw

small, large = (
    [np.random.default_rng(n).standard_normal((1, 2, length, 64)).astype(sys.argv[1]) for n in range(3)]
    for length in (300, 30_000)
)
expected = [tw.attention(*arrays, kernel="native").tobytes() for arrays in (small, large)]
answers = []
signal.signal(signal.SIGUSR1, lambda *_: answers.append(tw.attention(*small, kernel="native").tobytes()))
while not answers:
    threading.Timer(0.02, lambda: signal.raise_signal(signal.SIGUSR1)).start()
    assert tw.attention(*large, kernel="native").tobytes() == expected[1]
assert set(answers) == {expected[0]}
"""


def _run(program: str, *arguments: str) -> str:
    library = Path(__file__).parents[1] / "lib"
    environment = {**os.environ, "TILEWISE_NUM_THREADS": "2", "PYTHONPATH": str(library)}
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_interrupt_ends_the_call() -> None:
    calls = ["many items", "one long item", "backward", "one long segment", "tangents", "tangents of one long item"]
    lines = _run(_PROGRAM, *calls).splitlines()
    assert [line.split(": ")[0] for line in lines] == calls
    # Processor time of all threads from the signal to the exception, so that a busy machine fails no test: two threads
    # that work on for a second would use two.
    assert max(float(line.split(": ")[1]) for line in lines) < 1, lines


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_handler_may_call_the_library_and_return(dtype) -> None:
    # In tile registers too, which are the thread's, as the call that was interrupted left them.
    _run(_HANDLER, dtype)
