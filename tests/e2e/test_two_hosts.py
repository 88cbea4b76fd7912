"""Two hosts of two ranks each, over a network of their own: one loses its power and comes back."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import environment, events, metrics
from virtual_hosts import NODES, VirtualHosts, missing_for_virtual_hosts

LOCAL = Path(__file__).parents[2] / "launch" / "local.sh"
EPOCHS = 3
TRAIN = 240
# Each of the four ranks reads 60 images an epoch. Those of the host that dies read no further than into the third.
WAIT_AT = 130


@pytest.fixture
def hosts(tmp_path: Path):
    reason = missing_for_virtual_hosts()
    if reason is not None:
        pytest.skip(reason)
    with VirtualHosts(tmp_path) as hosts:
        yield hosts


def test_a_host_dies_comes_back_and_the_run_ends_right(hosts: VirtualHosts, tmp_path: Path):
    rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint={NODES[0]}:29400", "--rdzv-id=two-hosts")
    # The survivors' ranks wait for peers that are gone; torchrun would give them 30 s to leave by themselves.
    rendezvous += ("--shutdown-timeout=5",)
    command = [
        *("bash", str(LOCAL), "--nnodes=2", "--nproc-per-node=2", *rendezvous, "--"),
        *("--model.name=tiny_factories:small_vit", "--model.width=null", "--data.name=tiny_factories:faulty_blobs"),
        *(f"--data.kwargs={{train: {TRAIN}, val: 20}}", "--data.workers=0", "--batch.per_gpu=4"),
        *(f"--train.epochs={EPOCHS}", "--train.device=cpu", "--run.dir=r"),
        "--run.report_every=null",
    ]
    processes = {}

    def start(node: str, faults: str = "") -> None:
        with (tmp_path / f"{node}.log").open("ab") as log:
            processes[node] = subprocess.Popen(
                hosts.on(node, command),
                cwd=tmp_path,
                env=environment() | {"PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": "eth0", "TINY_FAULTS": faults},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def said() -> str:
        return "\n".join(f"{node}: {(tmp_path / f'{node}.log').read_text()[-4000:]}" for node in NODES)

    start(NODES[0])
    start(NODES[1], faults=f"wait@{WAIT_AT}")
    checkpoint, deadline = tmp_path / "r" / "checkpoints" / "epoch-0001.pt", time.monotonic() + 600
    while not checkpoint.exists():
        assert all(process.poll() is None for process in processes.values()), said()
        assert time.monotonic() < deadline, said()
        time.sleep(0.2)
    hosts.kill(NODES[1])
    assert processes[NODES[1]].wait(timeout=120) == -9
    before = metrics(tmp_path / "r")
    start(NODES[1])
    deadline = time.monotonic() + 600
    while any(process.poll() is None for process in processes.values()):
        assert time.monotonic() < deadline, said()
        time.sleep(0.2)
    assert [process.returncode for process in processes.values()] == [0, 0], said()

    after = metrics(tmp_path / "r")
    assert len(before) < EPOCHS, "the run was over before its host died"
    assert [epoch["epoch"] for epoch in after] == list(range(EPOCHS))
    assert [epoch["samples_seen"] for epoch in after] == [(k + 1) * TRAIN for k in range(EPOCHS)]
    assert {epoch["world_size"] for epoch in after} == {4}
    assert all(math.isfinite(epoch["train_loss"]) for epoch in after)
    assert events(tmp_path / "r", "resume")[-1]["samples_seen"] >= TRAIN
