"""Machines that share this one's kernel and files: each has a network, a host name and a hosts file of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

NODES = ("node1", "node2")


def missing_for_virtual_hosts() -> str | None:
    """Why there can be none here, or None."""
    for tool in ("ip", "nsenter", "unshare", "mount", "hostname"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    probe = subprocess.run(["unshare", "--net", "--mount", "--uts", "ip", "link", "set", "lo", "up"], check=False)
    return None if probe.returncode == 0 else "making a network namespace needs CAP_NET_ADMIN and CAP_SYS_ADMIN"


class VirtualHosts(AbstractContextManager["VirtualHosts"]):
    """Two hosts, joined by a virtual cable. Nothing of their traffic reaches this machine's own network.

    Args:
        folder: for the hosts file.
    """

    def __init__(self, folder: Path) -> None:
        self._hosts_file = folder / "hosts"
        # No name server: a look-up that the hosts file cannot answer fails at once.
        self._no_resolver = folder / "resolv.conf"
        self._no_resolver.touch()
        # Interface names are limited to 15 characters.
        self._namespaces = {node: f"{node}-{os.getpid()}" for node in NODES}
        addresses = {node: f"10.213.0.{index}" for index, node in enumerate(NODES, start=1)}
        lines = ["127.0.0.1 localhost", *(f"{address} {node}" for node, address in addresses.items())]
        self._hosts_file.write_text("\n".join(lines) + "\n")
        self._addresses = addresses

    def __enter__(self) -> Self:
        for namespace in self._namespaces.values():
            _run("ip", "netns", "add", namespace)
        first, second = self._namespaces.values()
        _run(*f"ip link add eth0 netns {first} type veth peer name eth0 netns {second}".split())
        for node, namespace in self._namespaces.items():
            _run(*f"ip -n {namespace} addr add {self._addresses[node]}/24 dev eth0".split())
            _run(*f"ip -n {namespace} link set lo up".split())
            _run(*f"ip -n {namespace} link set eth0 up".split())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node, namespace in self._namespaces.items():
            self.kill(node)
            subprocess.run(["ip", "netns", "delete", namespace], check=False)

    def on(self, node: str, command: Sequence[str]) -> list[str]:
        """``command`` as it has to be started here to run on ``node``; the process keeps its id through all of it."""
        mounts = 'mount --bind "$1" /etc/hosts && mount --bind "$2" /etc/resolv.conf'
        inside = f'{mounts} && hostname "$3" && shift 3 && exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{self._namespaces[node]}", "unshare", "--mount", "--uts"]
        return [*enter, "sh", "-c", inside, "sh", str(self._hosts_file), str(self._no_resolver), node, *command]

    def kill(self, node: str) -> None:
        """Ends every process of ``node`` at once, as a power cut does."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self._namespaces[node]], check=True, capture_output=True, text=True
        )
        for process in listed.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
