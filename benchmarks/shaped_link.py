"""Ranks of this machine behind links of a given rate, as ranks of a cluster are (needs root, ip and tc)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack

PORT = 29577


def run_ranks(arguments: Sequence[str], ranks: int, mbps: float | None) -> None:
    """Runs ``python ARGUMENTS`` as each of so many ranks, one thread each, and waits for their end.

    Args:
        mbps: of each rank's link, in each direction, in a network namespace of its own; None: the loopback device.

    Raises:
        SystemExit: a rank failed.
    """
    with ExitStack() as stack:
        namespaces = stack.enter_context(_Namespaces(ranks, mbps)) if mbps else None
        processes = []
        for rank in range(ranks):
            prefix = ["ip", "netns", "exec", namespaces.names[rank]] if namespaces else []
            environ = {
                **os.environ,
                "MASTER_ADDR": "10.77.0.1" if namespaces else "127.0.0.1",
                "MASTER_PORT": str(PORT),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "OMP_NUM_THREADS": "1",
            }
            if namespaces:
                environ["GLOO_SOCKET_IFNAME"] = "eth0"
            processes.append(subprocess.Popen([*prefix, sys.executable, *arguments], env=environ))
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")


class _Namespaces:
    """One network namespace per rank on a bridge of their own, each behind a link of ``mbps`` in both directions."""

    def __init__(self, ranks: int, mbps: float):
        self.names = [f"locsgd-bench{rank}" for rank in range(ranks)]
        self.hub = "locsgd-bench-hub"
        self._mbps = mbps

    def __enter__(self) -> _Namespaces:
        self.__exit__()
        _ip("netns", "add", self.hub)
        _inside(self.hub, "ip", "link", "add", "bridge0", "type", "bridge")
        _inside(self.hub, "ip", "link", "set", "bridge0", "up")
        for rank, name in enumerate(self.names):
            _ip("netns", "add", name)
            _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", f"port{rank}", "netns", self.hub)
            _inside(name, "ip", "link", "set", "lo", "up")
            _inside(name, "ip", "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
            _inside(name, "ip", "link", "set", "eth0", "up")
            _inside(self.hub, "ip", "link", "set", f"port{rank}", "master", "bridge0", "up")
            for namespace, device in ((name, "eth0"), (self.hub, f"port{rank}")):
                # A bucket of 4 ms at that rate keeps bursts from passing unshaped.
                burst = max(16_000, int(self._mbps * 1e6 / 8 * 0.004))
                shape = ("tbf", "rate", f"{self._mbps}mbit", "burst", str(burst), "latency", "400ms")
                _inside(namespace, "tc", "qdisc", "add", "dev", device, "root", *shape)
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*self.names, self.hub]:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _inside(namespace: str, *command: str) -> None:
    subprocess.run(["ip", "netns", "exec", namespace, *command], check=True)
