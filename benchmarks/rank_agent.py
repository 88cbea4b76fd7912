"""Starts the ranks of a run, ends the rest of them when one has died, starts all anew: what torchrun's agent does,
without the seconds that each of its processes spends on imports.

The ranks are forked from this process, which has imported everything and computed nothing. Start Python with
``OMP_NUM_THREADS=1``: a process that has threads cannot be forked.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locsgd_dist import train
from locsgd_dist.config import parse_config

GRACE_SECONDS = 1.0
"""Between SIGTERM and SIGKILL for the ranks that outlive one that died; torchrun gives 30."""
PATIENCE = 240.0
"""Seconds after which a launch counts as hanging."""


@dataclass
class Launch:
    """What came of one start of all ranks."""

    exit_codes: list[int]
    """Negative: ended by that signal."""
    notes: list[dict[str, Any]] = field(default_factory=list)
    """What the ranks have said, see :class:`Rank`."""
    seconds: float = 0.0
    hung: bool = False

    @property
    def failed(self) -> bool:
        return self.hung or any(self.exit_codes)


class Rank:
    """Given to ``prepare`` in each rank before it trains: who it is, and how it tells the agent something."""

    def __init__(self, rank: int, world_size: int, attempt: int, channel: socket.socket):
        self.rank, self.world_size, self.attempt = rank, world_size, attempt
        self._channel = channel

    def tell(self, note: dict[str, Any]) -> None:
        """The note is with the agent when this returns, also if the process is killed right after."""
        self._channel.send(json.dumps({"rank": self.rank, "attempt": self.attempt, **note}).encode())


Prepare = Callable[[Rank], None]


def launch(
    flags: Sequence[str],
    *,
    ranks: int,
    log: Path,
    attempt: int = 0,
    restarts: int = 0,
    prepare: Prepare = lambda rank: None,
    kill: tuple[float, int] | None = None,
) -> Launch:
    """Runs the trainer on so many ranks until all of them have ended.

    Args:
        flags: command line of ``locsgd_dist.train``.
        log: receives what the ranks print.
        attempt: the number of this start among those of the run, for the ranks' notes.
        restarts: as torchrun counts them: failures, not starts after a preemption.
        prepare: called in each rank before it trains.
        kill: after so many seconds this rank is killed, if it is still there.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
    environment |= {"LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RESTART_COUNT": str(restarts)}
    start = time.monotonic()
    ready, go = os.pipe()
    pids: list[int] = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.read(ready, 1)  # until all ranks are in one process group
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            _be_a_rank(flags, log, lambda rank=rank: prepare(Rank(rank, ranks, attempt, theirs)))
        pids.append(pid)
        os.setpgid(pid, pids[0])
    os.close(ready)
    os.close(go)
    theirs.close()
    result = _wait(pids, ours, start, kill)
    ours.close()
    return result


def _wait(pids: list[int], channel: socket.socket, start: float, kill: tuple[float, int] | None) -> Launch:
    result = Launch([0] * len(pids))
    running = set(range(len(pids)))
    failed_at: float | None = None
    while running:
        for rank in sorted(running):
            pid, status = os.waitpid(pids[rank], os.WNOHANG)
            if pid:
                running.discard(rank)
                result.exit_codes[rank] = os.waitstatus_to_exitcode(status)
                if result.exit_codes[rank] and failed_at is None:
                    failed_at = time.monotonic()
                    _signal(pids, running, signal.SIGTERM)
        now = time.monotonic()
        if kill is not None and now - start >= kill[0]:
            _signal(pids, running & {kill[1]}, signal.SIGKILL)
            kill = None
        if now - start > PATIENCE and not result.hung:
            result.hung = True
            _signal(pids, running, signal.SIGKILL)
        if failed_at is not None and now - failed_at > GRACE_SECONDS:
            _signal(pids, running, signal.SIGKILL)
        _read(channel, result.notes)
        time.sleep(0.005)
    _read(channel, result.notes)
    result.seconds = time.monotonic() - start
    return result


def _signal(pids: Sequence[int], ranks: set[int], number: int) -> None:
    for rank in ranks:
        os.kill(pids[rank], number)  # not waited for yet: the number is still its own


def _read(channel: socket.socket, notes: list[dict[str, Any]]) -> None:
    with contextlib.suppress(BlockingIOError, ConnectionError):
        while message := channel.recv(1 << 16):
            notes.append(json.loads(message))


def _be_a_rank(flags: Sequence[str], log: Path, prepare: Callable[[], None]) -> None:
    """Trains and ends the process."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        prepare()
        code = train.main(flags)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def import_all(flags: Sequence[str]) -> None:
    """Imports what a run imports on its way, as a short run in a process of its own tells.

    Raises:
        SystemExit: that run failed, or this process has threads.
    """
    parse_config([])  # builds the parser, which takes a second
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder) / "modules"

        def leave_listing_at_the_end(rank: Rank) -> None:
            main = train.main

            def listed(argv: Sequence[str] | None = None) -> int:
                code = main(argv)
                listing.write_text("\n".join(sys.modules))
                return code

            train.main = listed

        log = Path(folder) / "log"
        probe = [*flags, "--train.epochs=2", f"--run.dir={folder}/run"]
        if launch(probe, ranks=1, log=log, prepare=leave_listing_at_the_end).failed:
            raise SystemExit(f"the run that finds out what to import failed:\n{log.read_text()[-3000:]}")
        for name in listing.read_text().splitlines():
            if name not in sys.modules:
                with contextlib.suppress(Exception):  # some are made, not imported
                    importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or each rank's collector would look through all of it, again and again
    if len(os.listdir("/proc/self/task")) > 1:
        raise SystemExit("this process has threads and cannot be forked: start it with OMP_NUM_THREADS=1")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
