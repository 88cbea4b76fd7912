"""The worker path: the same samples as without workers, and nothing left behind."""

import gc
import os
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import Numbered, build, write_image_folder
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from locsgd_dist.data import DataBundle, DataConfig, Normalization
from locsgd_dist.data.hashing import hash64
from locsgd_dist.data.loader import SampleDataset, num_cores, outlive_sigterm, resolve_workers
from locsgd_dist.data.presets import eval_transform, train_transform
from locsgd_dist.data.sources import open_source

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NUMBERED: dict[str, Any] = {"name": "data_sets:Numbered", "kwargs": {"num": 61, "num_val": 23}}


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    write_image_folder(tmp_path, size=(48, 40))
    return tmp_path


def children() -> set[int]:
    found: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # A thread may end while we look; its children pass to another one.
            found |= {int(pid) for pid in (thread / "children").read_text().split()}
    return found


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def falls_to(files: int) -> bool:
    """Whether open files come down to a number; queues close their pipes in threads of their own, a little later."""
    deadline = time.monotonic() + 20
    while open_files() > files and time.monotonic() < deadline:
        time.sleep(0.05)
    return open_files() <= files


def by_sample(bundle: DataBundle, *, changes: Iterator[int] | None = None) -> dict[int, Tensor]:
    """The rest of an epoch; the batch size is changed after each batch."""
    seen: dict[int, Tensor] = {}
    for batch in bundle.train:
        for sample, image in zip(batch.targets.tolist(), batch.images, strict=True):
            assert sample not in seen
            seen[sample] = image
        if changes is not None:
            bundle.train.set_per_gpu_batch(next(changes))
    return seen


def equal(first: dict[int, Tensor], second: dict[int, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[sample], second[sample]) for sample in first)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_bring_what_lies_in_memory(image_folder: Path, workers: int) -> None:
    fields: dict[str, Any] = {
        "name": "imagefolder",
        "root": str(image_folder),
        "image_size": 32,
        "augmentation": "crop_flip_cutout",
    }
    held = build(DataConfig(**fields, in_memory=True, cache=False), batch=4)
    with build(DataConfig(**fields, in_memory=False, workers=workers), batch=4) as along:
        assert held.resident_bytes > along.resident_bytes == 0
        for epoch in (0, 1):
            held.train.set_epoch(epoch)
            along.train.set_epoch(epoch)
            for name in ("train", "val"):
                for batch, other in zip(getattr(held, name), getattr(along, name), strict=True):
                    assert torch.equal(batch.images, other.images)
                    assert torch.equal(batch.targets, other.targets)
                    assert (batch.local_size, batch.global_size) == (other.local_size, other.global_size)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_larger_set_is_decoded_in_order_and_its_workers_go(workers: int) -> None:
    children_before = children()
    kwargs = {"num": 1100, "num_val": 300, "side": 4}
    config = DataConfig(name="data_sets:Numbered", kwargs=kwargs, in_memory=True, workers=workers)
    bundle = build(config, batch=1100)
    assert children() <= children_before
    std, mean = (torch.tensor(values)[:, None, None] for values in (IMAGENET.std, IMAGENET.mean))
    for split, stream in (("train", bundle.train), ("val", bundle.val)):
        originals = Numbered(split, **kwargs).images
        for batch in stream:
            made = ((batch.images * std + mean) * 255).round().byte()
            assert torch.equal(made, originals[batch.targets])


@pytest.mark.parametrize("augmentation", ["imagenet_paper", "imagenet_torchvision"])
def test_a_sample_looks_the_same_whatever_workers_batches_and_ranks(augmentation: Any) -> None:
    def epoch(workers: int, batch: int, world_size: int) -> dict[int, Tensor]:
        seen: dict[int, Tensor] = {}
        for rank in range(world_size):
            config = DataConfig(**NUMBERED, augmentation=augmentation, workers=workers)
            with build(config, rank=rank, world_size=world_size, batch=batch) as bundle:
                bundle.train.set_epoch(3)
                for one in bundle.train:
                    seen |= zip(one.targets[: one.local_size].tolist(), one.images, strict=False)
        return seen

    torch.manual_seed(0)
    reference = epoch(workers=0, batch=61, world_size=1)
    assert reference.keys() == set(range(61))
    torch.manual_seed(1)
    for workers, batch, world_size in ((0, 7, 2), (1, 7, 1), (2, 5, 3)):
        assert equal(epoch(workers, batch, world_size), reference)


def test_decoding_in_process_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(build(DataConfig(**NUMBERED, augmentation="imagenet_torchvision", workers=0)).train)
    assert torch.equal(torch.get_rng_state(), before)


def test_paper_preset_is_torchvisions_random_resized_crop_and_flip(image_folder: Path) -> None:
    config = DataConfig(
        name="imagefolder", root=str(image_folder), image_size=32, augmentation="imagenet_paper", workers=0
    )
    (batch,) = build(config, batch=15, seed=9).train
    reference = v2.Compose(
        [
            v2.RandomResizedCrop(32, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = {}
    for index, (picture, _) in enumerate(datasets.ImageFolder(image_folder / "train")):
        torch.manual_seed(hash64(9, 0, index, 3))
        images[index] = reference(picture)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(hash64(9, 0)))
    expected = torch.stack([images[index] for index in order.tolist()])
    torch.testing.assert_close(batch.images, expected, atol=1e-5, rtol=0)


def test_torchvision_preset_is_the_reference_recipe(image_folder: Path) -> None:
    picture, _ = datasets.ImageFolder(image_folder / "train")[0]
    normalize = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET.mean, IMAGENET.std)]
    )
    # In this order: crop, flip, TrivialAugment, floats, normalisation, erasing with zeros.
    reference = v2.Compose(
        [
            v2.RandomResizedCrop(32, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR),
            normalize,
            v2.RandomErasing(p=0.1),
        ]
    )
    ours = train_transform("imagenet_torchvision", 32, IMAGENET)
    erased = 0
    for seed in range(60):
        torch.manual_seed(seed)
        expected = reference(picture)
        torch.manual_seed(seed)
        made = ours(picture)
        assert made.dtype == torch.uint8
        # The erased box is filled with an integer instead of the mean: half a grey level at most.
        torch.testing.assert_close(normalize(made), expected, atol=0.5 / 255 / 0.224 + 1e-5, rtol=0)
        erased += bool((expected == 0).flatten(1).all(dim=0).any())
    assert 1 <= erased <= 15


@pytest.mark.parametrize(("preset", "side"), [("imagenet_paper", 256), ("imagenet_torchvision", 232)])
def test_evaluation_takes_the_centre_at_the_usual_scale(preset: Any, side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    picture = v2.functional.to_pil_image(torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8, generator=generator))
    reference = v2.Compose([v2.Resize(side), v2.CenterCrop(224), v2.PILToTensor()])
    assert torch.equal(eval_transform(preset, 224)(picture), reference(picture))


@pytest.mark.parametrize("kind", ["L", "tensor"])
def test_presets_give_grey_pictures_three_channels(kind: str) -> None:
    grey = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    picture = grey if kind == "tensor" else v2.functional.to_pil_image(grey)
    for preset in ("imagenet_paper", "imagenet_torchvision"):
        assert train_transform(preset, 8, IMAGENET)(picture).shape == (3, 8, 8)
        assert eval_transform(preset, 8)(picture).shape == (3, 8, 8)


def test_fifty_changes_of_the_batch_size_leak_neither_workers_nor_files() -> None:
    files_before, children_before = open_files(), children()
    with build(DataConfig(**NUMBERED, workers=2), batch=4) as bundle:
        assert len(by_sample(bundle)) == 61
        files, workers = open_files(), children() - children_before
        assert len(workers) == 2
        sizes = iter([1 + number * 7 % 13 for number in range(500)])
        changed = 0
        for epoch in range(1, 7):
            bundle.train.set_epoch(epoch)
            bundle.train.set_per_gpu_batch(4)
            seen = by_sample(bundle, changes=(size for size in sizes if (changed := changed + 1)))
            assert seen.keys() == set(range(61))
        assert changed >= 50
        del seen
        # The very same processes, and no file more than after the first epoch.
        assert children() - children_before == workers
        assert falls_to(files)
    assert children() <= children_before
    assert falls_to(files_before)


def test_evaluations_take_their_workers_with_them() -> None:
    files_before, children_before = open_files(), children()
    with build(DataConfig(**NUMBERED, workers=1, val_batch=4)) as bundle:
        for _ in range(2):
            assert sum(batch.local_size for batch in bundle.val) == 23
            assert children() <= children_before
        for batch in bundle.val:
            assert len(children() - children_before) == 1
            del batch  # Its classes lie in memory shared with the worker, by an open file.
            break
        assert children() <= children_before
    assert falls_to(files_before)


def test_closing_in_mid_epoch_stops_the_workers_even_while_an_iterator_lives() -> None:
    children_before = children()
    bundle = build(DataConfig(**NUMBERED, workers=2), batch=2)
    iterator = iter(bundle.train)
    next(iterator)
    assert len(children() - children_before) == 2
    bundle.close()
    bundle.close()
    assert children() <= children_before
    with pytest.raises(RuntimeError, match="the data bundle is closed"):
        next(iterator)


def test_a_preemption_signal_to_all_processes_does_not_cost_the_workers() -> None:
    children_before = children()
    with build(DataConfig(**NUMBERED, workers=2), batch=2) as bundle:
        iterator = iter(bundle.train)
        seen = next(iterator).targets.tolist() + next(iterator).targets.tolist()  # One by each, so both are up.
        for pid in children() - children_before:
            os.kill(pid, signal.SIGTERM)
        for batch in iterator:
            seen += batch.targets.tolist()
        assert sorted(seen) == list(range(61))
    assert children() <= children_before


def test_a_data_set_can_be_sent_to_workers_that_are_not_forked(image_folder: Path) -> None:
    items = open_source(DataConfig(name="imagefolder", root=str(image_folder))).train
    for preset in ("imagenet_paper", "imagenet_torchvision"):
        dataset = SampleDataset(items, np.arange(15), train_transform(preset, 32, IMAGENET), seed=0)
        sent = pickle.loads(pickle.dumps(dataset))
        for request in ((0, 3), (1, 14)):
            assert torch.equal(sent[request][1], dataset[request][1])
    assert pickle.loads(pickle.dumps(outlive_sigterm)) is outlive_sigterm


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_file_that_cannot_be_decoded_is_named_and_leaves_no_worker(image_folder: Path, name: str) -> None:
    (image_folder / name / "class2" / "0001.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    config = DataConfig(name="imagefolder", root=str(image_folder), image_size=32, in_memory=False, workers=2)
    children_before = children()
    with build(config, batch=4) as bundle, pytest.raises(OSError, match=r"cannot decode .*class2/0001\.png") as caught:
        list(getattr(bundle, name))
    # Even while the error, whose traceback reaches into the loader, is at hand.
    assert children() <= children_before
    assert caught.value.__traceback__ is not None


def test_workers_are_sized_to_the_cores_each_rank_has() -> None:
    assert resolve_workers(0, 4) == 0
    assert resolve_workers(7, 100) == 7
    assert resolve_workers(-1, 1) == min(16, len(os.sched_getaffinity(0))) == min(16, num_cores())
    assert resolve_workers(-1, 10_000) == 1
