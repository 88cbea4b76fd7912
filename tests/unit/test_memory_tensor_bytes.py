"""Live tensor bytes against closed forms, against torch's own MemTracker, and CPU against meta."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from locsgd_dist.memory.tensor_bytes import (
    CUDA_ALLOCATION_BYTES,
    TensorByteTracker,
    optimizer_state_tensors,
    saved_activation_bytes,
)
from locsgd_dist.models import resnet18, vgg13

FLOAT = 4
LAYERS = (nn.Conv2d, nn.Linear)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def freeze_before(model: nn.Module, images: Tensor, boundary: int) -> None:
    """Switch gradients off for the layers before ``boundary``, in execution order, and the norms behind them."""
    order: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: order.append(module))
        for module in model.modules()
        if isinstance(module, (*LAYERS, nn.BatchNorm2d))
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    layer = -1
    for module in order:
        layer += isinstance(module, LAYERS)
        for parameter in module.parameters():
            parameter.requires_grad_(layer >= boundary)


class Training:
    """A network, its data and a plain SGD step, on the device that is the default while it is made."""

    def __init__(self, make: Callable[[], nn.Module], batch: int, side: int, boundary: int = 0) -> None:
        self.model = make()
        self.images = torch.ones(batch, 3, side, side)
        self.targets = torch.zeros(batch, dtype=torch.long)
        freeze_before(self.model, self.images, boundary)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, lr=0.1, momentum=0.9)

    def step(self) -> None:
        nn.functional.cross_entropy(self.model(self.images), self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak(self, rounding: int = 1) -> int:
        """Peak of the second step, the first that begins with momentum."""
        self.step()
        tracker = TensorByteTracker(rounding=rounding)
        tracker.baseline([*self.model.parameters(), *self.model.buffers()])
        tracker.baseline(optimizer_state_tensors(self.optimizer))
        with tracker:
            self.step()
        return tracker.peak_bytes


# --- what counts --------------------------------------------------------------------------------------------------


def test_storages_count_once_from_birth_to_release() -> None:
    with TensorByteTracker() as tracker:
        a = torch.zeros(10, 10)
        views = [a.view(100), a[2:], a.t()]
        assert tracker.current_bytes == 400
        a.add_(1)
        assert tracker.current_bytes == 400
        b = a * 2
        assert tracker.current_bytes == 800
        del a
        assert tracker.current_bytes == 800  # the views still hold it
        del views
        assert tracker.current_bytes == 400
        del b
        assert tracker.current_bytes == 0
    assert tracker.peak_bytes == 800


def test_a_resized_storage_counts_at_its_new_size() -> None:
    with TensorByteTracker() as tracker:
        a = torch.zeros(10)
        a.resize_(100)
        assert tracker.current_bytes == 400
    del a
    assert tracker.current_bytes == 0


def test_older_tensors_were_there_all_along() -> None:
    """The first operation that reads one comes after the peak; the peak must include it nevertheless."""
    older, named = torch.ones(1000), torch.ones(10)
    tracker = TensorByteTracker()
    tracker.baseline([named, named.view(2, 5)])
    with tracker:
        temporary = torch.zeros(500)
        del temporary
        older.sum()
    assert tracker.peak_bytes == 4 * (10 + 500 + 1000)


def test_reset_and_reentry() -> None:
    tracker = TensorByteTracker()
    with tracker:
        kept = torch.zeros(100)
        torch.zeros(900)
    assert tracker.peak_bytes == 4000
    tracker.reset_peak()
    assert tracker.peak_bytes == 400
    with tracker:
        torch.zeros(5)
    assert tracker.peak_bytes == 420
    del kept
    assert tracker.current_bytes == 0


def test_rounding_is_per_storage() -> None:
    with TensorByteTracker(rounding=CUDA_ALLOCATION_BYTES) as tracker:
        small, exact, above = torch.zeros(1), torch.zeros(128), torch.zeros(129)
        assert tracker.current_bytes == 512 + 512 + 1024
        assert len({t.numel() for t in (small, exact, above)}) == 3
    with pytest.raises(ValueError, match="at least 1 byte, got 0"):
        TensorByteTracker(rounding=0)


def test_tensors_without_a_storage_do_no_harm() -> None:
    with TensorByteTracker() as tracker:
        dense = torch.eye(3)
        sparse = dense.to_sparse()
        assert torch.equal((sparse * 2).to_dense(), dense * 2)
    assert tracker.peak_bytes >= dense.numel() * FLOAT


def test_a_failing_step_leaves_torch_as_it_was() -> None:
    tracker = TensorByteTracker()
    with pytest.raises(RuntimeError), tracker:
        torch.ones(2, 3) @ torch.ones(2, 3)
    before = tracker.peak_bytes
    torch.zeros(10_000)
    assert tracker.peak_bytes == before


def test_the_tracker_holds_on_to_nothing() -> None:
    training = Training(lambda: resnet18(10, width=2), batch=2, side=32)
    tracker = TensorByteTracker()
    with tracker:
        training.step()
    del training
    gc.collect()
    assert tracker.current_bytes == 0


# --- closed forms -------------------------------------------------------------------------------------------------


def test_peak_of_a_chain_of_activations() -> None:
    """K saved results of n bytes, the input, and the first gradient in backward; loss and its gradient are scalars."""
    num_ops, elements = 6, 1000
    x = torch.ones(elements, requires_grad=True)
    with TensorByteTracker() as tracker:
        y = x
        for _ in range(num_ops):
            y = torch.tanh(y)
        loss = y.sum()
        del y
        loss.backward()
    assert tracker.peak_bytes == (1 + num_ops + 1) * elements * FLOAT + 2 * FLOAT


@pytest.mark.parametrize(
    ("options", "copies", "scalars"),
    [
        ({}, 2, 2),  # weights, gradients; the peak is at backward's end, where loss and its gradient still live
        ({"momentum": 0.9}, 3, 2),
        ({"momentum": 0.9, "weight_decay": 0.1}, 4, 0),  # the optimizer makes a decayed copy of the gradient
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_of_a_step_with_one_large_layer(options: dict[str, float], copies: int, scalars: int, device: str) -> None:
    with torch.device(device):
        model = nn.Linear(300, 400, bias=False)
        images = torch.ones(1, 300)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)

    def step() -> None:
        model(images).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    tracker = TensorByteTracker()
    tracker.baseline(optimizer_state_tensors(optimizer))
    with tracker:
        step()
    assert tracker.peak_bytes == (copies * 300 * 400 + 300 + scalars) * FLOAT


def conv_net() -> nn.Sequential:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    return nn.Sequential(*block(3, 4), *block(4, 5), *block(5, 6), nn.Flatten(), nn.Linear(6 * 64, 7))


def conv_net_saved_bytes(batch: int, boundary: int) -> int:
    """What backward needs of :func:`conv_net` on 8x8 images.

    A convolution needs its input (the image, or the result that the ReLU before it keeps as well), a norm its input
    and the batch's mean and deviation, a ReLU its result, the linear layer its input; from ``boundary`` on only.
    """
    pixels = batch * 64
    saved = 0
    inputs, outputs = (3, 4, 5), (4, 5, 6)
    for layer in range(boundary, 3):
        if layer == boundary:
            saved += inputs[layer] * pixels
        saved += outputs[layer] * pixels + 2 * outputs[layer] + outputs[layer] * pixels
    if boundary == 3:
        saved += outputs[-1] * pixels
    return saved * FLOAT


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("boundary", [0, 1, 2, 3])
def test_saved_activations_of_a_small_network(device: str, boundary: int) -> None:
    batch = 3
    with torch.device(device):
        model, images = conv_net(), torch.ones(batch, 3, 8, 8)
    freeze_before(model, images, boundary)
    model_tensors = [*model.parameters(), *model.buffers()]
    expected = conv_net_saved_bytes(batch, boundary)
    assert saved_activation_bytes(lambda: model(images).sum(), excluded=model_tensors) == expected

    tracker = TensorByteTracker()
    tracker.baseline(model_tensors)
    with tracker:
        loss = model(images).sum()
    image_bytes = 0 if boundary == 0 else num_bytes([images])  # alive, though nothing saves it
    assert tracker.current_bytes == num_bytes([*model_tensors, loss]) + expected + image_bytes


def test_a_frozen_network_saves_nothing() -> None:
    model = conv_net().requires_grad_(False)
    assert saved_activation_bytes(lambda: model(torch.ones(2, 3, 8, 8)).sum()) == 0


def test_optimizer_state_tensors_are_all_of_them() -> None:
    parameters = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7, 3))]
    optimizer = torch.optim.AdamW(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert sorted(t.numel() for t in optimizer_state_tensors(optimizer)) == [1, 1, 5, 5, 21, 21]


# --- whole networks -----------------------------------------------------------------------------------------------

NETWORKS = {
    "resnet18": (lambda: resnet18(10, width=4), 32, (0, 15, 20)),
    "vgg13": (lambda: vgg13(10, width=4), 32, (0, 5, 8)),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.25), 32, (0, 39)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_cpu_and_meta_agree_to_the_byte(name: str) -> None:
    make, side, boundaries = NETWORKS[name]
    peaks = []
    for boundary in boundaries:
        real = Training(make, batch=3, side=side, boundary=boundary).peak()
        with torch.device("meta"):
            assert Training(make, batch=3, side=side, boundary=boundary).peak() == real
        peaks.append(real)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_torchs_own_tracker_agrees_without_a_frozen_prefix(name: str) -> None:
    """MemTracker fails on frozen parameters, and leaves out the batch, which it is not told of."""
    make, side, _ = NETWORKS[name]
    training = Training(make, batch=2, side=side)
    ours = training.peak()
    theirs = MemTracker()
    theirs.track_external(training.model, training.optimizer)
    with theirs:
        training.step()
    (snapshot,) = theirs.get_tracker_snapshot("peak").values()
    assert ours == snapshot["Total"] + num_bytes([training.images, training.targets])


def test_adamw_on_meta_with_its_counters_on_the_host() -> None:
    def peak(device: str) -> int:
        model = nn.Linear(30, 40).to(device)
        optimizer = torch.optim.AdamW(model.parameters())
        tracker = TensorByteTracker()
        for _ in range(2):
            tracker = TensorByteTracker()
            tracker.baseline([*model.parameters(), *optimizer_state_tensors(optimizer)])
            with tracker:
                model(torch.ones(2, 30, device=device)).sum().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return tracker.peak_bytes

    assert peak("cpu") == peak("meta") > 4 * num_bytes(nn.Linear(30, 40).parameters())


@pytest.mark.parametrize(("boundary", "gib"), [(0, 5.37), (10, 3.36), (27, 1.46), (40, 0.82)])
def test_resnet50_at_batch_64_as_published(boundary: int, gib: float) -> None:
    with torch.device("meta"):
        training = Training(torchvision.models.resnet50, batch=64, side=224, boundary=boundary)
    assert training.peak(CUDA_ALLOCATION_BYTES) / 2**30 == pytest.approx(gib, abs=0.005)


@pytest.mark.parametrize("boundary", [0, 10])
def test_results_do_not_change(boundary: int) -> None:
    results = []
    for tracked in (False, True):
        torch.manual_seed(0)
        training = Training(lambda: resnet18(10, width=4), batch=4, side=32, boundary=boundary)
        training.images = torch.randn(4, 3, 32, 32)
        for _ in range(3):
            if tracked:
                with TensorByteTracker():
                    training.step()
            else:
                training.step()
        results.append(training.model.state_dict())
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key
