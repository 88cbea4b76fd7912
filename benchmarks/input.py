"""Images per second of each data path beside the bare limit of its work: copying from memory, or decoding files.

    python benchmarks/input.py --output benchmarks/results/input.json
    python benchmarks/input.py --folder DIR      # DIR/train/CLASS/*.jpg, DIR/val/CLASS/*.jpg

Sides of a row take turns within one run. Without ``--folder`` a folder of JPEGs of real digits is written first.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from measuring import alternate, environment, ratio, spread, write_json
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from locsgd_dist.data import DataBundle, DataConfig, build_data


def write_digits(folder: Path, side: int, copies: int) -> None:
    """scikit-learn's 1,797 digits as JPEGs of ``side`` pixels, ``copies`` times over, and some for validation."""
    digits = load_digits()
    for index, (pixels, target) in enumerate(zip(digits.images, digits.target, strict=True)):
        image = Image.fromarray((pixels * 15.9).astype("uint8")).resize((side, side)).convert("RGB")
        for copy in range(copies):
            path = folder / "train" / str(target) / f"{index}-{copy}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=90)
        if index % 10 == 0:
            path = folder / "val" / str(target) / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=90)


def stream_of(config: DataConfig, batch: int, device: torch.device) -> DataBundle:
    return build_data(
        config,
        seed=0,
        rank=0,
        world_size=1,
        local_world_size=1,
        device=device,
        per_gpu_batch=batch,
        channels_last=True,
    )


def epoch(bundle: DataBundle, steps: int) -> Callable[[], Any]:
    """Draws ``steps`` batches of one epoch after another."""
    number = [0]

    def run() -> None:
        number[0] += 1
        bundle.train.set_epoch(number[0])
        for _ in islice(iter(bundle.train), steps):
            pass

    return run


def copies(batch: int, side: int, steps: int, device: torch.device) -> Callable[[], Any]:
    """The least that any in-memory path does: gather uint8 images, convert and normalise them."""
    images = torch.randint(0, 256, (8192, 3, side, side), dtype=torch.uint8, device=device)
    order = torch.randperm(len(images), device=device)

    def run() -> None:
        for step in range(steps):
            start = step * batch % (len(images) - batch)
            batch_images = images[order[start : start + batch]].float()
            batch_images.mul_(1 / 64).sub_(2)

    return run


def decodes(folder: Path, count: int) -> Callable[[], Any]:
    """The least that any path over files does in one process: read and decode ``count`` of them, drawn at random."""
    images = [path for path in sorted((folder / "train").rglob("*")) if path.suffix.lower() in {".jpg", ".jpeg"}]
    if len(images) < count:
        raise SystemExit(f"{folder}/train holds {len(images)} JPEGs, of which {count} are needed")
    files = random.Random(0).sample(images, count)

    def run() -> None:
        for file in files:
            with Image.open(file) as image:
                image.convert("RGB").load()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="an image folder of your own")
    parser.add_argument("--side", type=int, default=160, help="pixels of the JPEGs that are written without --folder")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    memory_steps, file_steps = 64, 6
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder
        if folder is None:
            folder = Path(scratch) / "digits"
            write_digits(folder, options.side, copies=1)
        limit_of_memory = copies(options.batch, 32, memory_steps, device)
        for augmentation in ("none", "crop_flip", "crop_flip_cutout"):
            config = DataConfig(
                name="imagefolder", root=str(folder), image_size=32, augmentation=augmentation, workers=0
            )
            with stream_of(config, options.batch, device) as bundle:
                steps = min(memory_steps, bundle.num_train // options.batch)
                rows.append(
                    compare(
                        f"in memory, 32 px, {augmentation}",
                        epoch(bundle, steps),
                        steps * options.batch,
                        limit_of_memory,
                        memory_steps * options.batch,
                        device,
                        options.rounds,
                    )
                )
        limit_of_files = decodes(folder, file_steps * options.batch)
        for workers in (0, 1, 2):
            config = DataConfig(
                name="imagefolder",
                root=str(folder),
                image_size=max(72, options.side // 2),
                augmentation="imagenet_paper",
                in_memory=False,
                workers=workers,
            )
            with stream_of(config, options.batch, device) as bundle:
                rows.append(
                    compare(
                        f"files, imagenet_paper, {workers} workers",
                        epoch(bundle, file_steps),
                        file_steps * options.batch,
                        limit_of_files,
                        file_steps * options.batch,
                        device,
                        options.rounds,
                    )
                )
    write_json(options.output, environment(device) | {"batch": options.batch, "paths": rows})
    table = Table(title="input paths")
    for column in ("path", "images/s", "limit, images/s", "share of the limit"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["path"],
            f"{row['images_per_second']['median']:,.0f}",
            f"{row['limit_images_per_second']['median']:,.0f}",
            "{median:.2f} ({min:.2f}-{max:.2f})".format(**row["share_of_limit"]),
        )
    Console().print(table)


def compare(
    name: str,
    path: Callable[[], Any],
    path_images: int,
    limit: Callable[[], Any],
    limit_images: int,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    seconds = alternate({"path": path, "limit": limit}, device, rounds=rounds).wall
    rate = [path_images / s for s in seconds["path"]]
    limit_rate = [limit_images / s for s in seconds["limit"]]
    return {
        "path": name,
        "images_per_second": spread(rate),
        "limit_images_per_second": spread(limit_rate),
        "share_of_limit": ratio(rate, limit_rate),
    }


if __name__ == "__main__":
    main()
