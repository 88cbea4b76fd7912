"""From the `data` section to the streams that the trainer iterates."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from locsgd_dist.data.augment import BatchTransform
from locsgd_dist.data.checks import check_source
from locsgd_dist.data.config import DataConfig
from locsgd_dist.data.decode import decode
from locsgd_dist.data.in_memory import InMemoryFetcher
from locsgd_dist.data.items import Fit, Items
from locsgd_dist.data.loader import SampleDataset, WorkerFetcher, resolve_workers
from locsgd_dist.data.mixing import Mixer
from locsgd_dist.data.normalization import Normalization
from locsgd_dist.data.presets import eval_transform, train_transform
from locsgd_dist.data.recipe import SMALL_SIDE, Recipe, resolve
from locsgd_dist.data.sampler import EpochSampler
from locsgd_dist.data.sources import Source, open_source
from locsgd_dist.data.streams import EvalStream, Fetcher, TrainStream
from locsgd_dist.data.subset import balanced_subset


@dataclass(frozen=True)
class DataBundle:
    """The streams of one rank. It may own worker processes: close it, or use it as a context manager."""

    num_classes: int

    input_shape: tuple[int, int, int]
    """(3, H, W)."""

    num_train: int
    num_val: int
    train: TrainStream
    val: EvalStream

    normalization: Normalization
    """What uint8 images were normalised by; whoever uses the trained network needs it."""

    resident_bytes: int
    """Bytes of images and classes held on the device; 0 where workers decode."""

    def close(self) -> None:
        """Stop the workers."""
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
    """Open the data set and make one rank's streams.

    Args:
        config: the `data` section.
        seed: of permutations and augmentation; both are functions of it and the epoch for any number of ranks.
        rank: of this process, in [0, world_size).
        world_size: number of ranks.
        local_world_size: number of ranks on this machine, which share its cores.
        device: where batches go.
        per_gpu_batch: images per rank and step to start with.
        channels_last: memory format of the batches.

    Raises:
        ValueError: one line that names the key and the remedy.
    """
    source = open_source(config)
    check_source(config, source)
    recipe = resolve(config, source)
    chosen = _choose(config, source)
    train_fetcher: Fetcher
    val_fetcher: Fetcher
    resident_bytes = 0
    if recipe.in_memory:
        train_fetcher, val_fetcher = _hold(config, source, recipe, chosen, device, local_world_size)
        resident_bytes = train_fetcher.nbytes + val_fetcher.nbytes
    else:
        train_fetcher, val_fetcher = _decode_along(config, source, recipe, chosen, device, local_world_size, seed)

    train_transform, val_transform = (
        BatchTransform(
            recipe.normalization,
            augmentation=augmentation,
            seed=seed,
            device=device,
            channels_last=channels_last,
        )
        for augmentation in (recipe.crop_flip, None)
    )
    mix = None
    if config.mixup_alpha or config.cutmix_alpha:
        mix = Mixer(config.mixup_alpha, config.cutmix_alpha, num_classes=source.num_classes, seed=seed, rank=rank)
    sampler = EpochSampler(
        len(chosen),
        seed=seed,
        rank=rank,
        world_size=world_size,
        per_gpu=per_gpu_batch,
        num_draws=config.draws,
        draws_from=config.draws_from,
    )
    val_batch = config.val_batch or (max(256, per_gpu_batch) if recipe.size <= SMALL_SIDE else per_gpu_batch)
    return DataBundle(
        num_classes=source.num_classes,
        input_shape=(3, recipe.size, recipe.size),
        num_train=len(chosen),
        num_val=len(source.val),
        train=TrainStream(sampler, train_fetcher, train_transform, mix),
        val=EvalStream(
            len(source.val), val_fetcher, val_transform, rank=rank, world_size=world_size, per_gpu=val_batch
        ),
        normalization=recipe.normalization,
        resident_bytes=resident_bytes,
    )


def _choose(config: DataConfig, source: Source) -> NDArray[np.int64]:
    """Which samples of the training split to train on."""
    targets = source.train.targets
    if config.train_samples is None or targets is None:
        return np.arange(len(source.train))
    return balanced_subset(targets, config.train_samples, config.subset_seed)


def _hold(
    config: DataConfig,
    source: Source,
    recipe: Recipe,
    chosen: NDArray[np.int64],
    device: torch.device,
    local_world_size: int,
) -> tuple[InMemoryFetcher, InMemoryFetcher]:
    """Decode both splits now, to the device."""
    # With a cache, one rank of a machine decodes for all of them and may use all cores.
    num_workers = resolve_workers(config.workers, 1 if config.cache else local_world_size)

    def hold(items: Items, indices: NDArray[np.int64]) -> InMemoryFetcher:
        images, targets = decode(items, indices, recipe.size, use_cache=config.cache, num_workers=num_workers)
        return InMemoryFetcher(torch.from_numpy(images).to(device), torch.from_numpy(targets).to(device))

    return hold(source.train, chosen), hold(source.val, np.arange(len(source.val)))


def _decode_along(
    config: DataConfig,
    source: Source,
    recipe: Recipe,
    chosen: NDArray[np.int64],
    device: torch.device,
    local_world_size: int,
    seed: int,
) -> tuple[WorkerFetcher, WorkerFetcher]:
    """Decode both splits while training goes on."""
    num_workers = resolve_workers(config.workers, local_world_size)
    if recipe.preset is None:
        for_training = for_evaluation = Fit(recipe.size)
    else:
        for_training = train_transform(recipe.preset, recipe.size, recipe.normalization)
        for_evaluation = eval_transform(recipe.preset, recipe.size)
    train = SampleDataset(source.train, chosen, for_training, seed)
    val = SampleDataset(source.val, np.arange(len(source.val)), for_evaluation, seed)
    return (
        WorkerFetcher(train, num_workers=num_workers, device=device, persistent=True),
        # These workers come and go with each evaluation: they would hold memory all through the epoch.
        WorkerFetcher(val, num_workers=num_workers, device=device, persistent=False),
    )
