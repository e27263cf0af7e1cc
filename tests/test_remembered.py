"""The bounded memory of calls."""

from __future__ import annotations

import threading

from tilewise._remembered import MOST, Remembered


def test_the_oldest_are_forgotten() -> None:
    found: Remembered[int, int] = Remembered()
    for n in range(MOST + 3):
        found.keep(n, -n)
    assert len(found) == MOST
    assert found.get(2) is None and found.get(3) == -3 and found.get(MOST + 2) == -MOST - 2
    few: Remembered[int, int] = Remembered(2)
    for n in range(3):
        few.keep(n, n)
    assert list(few) == [1, 2]


def test_threads_share_it() -> None:
    found: Remembered[tuple[int, int], int] = Remembered()
    failures: list[BaseException] = []

    def fill(thread: int) -> None:
        try:
            for n in range(20 * MOST):
                found.keep((thread, n), n)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=fill, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(found) <= MOST + len(threads)
