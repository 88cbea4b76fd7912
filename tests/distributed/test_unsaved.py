"""A run that cannot be saved, or whose checkpoints cannot be read, says so and destroys nothing."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from interrupted_runs import numbers, run, train
from rank_pool import free_ports, world_of_its_own
from test_mid_epoch_resume import FLAGS

from locsgd_dist import saving
from locsgd_dist import train as command
from locsgd_dist.checkpoint import file, store
from locsgd_dist.faults import Preempted
from locsgd_dist.recording import RunDirectory
from locsgd_dist.saving import NotSavedError


def told_on_a_full_disk(ports: list[int], flags: list[str], last: str, options: dict[str, Any]) -> str:
    """What ends a run whose disk has no room for the checkpoint of that name."""

    def save(state: Any, path: Path) -> None:
        if path.name == last:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.save_atomically(state, path)

    with (
        world_of_its_own(ports),
        mock.patch.object(store, "save_atomically", save),
        mock.patch.object(saving, "_PAUSE_SECONDS", 0.0),
    ):
        try:
            return train(flags, **options).end
        except NotSavedError as error:
            return str(error)


def test_a_run_without_its_last_checkpoint_fails_on_all_ranks_and_goes_on(two_ranks: Any, tmp_path: Path) -> None:
    whole, full = ([*FLAGS, f"--run.dir={tmp_path / name}"] for name in ("whole", "full"))
    run(two_ranks, whole)
    told = two_ranks.run(told_on_a_full_disk, free_ports(2), full, "epoch-0004.pt", {})
    assert told[0].startswith("the trained network could not be saved: No space left on device; started again, ")
    assert told[1].startswith("the trained network could not be saved")
    assert {rank.end for rank in run(two_ranks, full)} == {"finished"}
    assert numbers(tmp_path / "full") == numbers(tmp_path / "whole")


@pytest.mark.usefixtures("full_disk")
def test_the_last_checkpoint_missing_is_one_line_and_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--config", "quickstart", *FLAGS, "--train.epochs=1", f"--run.dir={tmp_path}"]) == 1
    assert [
        line.split(";")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("locsgd: error")
    ] == ["locsgd: error: the trained network could not be saved: No space left on device"]


@pytest.mark.parametrize("fault", ["once", "no links", "nor copies"])
def test_what_does_not_cost_the_last_checkpoint_does_not_fail_the_run(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = OSError(errno.EPERM, "Operation not permitted")
    if fault == "once":
        failures = [refused]

        def save(state: Any, path: Path) -> None:
            if failures:
                raise failures.pop()
            file.save_atomically(state, path)

        monkeypatch.setattr(store, "save_atomically", save)
        monkeypatch.setattr(saving, "_PAUSE_SECONDS", 0.0)
    else:
        monkeypatch.setattr("os.link", mock.Mock(side_effect=refused))
    if fault == "nor copies":
        monkeypatch.setattr("shutil.copyfile", mock.Mock(side_effect=refused))
    assert train([*FLAGS, "--train.epochs=1", f"--run.dir={tmp_path}"]).end == "finished"
    (last,) = (tmp_path / "checkpoints").glob("epoch-0001.pt")
    best = tmp_path / "checkpoints" / "best.pt"
    assert best.exists() == (fault != "nor copies")
    if best.exists():
        assert best.read_bytes() == last.read_bytes()
    warnings = [event for event in RunDirectory(tmp_path).load_events() if event["type"] == "warning"]
    assert ["Operation not permitted" in event["message"] for event in warnings] == [True] * (fault != "no links")


@pytest.mark.usefixtures("full_disk")
def test_a_run_that_leaves_unsaved_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interrupted_runs.Preempted", ())  # the message is what counts here
    with pytest.raises(Preempted, match=r"^not saved: No space left on device; the next start goes"):
        train([*FLAGS, f"--run.dir={tmp_path}"], signal_after=3)


def told_at_the_start(ports: list[int], flags: list[str]) -> str:
    with world_of_its_own(ports):
        try:
            return train(flags).end
        except ValueError as error:
            dist.destroy_process_group()  # a process that is refused ends, and closes nothing before
            return str(error)


def test_a_run_without_a_readable_checkpoint_is_not_trained_over(two_ranks: Any, tmp_path: Path) -> None:
    flags = [*FLAGS, "--checkpoint.every_steps=5", f"--run.dir={tmp_path / 'run'}"]
    assert {rank.end for rank in run(two_ranks, flags, cut_after=17)} == {"cut off"}
    folder = tmp_path / "run" / "checkpoints"
    numbered = list(folder.glob("epoch-*.pt"))
    assert len(numbered) == 2
    for path in numbered:
        torn = path.read_bytes()[:1000]
        path.unlink()  # best.pt may be another name of the same file
        path.write_bytes(torn)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for told in two_ranks.run(told_at_the_start, free_ports(2), flags):
        assert told.startswith(f"run.dir: no checkpoint in {folder} can be read; run.resume=FILE goes on from another")
    assert {path: path.read_bytes() for path in before} == before

    assert {rank.end for rank in run(two_ranks, [*flags, f"--run.resume={folder / 'best.pt'}"])} == {"finished"}
    assert [record["epoch"] for record in numbers(tmp_path / "run")] == [0, 1, 2, 3]
