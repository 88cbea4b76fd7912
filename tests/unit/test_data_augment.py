"""The batched augmentation against torchvision's transforms, one sample at a time."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from locsgd_dist.data import Normalization
from locsgd_dist.data.augment import BatchTransform, CropFlip, crop_flip, cutout_mask
from locsgd_dist.data.hashing import hash_indices

CPU = torch.device("cpu")
COLOURS = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def random_images(num: int, height: int, width: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, height, width, channels), dtype=torch.uint8, generator=generator)


def batch_transform(augmentation: CropFlip | None, *, seed: int = 0, channels_last: bool = False) -> BatchTransform:
    return BatchTransform(COLOURS, augmentation=augmentation, seed=seed, device=CPU, channels_last=channels_last)


def one_by_one(images: Tensor, bits: Tensor, padding: int, flip: bool) -> Tensor:
    """Pad, crop and flip by torchvision, each image at the offsets spelled by its hash."""
    _, height, width, _ = images.shape
    made = []
    for image, hashed in zip(images.permute(0, 3, 1, 2), bits.tolist(), strict=True):
        unsigned = hashed % 2**64
        top, left = (((unsigned >> shift) % 2**20) * (2 * padding + 1) // 2**20 for shift in (4, 24))
        padded = functional.pad(image, [padding] * 4)
        cropped = functional.crop(padded, top, left, height, width)
        made.append(functional.horizontal_flip(cropped) if flip and unsigned % 2 else cropped)
    return torch.stack(made)


@pytest.mark.parametrize(("height", "width", "channels"), [(32, 32, 3), (8, 8, 1), (9, 14, 3)])
@pytest.mark.parametrize(("padding", "flip"), [(4, True), (2, False), (0, True), (0, False)])
def test_crop_and_flip_are_torchvisions(height: int, width: int, channels: int, padding: int, flip: bool) -> None:
    images = random_images(64, height, width, channels)
    bits = hash_indices(torch.arange(64), 0)
    made = crop_flip(images, bits, padding, flip).permute(0, 3, 1, 2)
    assert torch.equal(made, one_by_one(images, bits, padding, flip))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_normalised_to_float_in_three_channels(channels: int, channels_last: bool) -> None:
    images = random_images(5, 6, 9, channels)
    made = batch_transform(None, channels_last=channels_last)(images, torch.arange(5), 0)
    planes = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    expected = functional.normalize(functional.to_dtype(planes, torch.float32, scale=True), COLOURS.mean, COLOURS.std)
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)
    assert made.dtype == torch.float32
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert made.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("channels_last", [False, True])
def test_floats_are_taken_as_they_come(channels_last: bool) -> None:
    images = torch.randn(4, 6, 6, 3, dtype=torch.float64)
    kept = images.clone()
    made = batch_transform(None, channels_last=channels_last)(images, torch.arange(4), 0)
    assert torch.equal(made, images.permute(0, 3, 1, 2).float())
    cut = batch_transform(CropFlip(0, False, cutout=6), channels_last=channels_last)(images, torch.arange(4), 0)
    assert (cut == 0).any()
    assert torch.equal(images, kept)


def test_a_sample_looks_the_same_in_any_batch() -> None:
    images = random_images(40, 16, 16)
    transform = batch_transform(CropFlip(2, flip=True, cutout=5), seed=3)
    together = transform(images, torch.arange(40), 7)
    for start, stop in ((0, 1), (1, 14), (14, 40)):
        indices = torch.arange(start, stop).flip(0)
        assert torch.equal(transform(images[indices], indices, 7), together[indices])


def test_seed_and_epoch_change_the_draw() -> None:
    images, indices = random_images(16, 16, 16), torch.arange(16)
    augmentation = CropFlip(2, flip=True)
    draws = [batch_transform(augmentation, seed=seed)(images, indices, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for first in range(4):
        for second in range(first):
            assert not torch.equal(draws[first], draws[second])


def test_all_offsets_and_both_directions_occur() -> None:
    # An image that says where each of its pixels comes from.
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 8, 8, 1)
    made = crop_flip(image.expand(4000, -1, -1, -1), hash_indices(torch.arange(4000), 1), 1, True)
    # Rows shifted by -1, 0 or 1, columns too, each way round.
    kinds, counts = made.flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 3 * 3 * 2
    assert counts.min() > 4000 / 18 * 0.7


@pytest.mark.parametrize("side", [1, 4, 5, 16])
def test_cutout_erases_one_square_clipped_at_the_border(side: int) -> None:
    height, width = 8, 12
    masks = cutout_mask(hash_indices(torch.arange(3000), 2), height, width, side)
    assert masks.shape == (3000, height, width)
    kinds = masks.unique(dim=0)
    expected = set()
    for row in range(height):
        for column in range(width):
            mask = torch.ones(height, width)
            top, left = row - side // 2, column - side // 2
            mask[max(0, top) : top + side, max(0, left) : left + side] = 0
            expected.add(tuple(mask.flatten().tolist()))
    assert {tuple(kind.flatten().tolist()) for kind in kinds} == expected


@pytest.mark.parametrize("channels_last", [False, True])
def test_cutout_leaves_the_mean_and_the_rest_alone(channels_last: bool) -> None:
    images, indices = random_images(32, 16, 16), torch.arange(32)
    plain = batch_transform(CropFlip(2, flip=True), channels_last=channels_last)(images, indices, 1)
    cut = batch_transform(CropFlip(2, flip=True, cutout=8), channels_last=channels_last)(images, indices, 1)
    erased = (cut == 0).all(dim=1)
    assert erased.flatten(1).sum(dim=1).min() >= 16  # A quarter of the square at least stays inside.
    assert torch.equal(cut, torch.where(erased[:, None], torch.zeros(()), plain))
