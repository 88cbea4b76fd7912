"""The localized region against plain autograd on the same weights, and the updates that it gathers."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision.models
from localized_networks import PlainConvolutions, build, loss_of, plain_learner
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from locsgd_dist.localized import LocalizedConfig, LocalizedLearner, LocalizedRule, make_rule
from locsgd_dist.optimization import OptimConfig, lr_at

SGD_NETWORKS = ["cifar_resnet18", "cifar_vgg13", "resnet34", "resnet50", "mobilenet_v2", "vision_transformer"]


def boundaries(num_layers: int) -> list[int]:
    return sorted({1, num_layers // 2, 3 * num_layers // 4, num_layers - 1})


@pytest.mark.parametrize("rule", ["frozen", "hebbian"])
@pytest.mark.parametrize("name", SGD_NETWORKS)
def test_gradients_of_the_sgd_region_are_those_of_plain_autograd(name: str, rule: str) -> None:
    model, x = build(name)
    plain = copy.deepcopy(model)
    loss_of(plain, x).backward()
    learner = LocalizedLearner(model, x[:1], rule=rule)
    for boundary in boundaries(len(learner.layers)):
        learner.advance(boundary)
        model.zero_grad()
        loss_of(model, x).backward()
        localized = learner.layers.parameters(0, boundary)
        for key, parameter in model.named_parameters():
            if key in localized:
                assert parameter.grad is None
                assert not parameter.requires_grad
            else:
                torch.testing.assert_close(parameter.grad, plain.get_parameter(key).grad, rtol=1e-4, atol=1e-6)


def saved_before(model: nn.Module, learner: LocalizedLearner, x: Tensor) -> dict[int, int]:
    """Number of tensors, parameters excluded, saved for backward while each layer was the last to have begun."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    begun = -1
    counts: dict[int, int] = {}

    def begin(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal begun
        begun += 1

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in parameters:
            counts[begun] = counts.get(begun, 0) + 1
        return tensor

    handles = [layer.module.register_forward_pre_hook(begin) for layer in learner.layers]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, x)
    for handle in handles:
        handle.remove()
    assert begun == len(learner.layers) - 1
    return counts


@pytest.mark.parametrize("rule", ["frozen", "hebbian", "random"])
@pytest.mark.parametrize("name", [*SGD_NETWORKS, "timm_vision_transformer", "timm_swin"])
def test_nothing_of_the_localized_region_is_saved_for_backward(name: str, rule: str) -> None:
    model, x = build(name, batch=2 if name.startswith("timm") else 4)
    learner = LocalizedLearner(model, x[:1], rule=rule)
    assert saved_before(model, learner, x)[0] > 0
    for boundary in boundaries(len(learner.layers)):
        learner.advance(boundary)
        counts = saved_before(model, learner, x)
        assert min(counts) >= boundary
        assert counts[boundary] > 0


def test_a_whole_network_of_localized_layers_saves_nothing_and_needs_no_gradient() -> None:
    model, x = build("cifar_resnet18")
    learner = LocalizedLearner(model, x[:1])
    learner.advance(len(learner.layers))
    loss = loss_of(model, x)
    assert not loss.requires_grad
    learner.apply()
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("rule", ["hebbian", "anti_hebbian", "random"])
@pytest.mark.parametrize("name", ["cifar_resnet18", "mobilenet_v2", "vision_transformer", "sequence", "volume"])
def test_only_weights_of_localized_layers_move(name: str, rule: str) -> None:
    model, x = build(name)
    learner = LocalizedLearner(model, x[:1], rule=rule, lr=0.1)
    boundary = 3 * len(learner.layers) // 4
    learner.advance(boundary)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loss_of(model, x).backward()
    learner.apply()
    weights = {f"{layer.name}.weight" for layer in learner.layers[:boundary] if layer.updatable}
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == weights
    assert [f"{layer.name}.weight" for layer in learner.updated_layers] == [
        f"{layer.name}.weight" for layer in learner.layers if f"{layer.name}.weight" in weights
    ]


def test_running_statistics_of_localized_batch_norms_go_on() -> None:
    model, x = build("cifar_resnet18")
    reference = copy.deepcopy(model)
    learner = LocalizedLearner(model, x[:1])
    learner.advance(15)
    with torch.no_grad():
        reference(x)
    loss_of(model, x).backward()
    for key, buffer in reference.named_buffers():
        torch.testing.assert_close(model.get_buffer(key), buffer, rtol=1e-6, atol=1e-7)


def test_attention_is_left_alone_while_the_mlp_beside_it_learns() -> None:
    model, x = build("vision_transformer")
    learner = LocalizedLearner(model, x[:1])
    learner.advance(4)
    names = [layer.name.rsplit(".", 1)[-1] for layer in learner.updated_layers]
    assert names == ["conv_proj", "0", "3"]
    before = copy.deepcopy(model.state_dict())
    loss_of(model, x).backward()
    learner.apply()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    block = "encoder.layers.encoder_layer_0"
    assert moved == {"conv_proj.weight", f"{block}.mlp.0.weight", f"{block}.mlp.3.weight"}


def test_micro_batches_add_up_to_one_large_batch() -> None:
    """In a network without batch norm: localized updates and gradients alike."""
    whole, x = build("plain", batch=8)
    parts = copy.deepcopy(whole)
    learners = [LocalizedLearner(model, x[:1], lr=0.1) for model in (whole, parts)]
    for step in range(3):
        for learner in learners:
            learner.advance(step)
        whole.zero_grad()
        parts.zero_grad()
        whole(x).square().sum().backward()
        for micro_batch in x.chunk(4):
            parts(micro_batch).square().sum().backward()
        for index, delta in learners[0].deltas.items():
            torch.testing.assert_close(learners[1].deltas[index], delta, rtol=1e-4, atol=1e-4)
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)
        for learner in learners:
            learner.apply()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
    assert [learner.num_steps for learner in learners] == [3, 3]


def test_an_in_place_activation_does_not_reach_the_update() -> None:
    in_place, x = build("plain")
    apart = copy.deepcopy(in_place)
    apart.relu = nn.ReLU(inplace=False)
    deltas = []
    for model in (in_place, apart):
        learner = LocalizedLearner(model, x[:1])
        learner.advance(3)
        model(x)
        deltas.append(learner.deltas)
    assert deltas[0].keys() == deltas[1].keys() == {0, 1, 2}
    for index in deltas[0]:
        assert torch.equal(deltas[0][index], deltas[1][index])


def test_evaluation_gathers_nothing() -> None:
    model, learner, x = plain_learner()
    model.eval()
    model(x)
    assert not learner.deltas
    model.train()
    model(x)
    assert learner.deltas.keys() == {0, 1}


def test_what_is_discarded_leaves_no_trace() -> None:
    model, learner, x = plain_learner()
    model(x)
    before = {index: delta.clone() for index, delta in learner.deltas.items()}
    with learner.discarding():
        with learner.discarding():
            model(x)
        model(x)
    with pytest.raises(KeyError), learner.discarding():
        raise KeyError
    assert all(torch.equal(learner.deltas[index], delta) for index, delta in before.items())
    model(x)
    assert all(torch.equal(learner.deltas[index], 2 * delta) for index, delta in before.items())


def test_gather_only_computes_the_layers_asked_for() -> None:
    model, learner, x = plain_learner(boundary=3)
    learner.gather_only(i for i in (0, 2))
    model(x)
    assert learner.deltas.keys() == {0, 2}
    learner.gather_only([])
    learner.apply()
    model(x)
    assert not learner.deltas
    learner.gather_only(None)
    model(x)
    assert learner.deltas.keys() == {0, 1, 2}


@pytest.mark.parametrize(("fraction", "samples"), [(1.0, 8), (0.5, 4), (0.3, 2), (0.125, 1), (0.01, 1)])
def test_batch_fraction_takes_the_first_samples(fraction: float, samples: int) -> None:
    model, x = build("plain", batch=8)
    learner = LocalizedLearner(model, x[:1], batch_fraction=fraction)
    learner.advance(2)
    model(x)
    part = dict(learner.deltas)
    learner.batch_fraction = 1.0
    learner.apply()
    model, _ = build("plain", batch=8)  # the same weights again
    whole = LocalizedLearner(model, x[:1])
    whole.advance(2)
    model(x[:samples])
    for index, delta in whole.deltas.items():
        torch.testing.assert_close(part[index], delta, rtol=1e-5, atol=1e-5)


def test_a_step_gathered_over_n_steps_is_n_times_as_long() -> None:
    model, learner, x = plain_learner(lr=0.01)
    before = model.conv1.weight.clone()
    for _ in range(8):
        model(x)
    learner.apply(num_steps=8)
    assert (model.conv1.weight - before).norm().item() == pytest.approx(0.08, rel=1e-4)
    assert learner.num_steps == 8
    assert not learner.deltas


def test_applying_nothing_moves_nothing() -> None:
    model, learner, _ = plain_learner()
    before = copy.deepcopy(model.state_dict())
    learner.apply()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert learner.num_steps == 1


def test_a_rule_object_is_taken_as_it_is() -> None:
    rule: LocalizedRule = make_rule("random", seed=5)
    _, learner, _ = plain_learner(rule=rule)
    assert learner.rule is rule


@pytest.mark.parametrize("rule", ["hebbian", "anti_hebbian", "random"])
def test_a_step_on_meta_tensors_waits_for_no_number(rule: str) -> None:
    """A tensor without data has no value to wait for: whatever asked for one would raise."""
    with torch.device("meta"):
        model = torchvision.models.resnet18(num_classes=10)
        x = torch.zeros(4, 3, 32, 32)
    with pytest.raises(RuntimeError):
        x.sum().item()
    learner = LocalizedLearner(model, x, rule=rule)
    learner.advance(10)
    model(x).sum().backward()
    assert len(learner.deltas) == 10
    learner.apply()


def test_a_step_on_fake_tensors_waits_for_no_number() -> None:
    with FakeTensorMode():
        model = PlainConvolutions()
        x = torch.randn(4, 3, 8, 8)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            x.sum().item()
        learner = LocalizedLearner(model, x)
        learner.advance(3)
        model(x).sum().backward()
        assert learner.deltas.keys() == {0, 1, 2}
        learner.apply()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": ""}, "localized.rule must be"),
        ({"lr": 0.0}, "localized.lr must be > 0 and finite, got 0.0"),
        ({"lr": float("nan")}, "localized.lr must be > 0 and finite, got nan"),
        ({"lr_decay": 1.5}, "localized.lr_decay must lie in (0, 1], got 1.5"),
        ({"lr_decay": 0.0}, "localized.lr_decay must lie in (0, 1], got 0.0"),
        ({"lr_decay_epochs": 0}, "localized.lr_decay_epochs must be >= 1, got 0"),
        ({"batch_fraction": 0.0}, "localized.batch_fraction must lie in (0, 1], got 0.0"),
        ({"batch_fraction": 1.01}, "localized.batch_fraction must lie in (0, 1], got 1.01"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"^localized\.") as error:
        LocalizedConfig(**options)  # type: ignore[arg-type]
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_localized_rate_falls_every_thirty_epochs() -> None:
    config = LocalizedConfig(lr=0.01, lr_decay=0.1, lr_decay_epochs=30)
    rates = [config.lr_at(epoch) for epoch in (0, 29, 30, 59, 60, 89)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_the_localized_rate_follows_the_sgd_regions() -> None:
    config = LocalizedConfig(lr=0.01, lr_schedule="optim", lr_decay=0.1, lr_decay_epochs=1)
    optim = OptimConfig(lr=0.05, schedule="step", step_epochs=10, warmup_epochs=2)
    rates = [config.lr_at(int(epoch), rate=lr_at(optim, epoch, 40) / optim.lr) for epoch in (0, 1, 2, 9.9, 10, 39)]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.01, 0.001, 0.00001])


def test_the_localized_rate_can_be_the_length_of_an_epoch() -> None:
    config = LocalizedConfig(lr=0.6, lr_per="epoch", lr_decay=0.5, lr_decay_epochs=30)
    assert [config.lr_at(epoch, steps_per_epoch=40) for epoch in (0, 30)] == pytest.approx([0.015, 0.0075])
