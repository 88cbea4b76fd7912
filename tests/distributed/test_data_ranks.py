"""Real ranks share out the data: exactly, in step, and across a change of their number."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from locsgd_dist.data import Batch, DataBundle, DataConfig, build_data

DIGITS = DataConfig(augmentation="none", train_samples=301)


def build(config: DataConfig, rank: int, world_size: int, per_gpu: int) -> DataBundle:
    return build_data(
        config,
        seed=3,
        rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        device=torch.device("cpu"),
        per_gpu_batch=per_gpu,
    )


def samples(batch: Batch) -> list[str]:
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images[: batch.local_size]]


def walk(per_gpu: int, state: dict[str, int], steps: int) -> tuple[list[str], dict[str, int]]:
    """On each rank: go on from a state, and check in every step that the ranks' shares add up."""
    stream = build(DIGITS, dist.get_rank(), dist.get_world_size(), per_gpu).train
    stream.load_state_dict(state)
    seen: list[str] = []
    for _, batch in zip(range(steps), stream, strict=False):
        sizes = torch.tensor([batch.local_size, batch.global_size, 1])
        dist.all_reduce(sizes)
        assert sizes.tolist() == [batch.global_size, batch.global_size * dist.get_world_size(), dist.get_world_size()]
        seen += samples(batch)
    return seen, stream.state_dict()


def test_an_epoch_begun_by_two_ranks_is_finished_by_four(two_ranks: Any, four_ranks: Any) -> None:
    begun = two_ranks.run(walk, 16, {"epoch": 5, "cursor": 0}, 4)
    state = begun[0][1]
    assert [answer[1] for answer in begun] == [{"epoch": 5, "cursor": 128}] * 2
    finished = four_ranks.run(walk, 12, state, 100)
    assert [answer[1] for answer in finished] == [{"epoch": 5, "cursor": 301}] * 4
    seen = Counter(sample for answer in begun + finished for sample in answer[0])
    alone = build(DIGITS, 0, 1, 301).train
    assert seen == Counter(sample for batch in alone for sample in samples(batch))


def evaluate() -> tuple[int, float, int]:
    """A sum over all validation pixels and classes, reduced over the ranks."""
    bundle = build(DIGITS, dist.get_rank(), dist.get_world_size(), 7)
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in bundle.val:
        sums += torch.tensor([batch.local_size, batch.images.double().sum(), batch.targets.sum()], dtype=torch.float64)
    dist.all_reduce(sums)
    return int(sums[0]), float(sums[1]), int(sums[2])


def test_evaluation_counts_each_sample_once(ranks: Any) -> None:
    alone = list(build(DIGITS, 0, 1, 7).val)
    num = sum(batch.local_size for batch in alone)
    pixels = float(sum(batch.images.double().sum() for batch in alone))
    classes = int(sum(batch.targets.sum() for batch in alone))
    for answer in ranks.run(evaluate):
        assert answer == (num, pytest.approx(pixels, abs=1e-6), classes)


def read_folder(fields: dict[str, Any]) -> tuple[int, list[int]]:
    bundle = build(DataConfig(**fields), dist.get_rank(), dist.get_world_size(), 3)
    with bundle:
        return bundle.num_classes, [
            int(target) for batch in bundle.train for target in batch.targets[: batch.local_size]
        ]


@pytest.mark.parametrize("in_memory", [True, False])
def test_ranks_read_one_folder(two_ranks: Any, tmp_path: Path, in_memory: Any) -> None:
    for split in ("train", "val"):
        for number in range(4):
            (tmp_path / split / str(number)).mkdir(parents=True)
            for index in range(number + 1):
                pixels = np.full((8, 8, 3), 10 * number + index, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / str(number) / f"{index}.png")
    fields = {
        "name": "imagefolder",
        "root": str(tmp_path),
        "image_size": 8,
        "in_memory": in_memory,
        "cache": False,
        "workers": 0,
    }
    answers = two_ranks.run(read_folder, fields)
    assert [num_classes for num_classes, _ in answers] == [4, 4]
    assert [len(seen) for _, seen in answers] == [5, 5]
    assert Counter(answers[0][1] + answers[1][1]) == {0: 1, 1: 2, 2: 3, 3: 4}
