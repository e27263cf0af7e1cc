"""Processes of torch.distributed that stay for many cases: starting them takes longer than all that they do.

They are forked from one process that has imported what they need, so the imports are paid once.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 120  # seconds until a silent rank fails a test


class Ranks:
    """`count` processes in one gloo group over a file.

    Args:
        folder: for the file by which they find one another; timeout: of the group, in seconds.
    """

    def __init__(self, count: int, folder: Path, timeout: float = TIMEOUT) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "tilewise.torch.distributed", "support.ranks"])
        self._pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            arguments = (rank, count, str(folder / "store"), timeout, theirs)
            self.processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self._pipes.append(ours)
        for process in self.processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What function(*args) returns on each rank; it must be importable there.

        Raises:
            AssertionError: with the tracebacks of the ranks that raised.
        """
        answers = self.answers(function, *args)
        raised = [f"rank {rank}: {text}" for rank, (good, text) in enumerate(answers) if not good]
        assert not raised, "\n".join(raised)
        return [value for _, value in answers]

    def answers(self, function: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """For each rank whether it returned, and what: else the traceback. A dead rank has (False, "gone")."""
        for pipe in self._pipes:
            pipe.send((function, args))
        found: list[tuple[bool, Any]] = [(False, "gone")] * len(self._pipes)
        waiting = dict(zip(self._pipes, range(len(self._pipes)), strict=True))
        while waiting:
            ready = wait(list(waiting), TIMEOUT)
            if not ready:
                raise AssertionError(f"ranks {sorted(waiting.values())} did not answer within {TIMEOUT} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                with suppress(EOFError):
                    found[rank] = pipe.recv()
        return found

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _serve(rank: int, count: int, store: str, timeout: float, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method="file://" + store, rank=rank, world_size=count, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
