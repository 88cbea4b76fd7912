"""Training that keeps what layers at rest make of each image, held against training that does not."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from interrupted_runs import Outcome, numbers, run
from plain_reference import assert_close
from rank_pool import free_ports, world_of_its_own
from test_mid_epoch_resume import pool_of
from torch import nn

from locsgd_dist.distributed import KeptOutputs, Recurrence, Runtime, kept_outputs
from locsgd_dist.localized import LocalizedConfig, LocalizedLearner
from locsgd_dist.recording import RunDirectory

IMAGES, DRAWS, EPOCHS = 70, 2, 5
FLAGS = [
    "--model.name=interrupted_runs:small_network",
    "--model.width=null",
    "--data.name=interrupted_runs:numbered",
    f"--data.kwargs={{count: {IMAGES}}}",
    "--data.workers=0",
    f"--data.draws={DRAWS}",
    f"--train.epochs={EPOCHS}",
    "--train.device=cpu",
    "--train.deterministic=true",
    "--optim.ema_decay=0.9",
    "--optim.lr=0.02",
    "--localized.rule=frozen",
    "--localized.norm_statistics=held",
    "--selection.kind=fixed",
    "--selection.boundary=2",
    "--batch.per_gpu=4",
    "--run.console=quiet",
    "--run.report_every=null",
    "--monitor.trace_hz=0",
]
KEEPING = [*FLAGS, "--localized.keep_outputs=true"]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Any:
    """Of the files of what is kept: those of other runs on this machine are none of ours."""
    before = set(Path(tempfile.gettempdir()).glob("locsgd-*.outputs"))
    yield
    assert not set(Path(tempfile.gettempdir()).glob("locsgd-*.outputs")) - before


def assert_ends_alike(runs: list[Outcome], others: list[Outcome]) -> None:
    for one, other in zip(runs, others, strict=True):
        assert one.end == other.end == "finished"
        for state, expected in zip(one.states, other.states, strict=True):
            assert_close(state, expected, rtol=1e-4, atol=1e-5)
        assert [step.labels for step in one.steps] == [step.labels for step in other.steps]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("start", [0, 1])
def test_a_run_that_keeps_outputs_ends_as_one_that_does_not(
    ranks: int, start: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pool = pool_of(request, ranks)
    flags = [f"--selection.start_epoch={start}"]
    plain = run(pool, [*FLAGS, *flags, f"--run.dir={tmp_path / 'plain'}"])
    kept = run(pool, [*KEEPING, *flags, f"--run.dir={tmp_path / 'kept'}"])
    assert_ends_alike(kept, plain)
    recorded = numbers(tmp_path / "kept")
    assert [epoch["num_kept_layers"] for epoch in recorded] == [0] * start + [2] * (EPOCHS - start)
    # Once around, and all images come back, to whichever rank of the machine they go.
    expected = [0] * (start + DRAWS) + [IMAGES] * (EPOCHS - start - DRAWS)
    assert [epoch["num_kept_samples"] for epoch in recorded] == expected
    assert {epoch["num_kept_samples"] for epoch in numbers(tmp_path / "plain")} == {0}
    (event,) = (event for event in RunDirectory(tmp_path / "kept").load_events() if event["type"] == "outputs")
    assert event["message"].startswith(f"outputs are kept: {IMAGES * DRAWS} outputs of 2 layers take ")
    for one, other in zip(recorded, numbers(tmp_path / "plain"), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert one["grad_all_reduce_bytes"] == other["grad_all_reduce_bytes"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_cut_off_computes_again_what_is_lost(
    ranks: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pool = pool_of(request, ranks)
    whole = run(pool, [*KEEPING, f"--run.dir={tmp_path / 'whole'}"])
    flags = [*KEEPING, "--checkpoint.every_steps=1", f"--run.dir={tmp_path / 'cut'}"]
    steps = -(-IMAGES // (4 * ranks))
    # In the middle of the third epoch, the first whose images have come before.
    assert {rank.end for rank in run(pool, flags, cut_after=2 * steps + 3)} == {"cut off"}
    resumed = run(pool, flags)
    for one, other in zip(resumed, whole, strict=True):
        for state, expected in zip(one.states, other.states, strict=True):
            assert_close(state, expected, rtol=1e-4, atol=1e-5)
    recorded = [epoch["num_kept_samples"] for epoch in numbers(tmp_path / "cut")]
    # Those of the first draw before the end came back after it have to be computed again in the fifth epoch.
    before = 3 * 4 * ranks
    assert recorded == [0, 0, before, 0, IMAGES - before]


def test_what_takes_too_much_room_is_not_kept_and_the_run_goes_on(tmp_path: Path) -> None:
    plain = run(None, [*FLAGS, f"--run.dir={tmp_path / 'plain'}"])
    kept = run(None, [*KEEPING, "--localized.keep_gib=1e-6", f"--run.dir={tmp_path / 'kept'}"])
    assert_ends_alike(kept, plain)
    assert {epoch["num_kept_samples"] for epoch in numbers(tmp_path / "kept")} == {0}
    (event,) = (event for event in RunDirectory(tmp_path / "kept").load_events() if event["type"] == "outputs")
    assert "outputs are not kept" in event["message"]
    assert event["message"].endswith("localized.keep_gib is 1e-06")


def test_where_no_image_comes_back_nothing_is_kept(tmp_path: Path) -> None:
    run(None, [*KEEPING, f"--data.draws={EPOCHS}", f"--run.dir={tmp_path}"])
    assert {epoch["num_kept_layers"] for epoch in numbers(tmp_path)} == {0}
    (event,) = (event for event in RunDirectory(tmp_path).load_events() if event["type"] == "outputs")
    assert event["message"] == f"outputs are not kept: no image comes back in this run (data.draws={EPOCHS})"


@pytest.mark.parametrize("flags", [["--train.channels_last=true"], ["--train.precision=bf16"]], ids=str)
def test_in_other_layouts_and_types_too(flags: list[str], tmp_path: Path) -> None:
    # Outputs with as many channels as have a layout of their own.
    flags = [*flags, "--model.name=resnet18", "--model.width=8", "--data.kwargs={count: 12}", "--selection.boundary=5"]
    flags += ["--train.epochs=4", "--train.evaluate_every=4"]
    plain = run(None, [*FLAGS, *flags, f"--run.dir={tmp_path / 'plain'}"])
    kept = run(None, [*KEEPING, *flags, f"--run.dir={tmp_path / 'kept'}"])
    assert_ends_alike(kept, plain)
    recorded = numbers(tmp_path / "kept")
    assert [epoch["num_kept_samples"] for epoch in recorded] == [0, 0, 12, 12]
    assert {epoch["num_kept_layers"] for epoch in recorded} == {5}


def keeping(model: nn.Module, boundary: int, runtime: Runtime) -> KeptOutputs:
    """For 70 images in a run of nine epochs, ``boundary`` layers at rest."""
    example = torch.zeros(1, 3, 16, 16)
    learner = LocalizedLearner(model, example, rule="frozen", hold_statistics=True)
    config = LocalizedConfig(rule="frozen", norm_statistics="held", keep_outputs=True)
    kept = KeptOutputs(
        config, model, learner, runtime, example=example, recurrence=Recurrence.of(70, 2, 0, num_epochs=9)
    )
    learner.advance(boundary)
    return kept


def other_networks_on_each_rank(ports: list[int]) -> tuple[str | None, int]:
    """As from ranks whose devices round so that another place is found to cut."""
    with world_of_its_own(ports):
        runtime = Runtime(torch.device("cpu"))
        layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(400, 10)]
        model = nn.Sequential(*layers[:1], *([nn.ReLU()] if runtime.rank else []), *layers[1:])
        kept = keeping(model, 2, runtime)
        message = kept.refresh(0)
        runtime.close()
        return message, kept.num_layers


def test_ranks_that_would_cut_in_different_places_keep_nothing(two_ranks: Any) -> None:
    told = two_ranks.run(other_networks_on_each_rank, free_ports(2))
    assert told == [("outputs are not kept: the ranks' networks cannot be cut alike", 0)] * 2


def failing_on_each_rank(ports: list[int]) -> str | None:
    """Each in words of its own, as of a GPU's memory."""
    with world_of_its_own(ports):
        runtime = Runtime(torch.device("cpu"))
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(576, 10))
        kept = keeping(model, 1, runtime)
        failing = mock.Mock(side_effect=RuntimeError(f"no memory on device {runtime.rank}"))
        with mock.patch.object(kept_outputs, "find_cut", failing):
            message = kept.refresh(0)
        runtime.close()
        return message


def test_ranks_whose_trials_fail_each_say_why(two_ranks: Any) -> None:
    told = two_ranks.run(failing_on_each_rank, free_ports(2))
    assert told == [f"outputs are not kept: RuntimeError in a trial: no memory on device {rank}" for rank in (0, 1)]


def full_on_one_rank(ports: list[int], folder: str) -> tuple[str | None, int]:
    """One of two ranks finds no room."""
    with world_of_its_own(ports):
        runtime = Runtime(torch.device("cpu"))
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(576, 10))
        kept = keeping(model, 1, runtime)
        refused = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        with (
            mock.patch.object(tempfile, "gettempdir", return_value=folder),
            mock.patch.object(os, "posix_fallocate", refused) if runtime.rank else nullcontext(),
        ):
            message = kept.refresh(0)
        runtime.close()
        return message, kept.num_layers


def test_where_one_rank_finds_no_room_no_rank_keeps_anything(two_ranks: Any, tmp_path: Path) -> None:
    (first, *counts), (second, num_layers) = two_ranks.run(full_on_one_rank, free_ports(2), str(tmp_path))
    assert first == "outputs are not kept: there is no room on another machine"
    assert second.startswith("outputs are not kept: no room for ")
    assert [*counts, num_layers] == [0, 0]
    assert list(tmp_path.iterdir()) == []


def test_a_boundary_that_moves_takes_the_cut_with_it(tmp_path: Path) -> None:
    # The boundary moves after each of the first epochs.
    moving = ["--selection.kind=static", "--selection.lmax=0.75", "--data.draws=1"]
    plain = run(None, [*FLAGS, *moving, f"--run.dir={tmp_path / 'plain'}"])
    kept = run(None, [*KEEPING, *moving, f"--run.dir={tmp_path / 'kept'}"])
    assert_ends_alike(kept, plain)
    recorded = numbers(tmp_path / "kept")
    kept_of = [(epoch["boundary"], epoch["num_kept_layers"], epoch["num_kept_samples"]) for epoch in recorded]
    # A later cut begins anew; behind the last boundary but one there is none later.
    assert kept_of == [(0, 0, 0), (1, 1, 0), (2, 2, 0), (2, 2, IMAGES), (3, 2, IMAGES)]


def test_another_number_of_ranks_goes_on_with_the_count(two_ranks: Any, tmp_path: Path) -> None:
    flags = [*KEEPING, "--checkpoint.every_steps=1", f"--run.dir={tmp_path}"]
    # In the third epoch two ranks have taken 4 images each in 3 steps, all kept before; alone, one computes anew.
    assert {rank.end for rank in run(two_ranks, flags, cut_after=2 * 9 + 3)} == {"cut off"}
    (alone,) = run(None, flags)
    assert alone.end == "finished"
    recorded = numbers(tmp_path)
    assert [epoch["num_kept_samples"] for epoch in recorded] == [0, 0, 24, 0, IMAGES - 24]
    assert [epoch["num_kept_layers"] for epoch in recorded] == [2] * EPOCHS


def test_an_image_that_is_not_finite_is_not_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(576, 10))
    kept = keeping(model, 1, Runtime(torch.device("cpu")))
    assert (kept.refresh(0) or "").startswith("outputs are kept")
    images, keys = torch.randn(2, 3, 16, 16), torch.tensor([3, 5])
    broken = torch.stack([images[0], torch.full_like(images[1], torch.nan)])
    for batch, expected in ((broken[1:], [False]), (broken, [True, False]), (images, [True, True])):
        mine = keys[-len(batch) :]
        with kept.around(batch, mine):
            answer = model(torch.zeros_like(batch))
        torch.testing.assert_close(answer, model(batch), equal_nan=True)
        with kept.around(batch, mine):
            again = model(torch.zeros_like(batch))
        torch.testing.assert_close(again, answer, equal_nan=True)
        before = kept.take()
        with kept.around(batch, mine):
            assert kept.take() == sum(expected), before
