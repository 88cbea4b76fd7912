"""Stochastic depth (Huang et al., 2016): residual blocks that are skipped for a whole batch.

A dropped block runs its shortcut only, so that its convolutions cost nothing in either direction; torchvision's
``StochasticDepth`` multiplies a branch by zero that has been computed already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck

from locsgd_dist.baselines.baseline import Baseline
from locsgd_dist.data.hashing import hash64
from locsgd_dist.step import Tally

_STREAM = 0x5D  # keeps these draws apart from others of the same seed


@dataclass(frozen=True)
class StochasticDepthConfig:
    """Residual blocks skipped at random, for a whole batch at a time."""

    survival: float = 1.0
    """Probability that the last residual block runs in a step, falling linearly from 1 at the input; 1 = off; in
    (0, 1]. Published: 0.5."""

    def __post_init__(self) -> None:
        if not 0 < self.survival <= 1:
            raise ValueError(f"stochastic_depth.survival must lie in (0, 1], got {self.survival}")


class DroppableBlock(nn.Module):
    """A residual block that can be skipped: ``activation(shortcut + branch)``.

    It stands in for a block of torchvision by taking over that block's class, so that submodules, hooks and names stay.

    Attributes:
        dropped: the next passes run the shortcut only, whatever the mode.
        survival: probability of running in a training step; in evaluation the branch is scaled by it.
    """

    dropped: bool
    survival: float

    def forward(self, x: Tensor) -> Tensor:
        if self.dropped:
            return self.activation(self.shortcut(x))
        # The branch first: layers keep the order in which the plain block runs them.
        branch = self.branch(x)
        if not self.training:
            branch = branch * self.survival
        return self.activation(self.shortcut(x) + branch)

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def shortcut(self, x: Tensor) -> Tensor:
        return x

    def activation(self, x: Tensor) -> Tensor:
        return x

    def last_norm(self) -> nn.Module:
        """The normalisation that ends the branch."""
        raise NotImplementedError

    def branch_parameters(self) -> list[nn.Parameter]:
        """Parameters that a dropped block does not use."""
        return list(self.parameters())


class _DroppableResNetBlock(DroppableBlock):
    relu: nn.Module
    downsample: nn.Module | None

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def activation(self, x: Tensor) -> Tensor:
        # `relu` works in place, which must not reach a shortcut that is the block's own input.
        return torch.relu(x) if self.dropped else self.relu(x)

    def branch_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not name.startswith("downsample.")]


class DroppableBasicBlock(_DroppableResNetBlock, BasicBlock):
    conv1: nn.Module
    conv2: nn.Module
    bn1: nn.Module
    bn2: nn.Module

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def last_norm(self) -> nn.Module:
        return self.bn2


class DroppableBottleneck(_DroppableResNetBlock, Bottleneck):
    conv1: nn.Module
    conv2: nn.Module
    conv3: nn.Module
    bn1: nn.Module
    bn2: nn.Module
    bn3: nn.Module

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(self.relu(self.bn2(self.conv2(x)))))

    def last_norm(self) -> nn.Module:
        return self.bn3


class DroppableInvertedResidual(DroppableBlock, InvertedResidual):
    conv: nn.Sequential

    def branch(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def last_norm(self) -> nn.Module:
        return self.conv[-1]


_DROPPABLE: dict[type[nn.Module], type[DroppableBlock]] = {
    BasicBlock: DroppableBasicBlock,
    Bottleneck: DroppableBottleneck,
    InvertedResidual: DroppableInvertedResidual,
}


def with_droppable_blocks(model: nn.Module, config: StochasticDepthConfig) -> nn.Module:
    """Makes the residual blocks of ``model`` droppable, in place, and returns it; nothing where survival is 1.

    Block ``l`` of ``L`` in definition order survives with probability ``1 - l/L * (1 - survival)``, l = 1 ... L.
    Blocks of MobileNetV2 without a shortcut cannot be skipped and do not count.

    Raises:
        ValueError: the network has no residual block of a known kind.
    """
    if config.survival == 1:
        return model
    blocks = [
        module for module in model.modules() if type(module) in _DROPPABLE and getattr(module, "use_res_connect", True)
    ]
    if not blocks:
        raise ValueError(
            "stochastic_depth.survival < 1 needs residual blocks of torchvision's ResNets or MobileNetV2 (the CIFAR "
            f"resnet18 has them too), {type(model).__name__} has none"
        )
    for position, block in enumerate(blocks, start=1):
        block.__class__ = _DROPPABLE[type(block)]
        assert isinstance(block, DroppableBlock)
        block.dropped = False
        block.survival = 1 - position / len(blocks) * (1 - config.survival)
    return model


@torch.no_grad()
def fold_survival(model: nn.Module) -> None:
    """Turns droppable blocks back into plain ones that compute the same in evaluation mode.

    The survival probability goes into the weight and bias of the normalisation that ends the branch.
    """
    plain: dict[type[nn.Module], type[nn.Module]] = {droppable: kind for kind, droppable in _DROPPABLE.items()}
    for block in droppable_blocks(model):
        for parameter in block.last_norm().parameters():
            parameter.mul_(block.survival)
        del block.dropped, block.survival
        block.__class__ = plain[type(block)]  # type: ignore[assignment]


def droppable_blocks(model: nn.Module) -> list[DroppableBlock]:
    return [module for module in model.modules() if isinstance(module, DroppableBlock)]


class StochasticDepth(Baseline):
    """Draws the blocks of each step. The draw is a function of (seed, samples seen): alike on all ranks, and after a
    resume.

    Args:
        blocks: the network's droppable blocks.
        seed: of the draws.
    """

    def __init__(self, blocks: Sequence[DroppableBlock], seed: int):
        self._blocks = list(blocks)
        self._seed = seed
        self.skipped = set()

    def draw(self, samples_seen: int) -> list[bool]:
        """Whether each block is dropped in the step that starts after ``samples_seen`` samples."""
        generator = torch.Generator().manual_seed(hash64(self._seed, samples_seen, _STREAM))
        uniform = torch.rand(len(self._blocks), generator=generator, dtype=torch.float64).tolist()
        return [u >= block.survival for u, block in zip(uniform, self._blocks, strict=True)]

    @contextmanager
    def step(self, samples_seen: int, tally: Tally | None = None) -> Iterator[None]:
        assert self.skipped is not None
        for block, dropped in zip(self._blocks, self.draw(samples_seen), strict=True):
            block.dropped = dropped
            if dropped:
                self.skipped.update(block.branch_parameters())
        try:
            yield
        finally:
            # Evaluation and trial steps run the whole network.
            for block in self._blocks:
                block.dropped = False
            self.skipped.clear()
