"""What every launch path of the project sets in torchrun's environment."""

from __future__ import annotations

import os


def launch_environment(nproc: int) -> dict[str, str]:
    """torchrun's environment for ``nproc`` ranks on this machine.

    With the shared TCP store a restart after a killed rank hangs or burns further restarts. torchrun would give each
    rank one thread; here the ranks share the cores out.
    """
    environment = dict(os.environ)
    environment.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    return environment
