"""MixUp and CutMix: the formula, and what the draw depends on."""

import pytest
import torch
from data_sets import build

from locsgd_dist.data import DataConfig
from locsgd_dist.data.mixing import Mixer

NUM_CLASSES = 6


def inputs(num: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, 3, 8, 8, generator=generator), torch.arange(num) % NUM_CLASSES


def mixer(mixup: float, cutmix: float, *, seed: int = 0, rank: int = 0) -> Mixer:
    return Mixer(mixup, cutmix, num_classes=NUM_CLASSES, seed=seed, rank=rank)


@pytest.mark.parametrize("cursor", range(0, 48, 6))
def test_mixup_blends_images_and_targets_with_one_weight(cursor: int) -> None:
    images, targets = inputs()
    mixed, soft = mixer(0.4, 0)(images.clone(), targets, 0, cursor)
    # The weight shows in the targets: neighbours in the batch are of different classes.
    weight = soft[torch.arange(6), targets][:, None, None, None]
    torch.testing.assert_close(mixed, weight * images + (1 - weight) * images.roll(1, 0))
    one_hot = torch.nn.functional.one_hot(targets, NUM_CLASSES)
    torch.testing.assert_close(soft, weight[:, :, 0, 0] * one_hot + (1 - weight[:, :, 0, 0]) * one_hot.roll(1, 0))


@pytest.mark.parametrize("cursor", range(0, 48, 6))
def test_cutmix_pastes_a_box_and_weights_targets_by_its_area(cursor: int) -> None:
    images, targets = inputs()
    mixed, soft = mixer(0, 1.0)(images.clone(), targets, 0, cursor)
    pasted = (mixed == images.roll(1, 0)).all(dim=1)
    assert torch.equal(mixed, torch.where(pasted[:, None], images.roll(1, 0), images))
    torch.testing.assert_close(soft[torch.arange(6), targets], 1 - pasted.flatten(1).float().mean(dim=1))


def test_both_together_draw_one_of_the_two_for_each_batch() -> None:
    images, targets = inputs()
    kinds = set()
    for cursor in range(40):
        mixed, _ = mixer(1.0, 1.0)(images.clone(), targets, 0, cursor)
        copied = ((mixed == images) | (mixed == images.roll(1, 0))).all()
        kinds.add("cutmix" if copied else "mixup")
    assert kinds == {"cutmix", "mixup"}


def test_the_draw_is_a_function_of_seed_rank_epoch_and_cursor() -> None:
    images, targets = inputs()

    def draw(seed: int, rank: int, epoch: int, cursor: int) -> tuple[float, ...]:
        _, soft = mixer(1.0, 0, seed=seed, rank=rank)(images.clone(), targets, epoch, cursor)
        return tuple(soft.flatten().tolist())

    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    torch.manual_seed(5)
    draws = [draw(*key) for key in keys]
    assert len(set(draws)) == len(keys)
    after = torch.rand(1)
    torch.manual_seed(5)
    # Neither does the state of torch's own generator matter, nor is it moved.
    assert torch.equal(torch.rand(1), after)
    assert [draw(*key) for key in keys] == draws


@pytest.mark.parametrize("channels_last", [False, True])
def test_streams_mix_training_batches_only(channels_last: bool) -> None:
    config = DataConfig(mixup_alpha=0.2, cutmix_alpha=1.0, train_samples=33)
    bundle = build(config, world_size=2, rank=1, batch=8, channels_last=channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for batch in bundle.train:
        assert batch.targets.dtype == torch.float32
        assert batch.targets.shape == (max(batch.local_size, 1), 10)
        torch.testing.assert_close(batch.targets.sum(dim=1), torch.ones(len(batch.targets)))
        assert batch.images.is_contiguous(memory_format=memory_format)
    assert batch.local_size == 0
    assert next(iter(bundle.val)).targets.dtype == torch.int64
