"""What the distributed tests compare with: small networks, and their training in one process by plain torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5
#: Layers of :class:`PlainNet` in execution order.
LAYERS = ("conv1", "conv2", "conv3", "conv4", "fc")

Weights = dict[str, np.ndarray]


class PlainNet(nn.Module):
    """Four convolutions (strided and grouped, depthwise) and a classifier; nothing couples samples of a batch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
            self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False)
            self.conv3 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.conv4 = nn.Conv2d(8, 6, 1, bias=False)
            self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for name in LAYERS[:-1]:
            # In place, as networks in the wild do: a localized update must have seen the output before.
            x = F.relu(getattr(self, name)(x), inplace=True)
        return self.fc(x.mean(dim=(2, 3)))

    def freeze(self, boundary: int) -> None:
        """Gradients for layers from ``boundary`` on only."""
        for index, name in enumerate(LAYERS):
            getattr(self, name).requires_grad_(index >= boundary)


class NormNet(nn.Sequential):
    """Three convolutions with batch norm and a classifier: 4 layers."""

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            blocks: list[nn.Module] = []
            for channels, width, stride in ((3, 6, 1), (6, 6, 2), (6, 8, 1)):
                blocks += [
                    nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
            super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``[count, 3, 8, 8]`` of unequal brightness and classes, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    images += torch.linspace(-1, 1, count)[:, None, None, None]
    return images, torch.randint(0, CLASSES, (count,), generator=generator)


def weights_of(model: nn.Module) -> Weights:
    """Parameters and buffers by name, apart from the network."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in model.state_dict().items()}


def gradients_of(model: nn.Module) -> Weights:
    """Gradients by parameter name, apart from the network."""
    return {n: p.grad.detach().cpu().numpy().copy() for n, p in model.named_parameters() if p.grad is not None}


class PlainTraining:
    """LoCal+SGD of a :class:`PlainNet` in one process: autograd, ``torch.optim.SGD`` and eq. 4 written out."""

    def __init__(
        self, model: PlainNet, *, lr: float = 0.05, local_lr: float = 0.02, label_smoothing: float = 0.0
    ) -> None:
        self.model = model
        self.local_lr = local_lr
        self.label_smoothing = label_smoothing
        self.boundary = 0
        self.deltas: dict[int, Tensor] = {}
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-2)

    def shift(self, boundary: int) -> None:
        self.boundary = boundary
        self.model.freeze(boundary)
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                parameter.grad = None
                self.optimizer.state.pop(parameter, None)

    def step(self, images: Tensor, targets: Tensor, shards: Sequence[Tensor] | None = None, *, apply: int = 1) -> None:
        """One step on a whole batch.

        Args:
            shards: what each localized layer's update is computed from (default: the whole batch).
            apply: 0 gathers updates for a later step; n applies what n steps have gathered.
        """
        for index in range(self.boundary):
            delta = local_update(self.model, index, images if shards is None else shards[index])
            self.deltas[index] = self.deltas[index] + delta if index in self.deltas else delta
        loss = F.cross_entropy(self.model(images), targets, label_smoothing=self.label_smoothing)
        if loss.requires_grad:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        if apply:
            self.apply(apply)

    @torch.no_grad()
    def apply(self, steps: int = 1) -> None:
        for index, delta in self.deltas.items():
            weight = getattr(self.model, LAYERS[index]).weight
            weight += steps * self.local_lr * delta / delta.square().sum().sqrt()
        self.deltas = {}


def local_update(model: PlainNet, index: int, images: Tensor) -> Tensor:
    """Eq. 3 of one layer on a batch: its weight's gradient with its own output in the place of the error."""
    layer = getattr(model, LAYERS[index])
    with torch.no_grad():
        a = images
        for name in LAYERS[:index]:
            a = F.relu(getattr(model, name)(a))
        if index == len(LAYERS) - 1:
            a = a.mean(dim=(2, 3))
    weight = layer.weight.detach().clone().requires_grad_()
    z = torch.func.functional_call(layer, {"weight": weight}, a)
    return torch.autograd.grad(z, weight, z.detach())[0]


def assert_close(actual: Weights, expected: Weights, *, rtol: float = 1e-5, atol: float = 2e-6) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=rtol, atol=atol, err_msg=name)


def assert_bit_equal(states: Sequence[Weights]) -> None:
    """Every rank's tensors, bit for bit."""
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        for name, value in states[0].items():
            assert value.tobytes() == state[name].tobytes(), f"{name} differs between ranks"
