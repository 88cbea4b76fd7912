"""A data set and a network of one's own, named as ``package.module:factory`` by the end-to-end tests."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Dataset


class Blobs(Dataset[tuple[Tensor, int]]):
    """Images whose class is the channel that is brightest: learnable, any size, made on the fly."""

    num_classes = 3

    def __init__(self, count: int, size: int, seed: int):
        self._count, self._size, self._seed = count, size, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(1000 * self._seed + index)
        image = torch.randint(0, 128, (3, self._size, self._size), generator=generator, dtype=torch.uint8)
        label = index % 3
        image[label] += 64
        return image, label


def blobs(split: str, size: int = 32, train: int = 12, val: int = 5) -> Blobs:
    return Blobs(train, size, 0) if split == "train" else Blobs(val, size, 1)


class Faulty(Blobs):
    """Blobs that interfere with training, as ``TINY_FAULTS`` in the environment says.

    ``kill@20,term@15``: rank 1's first process is killed when it reads its 20th image; the one started in its place has
    torchrun terminated at the 15th, and reads on when that has reached it. ``wait@12``: each rank reads its 12th image
    when it has been asked to leave. No run is over before a signal comes, however slowly signals and tests get along.
    """

    PATIENCE_SECONDS = 600

    def __init__(self, count: int, size: int, seed: int):
        super().__init__(count, size, seed)
        self._num_read = 0
        self._is_asked_to_leave = False
        self._trainers_handler: Any = None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self._num_read += 1
        faults = dict(enumerate(os.environ.get("TINY_FAULTS", "").split(",")))
        fault, _, after = faults.get(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), "").partition("@")
        if fault in ("term", "wait"):
            self._listen()
        if fault and self._num_read == int(after):
            self._strike(fault)
        return super().__getitem__(index)

    def _strike(self, fault: str) -> None:
        is_rank_1 = os.environ.get("RANK") == "1"
        if fault == "kill" and is_rank_1:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "term" and is_rank_1:
            os.kill(os.getppid(), signal.SIGTERM)
        if fault == "wait" or (fault == "term" and is_rank_1):
            deadline = time.monotonic() + self.PATIENCE_SECONDS
            while not self._is_asked_to_leave:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not asked to leave in {self.PATIENCE_SECONDS} s")
                time.sleep(0.02)

    def _listen(self) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        if handler != self._note:
            self._trainers_handler = handler
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._is_asked_to_leave = True
        self._trainers_handler(number, frame)


def faulty_blobs(split: str, size: int = 32, train: int = 12, val: int = 5) -> Blobs:
    return Faulty(train, size, 0) if split == "train" else Blobs(val, size, 1)


def small_vit(num_classes: int) -> nn.Module:
    """torchvision's vision transformer: fused attention, class token, positional embedding."""
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=num_classes
    )


def mlp(num_classes: int) -> nn.Module:
    """Without batch normalisation: data parallelism is exact."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 32 * 32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, num_classes)
    )


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        exhaust_memory()
        return gradient


def exhaust_memory() -> None:
    """A real failure of the host's allocator."""
    torch.empty(1 << 60, dtype=torch.uint8)


class Greedy(nn.Module):
    """A network that runs out of memory on rank 1 at a batch of 8 or more, where it is told to.

    Args:
        where: ``trial`` (also on the zeros of a trial step), ``forward``, ``backward`` or ``optimizer``.
    """

    def __init__(self, num_classes: int, where: str):
        super().__init__()
        self.network = mlp(num_classes)
        self._where = where
        self._greedy = False
        if where == "optimizer":
            register_optimizer_step_pre_hook(self._before_optimizer_step)

    def forward(self, images: Tensor) -> Tensor:
        is_trial = not images.any()
        too_large = os.environ.get("RANK") == "1" and len(images) >= 8 and self.training
        self._greedy = too_large and is_trial == (self._where == "trial")
        if self._greedy and self._where in ("trial", "forward"):
            exhaust_memory()
        logits = self.network(images)
        return _FailingBackward.apply(logits) if self._greedy and self._where == "backward" else logits

    def _before_optimizer_step(self, *_: object) -> None:
        if self._greedy:
            exhaust_memory()


def greedy(num_classes: int, where: str) -> nn.Module:
    return Greedy(num_classes, where)
