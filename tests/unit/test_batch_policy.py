"""When the batch grows, by hand-computed cases and against a simulated device whose footprint is a known line."""

from __future__ import annotations

import math

import pytest

from locsgd_dist.memory import BatchConfig, BatchPolicy, LrScale, OutOfMemoryLog, is_out_of_memory
from locsgd_dist.memory.batch_policy import parse_bytes


def policy(interval: int = 1, num_train: int = 100_000, batches_per_step: int = 4, **keys) -> BatchPolicy:
    config = BatchConfig(**{"per_gpu": 64, "policy": "halving"} | keys)
    return BatchPolicy(config, interval=interval, num_train=num_train, batches_per_step=batches_per_step)


def settle(p: BatchPolicy, epoch: int, footprint_of, limit: float = math.inf) -> int:
    """What the trainer does: measure the present batch, then try candidates on a device of ``limit`` bytes."""
    candidate = p.propose(epoch, footprint_of(p.per_gpu)) if p.is_due(epoch) else None
    tried = 0
    while candidate is not None:
        needed = footprint_of(candidate)
        candidate = p.judge(candidate, needed if needed <= limit else None)
        tried += 1
        assert tried < 20
    return p.per_gpu


def test_the_papers_figure_4():
    """ResNet-50, 10 GB: 64 images until the footprint is at most half of the first epochs', then 128."""
    p = policy(interval=11)
    p.observe(1000)
    for epoch, footprint in enumerate([1000] * 11 + [760] * 11 + [501] * 11):
        assert settle(p, epoch, lambda b, f=footprint: f * b // 64) == 64
    assert settle(p, 33, lambda b: 500 * b // 64) == 128


def test_at_most_one_change_per_interval():
    p = policy(interval=3)
    p.observe(1000)
    sizes = [settle(p, epoch, lambda b: b) for epoch in range(12)]
    assert sizes == [64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512, 512]  # 1024 > half of the budget twice


def test_fixed_never_grows():
    p = policy(policy="fixed")
    p.observe(10**9)
    assert settle(p, 5, lambda b: 1) == 64


def test_a_configured_budget_counts_from_the_first_epoch():
    p = policy(memory_budget="1KiB")
    p.observe(100)
    assert p.budget == 1024
    assert settle(p, 0, lambda b: 4 * b) == 128


def test_limits_on_size_and_steps():
    assert settle(policy(memory_budget="1GB", max_per_gpu=127), 0, lambda b: b) == 64
    assert settle(policy(memory_budget="1GB", max_per_gpu=128), 0, lambda b: b) == 128
    # 5120 images, 4 ranks: 128 each make exactly 10 steps, 256 only 5.
    p = policy(memory_budget="1GB", num_train=5120, min_steps=10)
    assert [settle(p, epoch, lambda b: b) for epoch in range(3)] == [128, 128, 128]
    assert settle(policy(memory_budget="1GB", num_train=5119, min_steps=11), 0, lambda b: b) == 64


def test_out_of_memory_in_the_trial_keeps_the_batch_and_is_not_tried_again():
    p = policy()
    p.observe(1000)
    assert settle(p, 0, lambda b: 4 * b, limit=300) == 64
    assert not p.is_due(1)
    assert settle(p, 50, lambda b: b) == 64


def test_a_trial_that_needs_more_than_the_budget_is_not_taken():
    p = policy()
    p.observe(1000)
    assert settle(p, 0, lambda b: 500 if b == 64 else 1001) == 64


@pytest.mark.parametrize("fixed", [0, 300, 700])
@pytest.mark.parametrize("per_image", [1.0, 1.7, 3.0])
def test_fit_finds_the_largest_multiple_under_the_headroom(fixed: int, per_image: float):
    def footprint(batch: int) -> int:
        return math.ceil(fixed + per_image * batch)

    p = policy(policy="fit", memory_budget="2000", headroom=0.9, num_train=10**7)
    largest = max(b for b in range(64, 4096, 64) if footprint(b) <= 1800)
    found = [settle(p, epoch, footprint, limit=2000) for epoch in range(4)][-1]
    assert footprint(found) <= 1800
    # One line through two measured points: at most its rounding (one byte in the slope) below the true largest.
    assert largest - 64 <= found <= largest


def test_falling_back_after_a_step_ran_out_of_memory():
    p = policy()
    p.observe(1000)
    for epoch in range(2):
        settle(p, epoch, lambda b: b)
    assert p.per_gpu == 256
    assert p.fall_back(256)
    assert p.per_gpu == 128
    assert p.fall_back(256)
    assert settle(p, 9, lambda b: b) == 128
    assert not p.fall_back(64)


def test_state_round_trip_decides_alike():
    p, q = policy(interval=2), policy(interval=2)
    p.observe(1000)
    for epoch in range(3):
        settle(p, epoch, lambda b: b)
    q.load_state_dict(p.state_dict())
    assert q.per_gpu == p.per_gpu == 128
    for epoch in range(3, 9):
        assert settle(p, epoch, lambda b: b) == settle(q, epoch, lambda b: b)


def test_learning_rate_follows_linearly_over_the_ramp():
    scale = LrScale("linear", ramp_epochs=2.0)
    assert scale.at(0.0) == scale.at(9.9) == 1.0
    scale.set_growth(2.0, epoch=10.0)
    assert [scale.at(e) for e in (10.0, 10.5, 11.0, 12.0, 50.0)] == [1.0, 1.25, 1.5, 2.0, 2.0]
    scale.set_growth(4.0, epoch=11.0)  # before the first ramp is over
    assert scale.at(11.0) == 1.5
    assert scale.at(13.0) == 4.0


@pytest.mark.parametrize(("kind", "factor"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
def test_kinds_of_scaling_and_no_ramp(kind, factor: float):
    scale = LrScale(kind, ramp_epochs=0.0)
    scale.set_growth(4.0, epoch=3.0)
    assert scale.at(3.0) == factor
    twin = LrScale(kind, ramp_epochs=0.0)
    twin.load_state_dict(scale.state_dict())
    assert twin.at(7.0) == factor


@pytest.mark.parametrize(
    ("text", "expected"), [("10GiB", 10 * 2**30), ("1.5 gb", 1_500_000_000), ("512", 512), ("3MiB", 3 * 2**20)]
)
def test_sizes(text: str, expected: int):
    assert parse_bytes(text, "k") == expected


@pytest.mark.parametrize("text", ["ten", "10XB", "-1GB", "0", ""])
def test_bad_sizes_name_the_key(text: str):
    with pytest.raises(ValueError, match=r"^batch\.memory_budget must be a size such as 10GiB"):
        BatchConfig(memory_budget=text)


@pytest.mark.parametrize(
    "keys", [{"min_steps": 0}, {"max_per_gpu": 32}, {"headroom": 0.0}, {"interval_epochs": 0}, {"lr_ramp_epochs": -1.0}]
)
def test_bad_values_name_the_key(keys: dict):
    (key,) = keys
    with pytest.raises(ValueError, match=rf"^batch\.{key} "):
        BatchConfig(**keys)


def test_a_failed_host_allocation_is_recognised():
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_incidents_are_read_in_order(tmp_path):
    log = OutOfMemoryLog(tmp_path / "oom")
    assert log.read() == []
    log.write(rank=1, per_gpu=128)
    log.write(rank=0, per_gpu=64)
    assert [(i.rank, i.per_gpu) for i in log.read()] == [(1, 128), (0, 64)]


def test_an_incident_that_cannot_be_read_or_written_ends_no_run(tmp_path, caplog):
    log = OutOfMemoryLog(tmp_path / "oom")
    log.write(rank=1, per_gpu=128)
    (tmp_path / "oom" / "rank0-1.json").write_text("")
    assert [i.per_gpu for i in log.read()] == [128]
    assert "rank0-1.json cannot be read" in caplog.text
    (tmp_path / "file").write_text("")
    OutOfMemoryLog(tmp_path / "file").write(rank=0, per_gpu=64)
    assert "could not be written down" in caplog.text


@pytest.mark.parametrize(("keys", "expected"), [({}, 128), ({"max_per_gpu": 100}, 100), ({"max_per_gpu": 300}, 128)])
def test_the_global_batch_is_kept_as_far_as_the_per_gpu_batch_may_grow(keys: dict[str, int], expected: int):
    p = policy(**keys)
    p.keep_global_batch(4, 2)
    assert p.per_gpu == expected
    p.keep_global_batch(2, 4)
    assert p.per_gpu == expected / 2


def test_the_global_batch_is_not_kept_by_one_that_did_not_fit():
    p = policy()
    p.observe(1000)
    assert settle(p, 0, lambda b: 400 * b // 64, limit=700) == 64  # 128 needed more than there was
    p.keep_global_batch(4, 2)
    assert p.per_gpu == 127
    p.keep_global_batch(2, 1000)
    assert p.per_gpu == 1


def test_a_budget_is_found_where_ranks_left_in_the_first_epoch():
    p = policy()
    p.keep_global_batch(4, 2)
    p.observe(1000)
    p.observe(5000)
    assert p.budget == 1000
    assert settle(p, 1, lambda b: 400 * b // 128) == 256
