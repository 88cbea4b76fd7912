"""A rank to which the file system shows a new checkpoint late waits for it instead of ending the run."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any
from unittest import mock

from interrupted_runs import Outcome, numbers, run, train
from rank_pool import free_ports, world_of_its_own
from test_mid_epoch_resume import FLAGS

from locsgd_dist.recording import RunDirectory


def train_where_rank_1_lags(ports: list[int], flags: list[str]) -> Outcome:
    left = [2 if os.environ["RANK"] == "1" else 0]
    open_file = Path.open

    def lagging(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.parent.name == "checkpoints" and left[0]:
            left[0] -= 1
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return open_file(path, *args, **kwargs)

    with world_of_its_own(ports), mock.patch.object(Path, "open", lagging), mock.patch("time.sleep"):
        outcome = train(flags)
        assert left == [0]
        return outcome


def test_a_run_goes_on_where_one_rank_sees_the_checkpoint_late(two_ranks: Any, tmp_path: Path) -> None:
    whole, cut = ([*FLAGS, "--checkpoint.every_steps=5", f"--run.dir={tmp_path / name}"] for name in ("whole", "cut"))
    run(two_ranks, whole)
    assert {rank.end for rank in run(two_ranks, cut, cut_after=17)} == {"cut off"}
    resumed = two_ranks.run(train_where_rank_1_lags, free_ports(2), cut)
    assert {rank.end for rank in resumed} == {"finished"}
    assert [event["type"] for event in RunDirectory(tmp_path / "cut").load_events()].count("resume") == 1
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
