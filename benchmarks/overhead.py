"""The trainer with ``localized.rule=none`` beside loops that people write: is our plain SGD a fair baseline?

    python benchmarks/overhead.py --output benchmarks/results/overhead.json

Same network (ResNet-18 for CIFAR), same images (scikit-learn's digits at 32 pixels), batch, optimizer, precision and
augmentation on one process; each side trains one epoch after another in turn:

- ``locsgd_dist``: the trainer's own epoch, with everything it measures and records, but for evaluation and checkpoints;
- ``bare loop``: forward, backward, optimizer step over the same stream of batches, nothing else;
- ``torchvision reference``: the loop of torchvision's classification reference (``train_one_epoch``) as a user rewrites
  it: a DataLoader of PIL images with its transforms, metrics each step;
- ``timm``: timm's loader, optimizer factory and training step (``create_loader``, ``create_optimizer_v2``).

Each side's peak memory is read in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import alternate, environment, ratio, spread, write_json
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from locsgd_dist.config import parse_config
from locsgd_dist.data import build_data
from locsgd_dist.models import ModelConfig, build_model
from locsgd_dist.trainer import Trainer

LR, MOMENTUM, DECAY = 0.05, 0.9, 5e-4
SIDE, PADDING = 32, 2
Epoch = Callable[[], Any]


def network(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="resnet18", width=options.width), 10).to(options.device).train()
    return model.to(memory_format=torch.channels_last)


def autocast(options: argparse.Namespace) -> torch.autocast:
    return torch.autocast(options.device.type, torch.bfloat16, enabled=options.precision == "bf16")


def trainer_side(options: argparse.Namespace, stack: ExitStack) -> Epoch:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    trainer = stack.enter_context(
        Trainer(
            parse_config(
                [
                    "--config=quickstart",
                    f"--model.width={options.width}",
                    f"--batch.per_gpu={options.batch}",
                    "--batch.policy=fixed",
                    "--localized.rule=none",
                    "--train.epochs=100000",
                    "--train.channels_last=true",
                    f"--train.device={options.device.type}",
                    f"--train.precision={options.precision}",
                    "--optim.schedule=constant",
                    f"--run.dir={folder}/run",
                    "--run.console=quiet",
                    "--run.report_every=null",
                    # What the other sides do not have either.
                    "--train.evaluate_every=100000",
                    "--checkpoint.every_epochs=100000",
                ]
            )
        )
    )

    def run() -> None:
        trainer._run_epoch()

    return run


def bare_side(options: argparse.Namespace, stack: ExitStack) -> Epoch:
    config = parse_config(["--config=quickstart"]).data
    data = stack.enter_context(
        build_data(
            config,
            seed=0,
            rank=0,
            world_size=1,
            local_world_size=1,
            device=options.device,
            per_gpu_batch=options.batch,
            channels_last=True,
        )
    )
    model = network(options)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    number = [0]

    def run() -> None:
        number[0] += 1
        data.train.set_epoch(number[0])
        for batch in data.train:
            with autocast(options):
                loss = F.cross_entropy(model(batch.images), batch.targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


class Digits(Dataset[tuple[Any, int]]):
    """The same digits as PIL images, as an image folder would give them."""

    def __init__(self, transform: Callable[[Any], Any] | None = None, *, count: int):
        digits = load_digits()
        self.images = [
            Image.fromarray((pixels * 15.9).astype("uint8")).resize((SIDE, SIDE)).convert("RGB")
            for pixels in digits.images[:count]
        ]
        self.targets = [int(target) for target in digits.target[:count]]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def torchvision_side(options: argparse.Namespace, stack: ExitStack) -> Epoch:
    transform = v2.Compose(
        [
            v2.RandomCrop(SIDE, padding=PADDING),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize(mean=(0.3, 0.3, 0.3), std=(0.3, 0.3, 0.3)),
            v2.ToPureTensor(),
        ]
    )
    loader = DataLoader(
        Digits(transform, count=options.images),
        batch_size=options.batch,
        shuffle=True,
        num_workers=options.workers,
        pin_memory=options.device.type == "cuda",
    )
    model = network(options)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)

    def run() -> None:
        model.train()
        for image, target in loader:
            image = image.to(options.device, non_blocking=True, memory_format=torch.channels_last)
            target = target.to(options.device, non_blocking=True)
            with autocast(options):
                output = model(image)
                loss = criterion(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # The reference's MetricLogger: accuracies and the loss on the host in each step.
            with torch.inference_mode():
                _, predicted = output.topk(5, 1, True, True)
                hits = predicted.t().eq(target[None])
                [hits[:k].flatten().sum(dtype=torch.float32).item() for k in (1, 5)]
            loss.item()

    return run


def timm_side(options: argparse.Namespace, stack: ExitStack) -> Epoch:
    from timm.data import create_loader
    from timm.optim import create_optimizer_v2
    from timm.utils import AverageMeter

    loader = create_loader(
        Digits(count=options.images),
        input_size=(3, SIDE, SIDE),
        batch_size=options.batch,
        is_training=True,
        use_prefetcher=False,
        no_aug=False,
        scale=(0.8, 1.0),
        color_jitter=0.0,
        hflip=0.0,
        num_workers=options.workers,
        persistent_workers=False,
        pin_memory=options.device.type == "cuda",
        device=options.device,
    )
    model = network(options)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    criterion = nn.CrossEntropyLoss()

    def run() -> None:
        losses = AverageMeter()
        model.train()
        for image, target in loader:
            image = image.to(options.device, memory_format=torch.channels_last)
            target = target.to(options.device)
            with autocast(options):
                loss = criterion(model(image), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.update(loss.item(), image.size(0))

    return run


SIDES: dict[str, Callable[[argparse.Namespace, ExitStack], Epoch]] = {
    "locsgd_dist": trainer_side,
    "bare loop": bare_side,
    "torchvision reference": torchvision_side,
    "timm": timm_side,
}


def peak_mebibytes(side: str) -> float:
    """Peak resident memory of a process that trains two epochs of one side."""
    command = [sys.executable, *sys.argv, "--memory-of", side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="of the two loaders; 0: in the training process")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.device = torch.device(options.device)
    options.images = 1437  # the trainer's own split of the digits
    with ExitStack() as stack:
        if options.memory_of:
            epoch = SIDES[options.memory_of](options, stack)
            epoch()
            epoch()
            # Not getrusage: its peak is handed down from the process that forked this one.
            status = Path("/proc/self/status").read_text()
            print(float(status.split("VmHWM:")[1].split()[0]) / 1024)
            return
        epochs = {side: SIDES[side](options, stack) for side in options.sides}
        # As `python -m locsgd_dist.train` does: one side's collections must not pay for what the others have imported.
        gc.freeze()
        taken = alternate(epochs, options.device, rounds=options.rounds)
    rows = [
        {
            "side": side,
            "images_per_second": spread([options.images / s for s in taken.wall[side]]),
            "time_over_bare_loop": ratio(taken.wall[side], taken.wall["bare loop"]),
            "cpu_time_over_bare_loop": ratio(taken.cpu[side], taken.cpu["bare loop"]),
            "peak_rss_mib": peak_mebibytes(side),
        }
        for side in epochs
    ]
    settings = {key: getattr(options, key) for key in ("width", "batch", "rounds", "workers", "precision")}
    write_json(options.output, environment(options.device) | settings | {"sides": rows})
    table = Table(
        "side", "images/s", "time / bare loop", "CPU time / bare loop", "peak RSS", title="one epoch of plain SGD"
    )
    for row in rows:
        table.add_row(
            row["side"],
            f"{row['images_per_second']['median']:,.0f}",
            "{median:.3f} ({min:.2f}-{max:.2f})".format(**row["time_over_bare_loop"]),
            "{median:.3f} ({min:.2f}-{max:.2f})".format(**row["cpu_time_over_bare_loop"]),
            f"{row['peak_rss_mib']:,.0f} MiB",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
