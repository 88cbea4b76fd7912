"""The configurations of the paper's benchmarks hold its settings (METHOD: appendix 6.1, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from locsgd_dist.config import packaged_configs, parse_config
from locsgd_dist.optimization import lr_at


class Setting(NamedTuple):
    """As the paper states it; what it divides a rate by is given as the factor."""

    epochs: int
    lr: float
    lr_factor: float | None
    """At the end of every ``lr_epochs``; None: one cosine over the whole run."""
    lr_epochs: int
    weight_decay: float
    policy: str


CIFAR10 = Setting(90, 0.05, 0.1, 10, 5e-4, "fixed")
CIFAR100 = Setting(150, 0.025, 0.5, 20, 5e-4, "fixed")
SETTINGS = {
    "cifar10/resnet18": CIFAR10,
    "cifar10/vgg13": CIFAR10,
    "cifar100/resnet18": CIFAR100,
    "cifar100/vgg13": CIFAR100,
    # Four GPUs with 64 images each; their variable batch.
    "imagenet/resnet34": Setting(90, 0.1, 0.1, 30, 4e-5, "halving"),
    "imagenet/resnet50": Setting(90, 0.1, 0.1, 30, 4e-5, "halving"),
    "imagenet/mobilenet_v2": Setting(150, 0.05, None, 150, 4e-5, "halving"),
    "imagenet/resnet34_1gpu": Setting(90, 0.025, 0.1, 30, 4e-5, "fixed"),
    "imagenet/resnet50_1gpu": Setting(90, 0.025, 0.1, 30, 4e-5, "fixed"),
    "imagenet/mobilenet_v2_1gpu": Setting(150, 0.0125, None, 150, 4e-5, "fixed"),
}


def test_every_benchmark_of_the_paper_has_its_configuration() -> None:
    assert {
        name
        for name in packaged_configs()
        if name.startswith(("cifar10/", "cifar100/", "imagenet/")) and name != "cifar10/screen"
    } == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_those_of_the_paper(name: str) -> None:
    config, paper = parse_config(["--config", name]), SETTINGS[name]
    dataset, network = name.removesuffix("_1gpu").split("/")
    assert (config.model.name, config.model.width, config.model.weights) == (network, None, None)
    assert config.data.name == ("imagefolder" if dataset == "imagenet" else dataset)
    assert config.data.augmentation == ("imagenet_paper" if dataset == "imagenet" else "auto")
    assert config.data.train_samples is None
    assert (config.batch.per_gpu, config.batch.policy) == (64, paper.policy)
    assert (config.train.epochs, config.train.gradient_accumulation) == (paper.epochs, 1)

    assert (config.optim.name, config.optim.momentum, config.optim.nesterov) == ("sgd", 0.9, False)
    assert (config.optim.weight_decay, config.optim.label_smoothing) == (paper.weight_decay, 0)
    rates = [lr_at(config.optim, epoch, paper.epochs) for epoch in range(paper.epochs)]
    if paper.lr_factor is None:
        # A cosine is symmetric about its middle, where it has come half the way down.
        assert rates[0] == pytest.approx(paper.lr)
        assert rates[paper.epochs // 2] == pytest.approx(paper.lr / 2)
        assert all(a + b == pytest.approx(paper.lr) for a, b in zip(rates[1:], reversed(rates[1:]), strict=True))
        assert rates[paper.epochs // 3] == pytest.approx(paper.lr * 3 / 4)
    else:
        expected = [paper.lr * paper.lr_factor ** (epoch // paper.lr_epochs) for epoch in range(paper.epochs)]
        assert rates == pytest.approx(expected)

    local_factor = 0.1 if dataset == "imagenet" else 0.5
    assert config.localized.rule == "hebbian"
    assert [config.localized.lr_at(epoch) for epoch in range(paper.epochs)] == pytest.approx(
        [0.01 * local_factor ** (epoch // 30) for epoch in range(paper.epochs)]
    )
    assert config.localized.weak_supervision
    assert (config.localized.batch_fraction, config.localized.refresh_every) == (1, 0)
    selection = config.selection
    assert (selection.kind, selection.alpha, selection.lmax, selection.window) == ("dynamic", 0.95, 0.75, "printed")
    # A recurring block; figure 4 fits five layers at a time.
    assert selection.tshift == (5 if network == "resnet50" else "block")
    # The strategies that the paper compares with are overlays.
    assert (config.stochastic_depth.survival, config.pruning.every_epochs) == (1, 0)
