"""Real gloo ranks for tests: processes started once per session and reused, since importing torch costs seconds.

Not in conftest.py: a spawned process imports this module by its name, and there are several conftests.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import queue
import random
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_START_SECONDS = 240
_CALL_SECONDS = 300


class RankPool:
    """``world_size`` processes in one gloo world; ``run(f, ...)`` calls ``f(*args)`` on each and returns their results.

    ``f`` must be a module-level function. A rank that raises fails the call with its traceback.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._processes: list[mp.process.BaseProcess] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._processes:
            self._start()
        for calls in self._calls:
            calls.put((function, args))
        results: dict[int, Any] = {}
        failures: list[str] = []
        while len(results) + len(failures) < self.world_size:
            try:
                rank, ok, value = self._results.get(timeout=_CALL_SECONDS)
            except queue.Empty:
                failures.append(f"no answer within {_CALL_SECONDS} s")
                break
            if ok:
                results[rank] = value
            else:
                failures.append(f"rank {rank}:\n{value}")
                break  # its peers may wait in a collective for ever
        if failures:
            self.stop()
            pytest.fail("\n".join(failures), pytrace=False)
        return [results[rank] for rank in range(self.world_size)]

    def _start(self) -> None:
        context = mp.get_context("spawn")
        (port,) = free_ports(1)
        self._results = context.Queue()
        self._calls = [context.Queue() for _ in range(self.world_size)]
        self._processes = [
            context.Process(target=_serve, args=(rank, self.world_size, port, self._calls[rank], self._results))
            for rank in range(self.world_size)
        ]
        for process in self._processes:
            process.start()
        try:
            for _ in self._processes:
                self._results.get(timeout=_START_SECONDS)
        except queue.Empty:
            self.stop()  # or the next call would take a rank that is ready at last for its answer
            pytest.fail(f"the ranks did not start within {_START_SECONDS} s", pytrace=False)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the system hands to outgoing connections of other processes."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found


@contextmanager
def world_of_its_own(ports: list[int]) -> Iterator[None]:
    """On a rank: inside, the process group is the caller's to make and to close, at ``ports[0]``; then the pool's is
    put back at ``ports[1]``. Not after an error, which ends the pool: other ranks might never come to meet this one."""
    import torch.distributed as dist

    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(ports[0])
    yield
    os.environ["MASTER_PORT"] = str(ports[1])
    dist.init_process_group("gloo")


def _leave_with_parent() -> None:
    """A test session that is killed must not leave its ranks behind, waiting for calls."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _serve(rank: int, world_size: int, port: int, calls: Any, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    import torch
    import torch.distributed as dist

    import locsgd_dist.trainer  # noqa: F401  what nearly every test imports

    # Collections, of which each shift has one, then pass over the modules.
    gc.freeze()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results.put((rank, True, "ready"))
    while True:
        function, args = calls.get()
        try:
            results.put((rank, True, function(*args)))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))
