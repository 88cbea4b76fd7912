"""Networks that are hard to foretell."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import DenseNet


class Branching(nn.Module):
    """Looks at its values to decide what to run."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.fc(x if x.sum().item() > 0 else -x)


def branching(num_classes: int) -> nn.Module:
    return Branching(num_classes)


def small_densenet(num_classes: int) -> nn.Module:
    """Each layer reads all before it in its block: what is saved for backward is shared, and concatenated anew."""
    return DenseNet(growth_rate=8, block_config=(3, 4, 3), num_init_features=16, num_classes=num_classes)
