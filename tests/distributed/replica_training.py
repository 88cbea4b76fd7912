"""The loop that the modes of replicas are written for, on a small network."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_reference import (
    LAYERS,
    PlainNet,
    Weights,
    samples,
)
from torch import Tensor, nn

from locsgd_dist.distributed import RegionDDP, ReplicaConfig, Traffic, make_replicas
from locsgd_dist.localized import LocalizedLearner, LocalizedRule

GLOBAL_BATCH = 12
LOCAL_LR = 0.02


class Training:
    """The loop that the modes are written for, on one rank; global batch ``t`` is ``samples(GLOBAL_BATCH, t)``."""

    def __init__(
        self,
        mode: str,
        every: int = 1,
        *,
        boundary: int = 0,
        model: nn.Module | None = None,
        rule: str | LocalizedRule = "hebbian",
        channels_last: bool = False,
        overlap: bool = True,
    ) -> None:
        self.model = PlainNet() if model is None else model
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)
        self.learner = LocalizedLearner(self.model, torch.zeros(1, 3, 8, 8), rule=rule, lr=LOCAL_LR)
        self.learner.advance(boundary)
        self.traffic = Traffic()
        self.region = RegionDDP(self.model, dist.group.WORLD, self.traffic)
        config = ReplicaConfig(mode=mode, every=every)
        self.replicas = make_replicas(config, self.learner, dist.group.WORLD, self.traffic, overlap=overlap)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
        self.steps = 0

    def shift(self, boundary: int) -> None:
        self.replicas.synchronise()
        for parameter in self.learner.advance(boundary):
            self.optimizer.state.pop(parameter, None)
        self.region.refresh()
        self.replicas.refresh()

    def step(self, micro_batches: int = 1) -> None:
        images, targets = samples(GLOBAL_BATCH, seed=self.steps)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        images = images[rank::world_size].contiguous(memory_format=self.memory_format)
        micro = list(zip(images.chunk(micro_batches), targets[rank::world_size].chunk(micro_batches), strict=True))
        for x, y in micro[:-1]:
            with self.region.no_sync():
                self._forward_backward(x, y, micro_batches)
        self.replicas.arm()
        self._forward_backward(*micro[-1], micro_batches)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.replicas.finish_step()
        self.steps += 1

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def _forward_backward(self, images: Tensor, targets: Tensor, micro_batches: int) -> None:
        loss = F.cross_entropy(self.region(images), targets) / micro_batches
        self.replicas.start()
        if loss.requires_grad:
            loss.backward()

    def localized(self) -> Weights:
        return {name: getattr(self.model, name).weight.detach().numpy().copy() for name in LAYERS[: self.boundary]}

    @property
    def boundary(self) -> int:
        return self.learner.boundary
