"""The streams as a trainer uses them, by counting what they hand out."""

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from data_sets import build
from torch import Tensor

from locsgd_dist.data import Batch, DataBundle, DataConfig

CONFIG = DataConfig(
    name="data_sets:Numbered", in_memory=True, augmentation="crop_flip_cutout", kwargs={"num": 61, "num_val": 23}
)


def samples(batch: Batch) -> list[int]:
    """The samples of a batch that count; each of them is a class of its own."""
    return batch.targets[: batch.local_size].tolist()


def by_sample(batches: list[Batch]) -> dict[int, Tensor]:
    """Each sample's image. Fails where a sample comes twice."""
    seen: dict[int, Tensor] = {}
    for batch in batches:
        for number, sample in enumerate(samples(batch)):
            assert sample not in seen
            seen[sample] = batch.images[number]
    return seen


def epoch_of(world_size: int, batch: int, epoch: int) -> dict[int, Tensor]:
    seen: list[Batch] = []
    for rank in range(world_size):
        stream = build(CONFIG, rank=rank, world_size=world_size, batch=batch).train
        stream.set_epoch(epoch)
        seen += list(stream)
    return by_sample(seen)


@pytest.mark.parametrize(("world_size", "batch"), [(1, 61), (1, 7), (2, 8), (3, 5), (4, 20)])
def test_a_sample_looks_the_same_whatever_the_batch_and_world_sizes(world_size: int, batch: int) -> None:
    reference, seen = epoch_of(1, 16, epoch=2), epoch_of(world_size, batch, epoch=2)
    assert seen.keys() == reference.keys() == set(range(61))
    assert all(torch.equal(seen[sample], reference[sample]) for sample in seen)
    other = epoch_of(world_size, batch, epoch=3)
    assert any(not torch.equal(seen[sample], other[sample]) for sample in seen)


def test_ranks_walk_in_step_and_agree_on_the_sizes() -> None:
    # 61 samples by 4 ranks of 5: three whole steps, then one sample for one of them.
    epochs = [list(build(CONFIG, rank=rank, world_size=4, batch=5).train) for rank in range(4)]
    for step in zip(*epochs, strict=True):
        assert len({batch.global_size for batch in step}) == 1
        assert sum(batch.local_size for batch in step) == step[0].global_size
        for batch in step:
            assert batch.images.shape == (max(batch.local_size, 1), 3, 16, 16)
            assert len(batch.targets) == len(batch.images)
    last = [epoch[-1] for epoch in epochs]
    assert [batch.local_size for batch in last] == [1, 0, 0, 0]
    assert all(torch.equal(batch.images, last[0].images) for batch in last)


@pytest.mark.parametrize("in_memory", [True, False])
def test_augmentations_go_round(in_memory: bool) -> None:
    config = replace(CONFIG, draws=3, in_memory=in_memory, workers=0)
    stream = build(config, batch=16).train
    assert stream.num_keys == 3 * 61
    epochs: list[dict[int, Tensor]] = []
    keys: list[dict[int, int]] = []
    orders: list[list[int]] = []
    for epoch in range(5):
        stream.set_epoch(epoch)
        batches = list(stream)
        epochs.append(by_sample(batches))
        orders.append([sample for batch in batches for sample in samples(batch)])
        keys.append(
            dict(zip(orders[-1], (int(key) for batch in batches for key in batch.keys), strict=True))  # type: ignore[union-attr]
        )
    for epoch in (0, 1):
        assert all(torch.equal(epochs[epoch][sample], epochs[epoch + 3][sample]) for sample in range(61))
        assert keys[epoch] == keys[epoch + 3]
        assert orders[epoch] != orders[epoch + 3]  # images come back, their order does not
    for epoch in (1, 2):
        assert any(not torch.equal(epochs[0][sample], epochs[epoch][sample]) for sample in range(61))
    assert len({key for epoch in keys for key in epoch.values()}) == 3 * 61
    assert all(0 <= key < 3 * 61 for epoch in keys for key in epoch.values())


def test_augmentations_go_round_from_an_epoch_on() -> None:
    stream = build(replace(CONFIG, draws=2, draws_from=3), batch=16).train
    epochs, keys = [], []
    for epoch in range(7):
        stream.set_epoch(epoch)
        batches = list(stream)
        epochs.append(by_sample(batches))
        keys.append([batch.keys for batch in batches])
    plain = [epoch_of(1, 16, epoch) for epoch in range(5)]
    for epoch in range(5):  # the first of each draw is what it would have been
        assert all(torch.equal(epochs[epoch][sample], plain[epoch][sample]) for sample in range(61))
    for epoch in (5, 6):
        assert all(torch.equal(epochs[epoch][sample], epochs[epoch - 2][sample]) for sample in range(61))
    assert [keys[epoch][0] is None for epoch in range(7)] == [True] * 3 + [False] * 4
    assert stream.num_keys == 2 * 61
    assert {int(key) for epoch in keys[3:] for batch in epoch for key in batch} == set(range(2 * 61))


def test_images_have_a_key_only_where_they_come_back() -> None:
    assert build(CONFIG, batch=16).train.num_keys is None
    assert next(iter(build(CONFIG, batch=16).train)).keys is None
    mixed = build(replace(CONFIG, draws=2, mixup_alpha=0.2), batch=16).train
    assert mixed.num_keys is None
    assert next(iter(mixed)).keys is None


def test_the_state_counts_the_batches_that_were_handed_out() -> None:
    stream = build(CONFIG, world_size=2, batch=4).train
    assert (len(stream), stream.cursor, stream.state_dict()) == (8, 0, {"epoch": 0, "cursor": 0})
    for number, _ in enumerate(stream, start=1):
        assert stream.cursor == min(61, 8 * number)
        assert stream.state_dict() == {"epoch": 0, "cursor": stream.cursor}
        assert len(stream) == 8 - number
    assert list(stream) == []
    stream.set_epoch(1)
    assert (stream.epoch, stream.cursor, len(stream)) == (1, 0, 8)


def test_iterating_goes_on_where_it_was_left() -> None:
    stream = build(CONFIG, batch=10).train
    seen = [next(iter(stream)), next(iter(stream))]
    for batch in stream:
        seen.append(batch)
        if len(seen) == 4:
            break
    seen += list(stream)
    assert len(seen) == 7
    assert by_sample(seen).keys() == set(range(61))


@pytest.mark.parametrize("trial", range(10))
def test_batch_and_world_sizes_may_change_anywhere_with_a_resume_between(trial: int) -> None:
    rng = random.Random(trial)
    seen: list[Batch] = []
    state = {"epoch": 1, "cursor": 0}
    while state["cursor"] < 61:
        world_size = rng.randint(1, 4)
        bundles = [build(CONFIG, rank=rank, world_size=world_size, batch=3) for rank in range(world_size)]
        for bundle in bundles:
            bundle.train.load_state_dict(state)
        iterators = [iter(bundle.train) for bundle in bundles]
        for _ in range(rng.randint(1, 3)):
            per_gpu = rng.randint(1, 9)
            for bundle in bundles:
                bundle.train.set_per_gpu_batch(per_gpu)
            step = [batch for iterator in iterators if (batch := next(iterator, None))]
            assert all(batch.local_size <= per_gpu for batch in step)
            seen += step
        states = [bundle.train.state_dict() for bundle in bundles]
        assert all(other == states[0] for other in states)
        state = states[0]
    reference, images = epoch_of(1, 61, epoch=1), by_sample(seen)
    assert images.keys() == reference.keys()
    assert all(torch.equal(images[sample], reference[sample]) for sample in images)


def test_a_tried_batch_can_be_given_back() -> None:
    stream, untouched = (build(CONFIG, batch=8).train for _ in range(2))
    next(iter(stream)), next(iter(untouched))
    state = stream.state_dict()
    stream.set_per_gpu_batch(16)
    assert next(iter(stream)).local_size == 16
    stream.load_state_dict(state)
    stream.set_per_gpu_batch(8)
    for batch, other in zip(stream, untouched, strict=True):
        assert torch.equal(batch.images, other.images)


def test_moving_discards_what_was_under_way() -> None:
    stream, untouched = (build(CONFIG, batch=8).train for _ in range(2))
    whole = list(untouched)
    iterator = iter(stream)
    next(iterator), next(iterator)
    stream.load_state_dict({"epoch": 0, "cursor": 8})
    assert torch.equal(next(iterator).images, whole[1].images)
    stream.set_epoch(0)
    for batch, other in zip(iterator, whole, strict=True):
        assert torch.equal(batch.images, other.images)


def test_a_state_of_a_larger_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no position 100 in epoch 0 .*data\.train_samples"):
        build(CONFIG).train.load_state_dict({"epoch": 0, "cursor": 100})


def test_seed_decides_order_and_pictures() -> None:
    (first,), (again,), (other,) = (build(CONFIG, batch=61, seed=seed).train for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert samples(first) == samples(again) != samples(other)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 30])
@pytest.mark.parametrize("val_batch", [1, 4, None])
def test_evaluation_sees_each_sample_once_and_unaugmented(world_size: int, val_batch: int | None) -> None:
    config = DataConfig(
        name=CONFIG.name,
        in_memory=True,
        augmentation="crop_flip_cutout",
        val_batch=val_batch,
        kwargs={"num": 61, "num_val": 23},
    )
    seen: list[Batch] = []
    sizes: dict[int, list[Batch]] = defaultdict(list)
    plain: DataBundle | None = None
    for rank in range(world_size):
        bundle = build(config, rank=rank, world_size=world_size)
        plain = plain or build(DataConfig(name=CONFIG.name, in_memory=True, augmentation="none", kwargs=config.kwargs))
        batches = list(bundle.val)
        assert len(batches) == len(bundle.val)
        # What the contract promises of the order: this rank's samples are every world_size-th.
        assert [sample for batch in batches for sample in samples(batch)] == list(range(rank, 23, world_size))
        assert all(batch.local_size == len(batch.images) for batch in batches)
        seen += batches
        for step, batch in enumerate(batches):
            sizes[step].append(batch)
    assert plain is not None
    expected, images = by_sample(list(plain.val)), by_sample(seen)
    assert images.keys() == set(range(23))
    assert all(torch.equal(images[sample], expected[sample]) for sample in images)
    for step_batches in sizes.values():
        assert sum(batch.local_size for batch in step_batches) == step_batches[0].global_size


def test_memory_format_is_the_one_asked_for() -> None:
    for channels_last in (False, True):
        bundle = build(CONFIG, channels_last=channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        for stream in (bundle.train, bundle.val):
            assert next(iter(stream)).images.is_contiguous(memory_format=memory_format)


def test_resident_bytes_are_those_of_images_and_classes() -> None:
    assert build(CONFIG).resident_bytes == (61 + 23) * (3 * 16 * 16 + 8)
    assert build(DataConfig(train_samples=10)).resident_bytes == (10 + 360) * (32 * 32 + 8)
