"""A refresh step against plain autograd: the same gradients and running statistics, fewer activations kept."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.models.cifar import resnet18, vgg13

NETWORKS = {
    "resnet18": lambda: resnet18(10, width=8),
    "vgg13": lambda: vgg13(10, width=8),
    "torchvision_resnet34": lambda: torchvision.models.resnet34(num_classes=10),
    "torchvision_resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10, dropout=0.0),
}
SHARES = [0.5, 0.75, 1.0]


def images(side: int = 32, batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, 3, side, side, generator=generator), torch.arange(batch) % 10


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


def at_share(model: nn.Module, share: float, x: Tensor) -> LocalizedLearner:
    learner = LocalizedLearner(model, x[:1], rule="hebbian")
    learner.advance(int(share * len(learner.layers)))
    return learner


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_and_statistics_are_those_of_plain_autograd(network: str, share: float, recompute: bool) -> None:
    torch.manual_seed(0)
    plain = NETWORKS[network]().train()
    model = copy.deepcopy(plain)
    x, y = images()
    learner = at_share(model, share, x)
    backward(plain, x, y)
    with learner.refreshing(recompute=recompute):
        backward(model, x, y)
    for (name, expected), parameter in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert parameter.grad is not None, name
        if recompute:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
        else:
            assert torch.equal(parameter.grad, expected.grad), name
    for (name, expected), buffer in zip(plain.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def test_nothing_is_gathered_and_the_mode_ends() -> None:
    model = resnet18(10, width=8).train()
    x, y = images()
    learner = at_share(model, 0.75, x)
    with learner.refreshing(recompute=True):
        backward(model, x, y)
    assert not learner.deltas
    assert not any(p.requires_grad for p in learner.released)
    assert not any("forward" in module.__dict__ for module in model.modules())
    learner.layers[0].weight.grad = None
    backward(model, x, y)
    assert len(learner.deltas) == learner.boundary
    assert learner.layers[0].weight.grad is None


def test_a_layer_that_the_caller_froze_stays_frozen() -> None:
    model = resnet18(10, width=8).train()
    model.conv1.weight.requires_grad_(False)
    x, y = images()
    learner = at_share(model, 0.5, x)
    with learner.refreshing():
        backward(model, x, y)
    assert model.conv1.weight.grad is None
    assert not any(p is model.conv1.weight for p in learner.released)


def saved_bytes(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes of distinct storages that autograd holds when the forward pass is over, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(x), y)
    del loss
    return sum(held.values())


@pytest.mark.parametrize("network", NETWORKS)
def test_recomputation_keeps_less_of_the_region(network: str) -> None:
    model = NETWORKS[network]().train()
    x, y = images(side=64)
    learner = at_share(model, 0.75, x)
    localized = saved_bytes(model, x, y)
    with learner.refreshing():
        full = saved_bytes(model, x, y)
    with learner.refreshing(recompute=True):
        recomputed = saved_bytes(model, x, y)
    assert localized < recomputed
    # At least half of what the region would keep is not kept.
    assert recomputed - localized < 0.5 * (full - localized)


def test_dropout_draws_the_same_mask_again() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    model = nn.Sequential(block, nn.Linear(16, 4)).train()
    plain = copy.deepcopy(model)
    x, y = torch.randn(8, 16), torch.arange(8) % 4
    learner = LocalizedLearner(model, x, rule="frozen")
    learner.advance(2)
    torch.manual_seed(3)
    backward(plain, x, y)
    torch.manual_seed(3)
    with learner.refreshing(recompute=True):
        backward(model, x, y)
    for expected, parameter in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_a_block_whose_forward_was_replaced_keeps_it() -> None:
    """Set on the block itself, as wrappers do, and not by its class: the next step runs it too."""
    model = resnet18(10, width=8).train()
    x, y = images()
    learner = at_share(model, 0.75, x)
    block = next(module for module in model.modules() if type(module).__name__ == "BasicBlock")
    plain, runs = block.forward, []

    def counted(x: Tensor) -> Tensor:
        runs.append(1)
        return plain(x)

    block.forward = counted
    for _ in range(2):
        with learner.refreshing(recompute=True):
            backward(model, x, y)
    assert block.__dict__["forward"] is counted
    assert len(runs) == 4  # each step runs it forward, and anew in the backward pass
