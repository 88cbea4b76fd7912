"""Algorithm 2 against signs worked out by hand."""

from __future__ import annotations

import json

import pytest

from locsgd_dist.localized import WeakSupervision


@pytest.mark.parametrize(
    ("losses", "signs"),
    [
        # Sign in force after each epoch: -1 only where that epoch's loss rose above the one before.
        ([2.0, 1.5, 1.7, 1.7, 1.9, 2.0, 0.5], [1, 1, -1, 1, -1, -1, 1]),
        ([3.0], [1]),
        ([1.0, 1.0, 1.0], [1, 1, 1]),
        ([0.0, 1e-12], [1, -1]),
        ([1.0, float("nan"), 2.0, 3.0], [1, 1, 1, -1]),
    ],
)
def test_signs_by_hand(losses: list[float], signs: list[int]) -> None:
    supervision = WeakSupervision()
    assert supervision.sign == 1
    returned = []
    for loss in losses:
        returned.append(supervision.observe(loss))
        assert supervision.sign == returned[-1]
    assert returned == signs


def test_a_restored_supervision_remembers_the_loss_before() -> None:
    losses = [2.0, 1.5, 1.7, 1.7, 1.9, 2.0, 0.5]
    reference = WeakSupervision()
    expected = [reference.observe(loss) for loss in losses]
    for split in range(len(losses) + 1):
        supervision, restored = WeakSupervision(), WeakSupervision()
        for loss in losses[:split]:
            supervision.observe(loss)
        restored.load_state_dict(json.loads(json.dumps(supervision.state_dict())))
        assert restored.sign == (expected[split - 1] if split else 1)
        assert [restored.observe(loss) for loss in losses[split:]] == expected[split:]


@pytest.mark.parametrize(
    ("alignments", "signs"),
    [
        # Steps that led uphill in the mean over layers are turned round; cosines are then those of the turned steps.
        ([[0.2, -0.1], [-0.2, 0.1], [0.2, -0.1], [-0.3, 0.1]], [1, -1, -1, 1]),
        ([[None, -0.1], [None, None], [None, 0.0]], [-1, -1, -1]),
        ([[]], [1]),
    ],
)
def test_signs_that_follow_the_alignment(alignments: list[list[float | None]], signs: list[int]) -> None:
    supervision = WeakSupervision()
    returned = []
    for alignment in alignments:
        restored = WeakSupervision()
        restored.load_state_dict(json.loads(json.dumps(supervision.state_dict())))
        supervision = restored
        returned.append(supervision.follow(alignment))
        assert supervision.sign == returned[-1]
    assert returned == signs
