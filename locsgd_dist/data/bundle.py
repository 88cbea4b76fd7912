"""From the `data` section to the streams that the trainer iterates."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from locsgd_dist.data.augment import BatchTransform, CropFlip, Normalization
from locsgd_dist.data.checks import check_data, check_targets
from locsgd_dist.data.config import DataConfig
from locsgd_dist.data.in_memory import InMemoryFetcher, decode, measure
from locsgd_dist.data.items import Fit, Items
from locsgd_dist.data.loader import SampleDataset, WorkerFetcher, num_cores, num_workers
from locsgd_dist.data.mixing import Mixer
from locsgd_dist.data.presets import ImageNetPreset, eval_transform, train_transform
from locsgd_dist.data.sampler import EpochSampler
from locsgd_dist.data.sources import IMAGENET, Source, open_source
from locsgd_dist.data.streams import EvalStream, Fetcher, TrainStream
from locsgd_dist.data.subset import balanced_subset

IN_MEMORY_BYTES = 2 << 30
"""Up to here `data.in_memory=auto` holds a set on the device."""

SMALL_IMAGE = 64
"""Up to this side, images are taken for small ones: whole, shifted and mirrored, rather than cropped out of."""

ResolvedAugmentation = Literal[
    "none", "crop_flip", "crop_flip_cutout", "imagenet_paper", "imagenet_torchvision"
]


@dataclass(frozen=True)
class DataBundle:
    """The streams of one rank. Use it as a context manager, or call `close()`: it may own worker processes."""

    num_classes: int
    input_shape: tuple[int, int, int]
    """(3, H, W)."""

    num_train: int
    num_val: int
    train: TrainStream
    val: EvalStream
    normalization: Normalization
    """What was subtracted and divided by: whoever exports the network needs it."""

    resident_bytes: int
    """Bytes of images and classes held on the device; 0 where workers decode."""

    def close(self) -> None:
        """Stop the workers; the streams cannot be used any more."""
        self.train.close()
        self.val.close()

    def __enter__(self) -> DataBundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def build_data(
    config: DataConfig,
    *,
    seed: int,
    rank: int,
    world_size: int,
    local_world_size: int,
    device: torch.device,
    per_gpu_batch: int,
    channels_last: bool = False,
) -> DataBundle:
    """Open the data set and make the streams of one rank.

    Args:
        config: the `data` section.
        seed: of permutations and augmentation; with the epoch it fixes both for any number of ranks.
        rank: of this process, in [0, world_size).
        world_size: number of ranks.
        local_world_size: ranks on this machine, which share its cores.
        device: where batches go.
        per_gpu_batch: images per rank and step to start with.
        channels_last: memory format of the batches.

    Raises:
        ValueError: one line naming a key, see `check_data`.
    """
    check_data(config)
    source = open_source(config)
    check_targets(source)
    size = config.image_size or source.image_size
    chosen = _choose(config, source.train)
    everything = np.arange(len(source.val), dtype=np.int64)
    augmentation = _augmentation(config, source, size)
    in_memory = _in_memory(config, source, augmentation, (len(chosen) + len(everything)) * size * size * 3)

    fetchers: tuple[Fetcher, Fetcher]
    resident_bytes = 0
    if in_memory:
        cores = num_cores() if config.cache else max(1, num_cores() // local_world_size)
        splits = [
            decode(items, indices, size, use_cache=config.cache, num_threads=cores)
            for items, indices in ((source.train, chosen), (source.val, everything))
        ]
        normalization = _normalization(config, source, splits[0][0])
        held = [tuple(torch.from_numpy(array).to(device) for array in split) for split in splits]
        fetchers = InMemoryFetcher(*held[0]), InMemoryFetcher(*held[1])
        resident_bytes = sum(tensor.nbytes for split in held for tensor in split)
    else:
        normalization = _normalization(config, source, None)
        workers = num_workers(config.workers, local_world_size)
        if augmentation.startswith("imagenet_"):
            preset = cast(ImageNetPreset, augmentation)
            train_pipeline = train_transform(preset, size, normalization)
            val_pipeline = eval_transform(preset, size)
        else:
            train_pipeline = val_pipeline = Fit(size)
        # The evaluation's workers come and go with it: standing by all epoch, they would hold memory for nothing.
        fetchers = (
            WorkerFetcher(
                SampleDataset(source.train, chosen, train_pipeline, seed),
                num_workers=workers,
                device=device,
                persistent=True,
            ),
            WorkerFetcher(
                SampleDataset(source.val, everything, val_pipeline, seed),
                num_workers=workers,
                device=device,
                persistent=False,
            ),
        )

    def transform(batched: CropFlip | None) -> BatchTransform:
        return BatchTransform(
            normalization, augmentation=batched, seed=seed, device=device, channels_last=channels_last
        )

    mix = None
    if config.mixup_alpha or config.cutmix_alpha:
        mix = Mixer(
            config.mixup_alpha, config.cutmix_alpha, num_classes=source.num_classes, seed=seed, rank=rank
        )
    sampler = EpochSampler(len(chosen), seed=seed, rank=rank, world_size=world_size, per_gpu=per_gpu_batch)
    val_batch = config.val_batch or (max(256, per_gpu_batch) if size <= SMALL_IMAGE else per_gpu_batch)
    return DataBundle(
        num_classes=source.num_classes,
        input_shape=(3, size, size),
        num_train=len(chosen),
        num_val=len(everything),
        train=TrainStream(sampler, fetchers[0], transform(_crop_flip(augmentation, source, size)), mix),
        val=EvalStream(
            len(everything), fetchers[1], transform(None), rank=rank, world_size=world_size, batch=val_batch
        ),
        normalization=normalization,
        resident_bytes=resident_bytes,
    )


def _choose(config: DataConfig, items: Items) -> NDArray[np.int64]:
    """Indices to train on."""
    if config.train_samples is None:
        return np.arange(len(items), dtype=np.int64)
    targets = items.targets
    if targets is None:
        raise ValueError(
            f"data.train_samples needs the data set of {config.name} to have targets, the class of each sample"
        )
    return balanced_subset(targets, config.train_samples, config.subset_seed)


def _augmentation(config: DataConfig, source: Source, size: int) -> ResolvedAugmentation:
    if config.augmentation != "auto":
        return config.augmentation
    if source.frozen_randomness:
        return "none"
    return "crop_flip" if size <= SMALL_IMAGE else "imagenet_paper"


def _crop_flip(augmentation: ResolvedAugmentation, source: Source, size: int) -> CropFlip | None:
    """The part of the augmentation that is done on the device, whoever has decoded the images."""
    if not augmentation.startswith("crop_flip"):
        return None
    return CropFlip(
        padding=size // 8 if source.photographs else size // 16,
        flip=source.photographs,
        cutout=round(size * source.cutout) if augmentation == "crop_flip_cutout" else 0,
    )


def _in_memory(
    config: DataConfig, source: Source, augmentation: ResolvedAugmentation, num_bytes: int
) -> bool:
    if augmentation.startswith("imagenet_"):
        if config.in_memory == "yes":
            raise ValueError(
                f"data.in_memory=yes needs data.augmentation none, crop_flip or crop_flip_cutout; "
                f"auto means {augmentation} here, since the images are larger than {SMALL_IMAGE} pixels"
            )
        return False
    if config.in_memory == "auto":
        return num_bytes <= IN_MEMORY_BYTES and not source.frozen_randomness
    return config.in_memory == "yes"


def _normalization(config: DataConfig, source: Source, images: NDArray[np.uint8] | None) -> Normalization:
    if config.normalization == "imagenet":
        return IMAGENET
    if source.normalization is not None:
        return source.normalization
    return IMAGENET if images is None else measure(images)
