"""The layer map against execution orders, owners and block sizes written down by hand, and torch's own FLOP counter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models
from localized_networks import NETWORKS, build, timm_swin, timm_vision_transformer, vision_transformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from locsgd_dist.localized import LayerMap, trace_layers
from locsgd_dist.models import resnet18, vgg13


def resnet_order(blocks: tuple[int, ...], convolutions: int, *, first_stage_has_shortcut: bool) -> list[str]:
    """torchvision's forward: a block's convolutions, then its shortcut."""
    names = ["conv1"]
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            names += [f"layer{stage}.{block}.conv{i + 1}" for i in range(convolutions)]
            if block == 0 and (stage > 1 or first_stage_has_shortcut):
                names.append(f"layer{stage}.0.downsample.0")
    return [*names, "fc"]


def mobilenet_v2_order() -> list[str]:
    names = ["features.0.0", "features.1.conv.0.0", "features.1.conv.1"]
    for block in range(2, 18):
        names += [f"features.{block}.conv.0.0", f"features.{block}.conv.1.0", f"features.{block}.conv.2"]
    return [*names, "features.18.0", "classifier.1"]


def vit_order(blocks: int) -> list[str]:
    inner = ("self_attention", "mlp.0", "mlp.3")
    layers = [f"encoder.layers.encoder_layer_{b}.{name}" for b in range(blocks) for name in inner]
    return ["conv_proj", *layers, "heads.head"]


def timm_vit_order(blocks: int) -> list[str]:
    inner = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    return ["patch_embed.proj", *(f"blocks.{b}.{name}" for b in range(blocks) for name in inner), "head"]


def on_meta(builder: Callable[[], nn.Module], side: int) -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        return builder(), torch.zeros(1, 3, side, side)


# Builder, image side, order of execution, block size.
FULL_SIZE: dict[str, tuple[Callable[[], nn.Module], int, list[str], int]] = {
    "cifar_resnet18": (lambda: resnet18(10), 32, resnet_order((2, 2, 2, 2), 2, first_stage_has_shortcut=False), 2),
    "cifar_vgg13": (
        lambda: vgg13(10),
        32,
        [*(f"features.{i}" for i in (0, 3, 7, 10, 14, 17, 21, 24, 28, 31)), "classifier"],
        1,
    ),
    "resnet18": (
        torchvision.models.resnet18,
        224,
        resnet_order((2, 2, 2, 2), 2, first_stage_has_shortcut=False),
        2,
    ),
    "resnet34": (
        torchvision.models.resnet34,
        224,
        resnet_order((3, 4, 6, 3), 2, first_stage_has_shortcut=False),
        2,
    ),
    "resnet50": (
        torchvision.models.resnet50,
        224,
        resnet_order((3, 4, 6, 3), 3, first_stage_has_shortcut=True),
        3,
    ),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 224, mobilenet_v2_order(), 3),
    "vision_transformer": (vision_transformer, 32, vit_order(2), 3),
    "timm_vision_transformer": (timm_vision_transformer, 32, timm_vit_order(2), 4),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_order_and_block_size(name: str) -> None:
    builder, side, order, block_size = FULL_SIZE[name]
    layers = trace_layers(*on_meta(builder, side))
    assert [layer.name for layer in layers] == order
    assert [layer.index for layer in layers] == list(range(len(order)))
    assert layers.block_size == block_size


def test_the_recurring_block_is_the_block_and_not_the_stage_around_it() -> None:
    """Two stages of two blocks of four linear maps."""
    assert trace_layers(*build("timm_swin")).block_size == 4


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_has_exactly_one_owner(name: str) -> None:
    model, x = build(name)
    layers = trace_layers(model, x)
    owned = [pair for layer in layers for pair in layer.parameters]
    assert sorted(n for n, _ in owned) == sorted(n for n, _ in model.named_parameters())
    assert all(model.get_parameter(n) is p for n, p in owned)
    half = len(layers) // 2
    assert layers.parameters(0, half) | layers.parameters(half) == dict(owned)
    assert not layers.parameters(0, half).keys() & layers.parameters(half).keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_depends_on_a_layer_after_it(name: str) -> None:
    """What the numbering is for: the output of layer l must not change with a weight of layer l + 1 or later."""
    model, x = build(name, batch=2)
    model.eval()
    layers = trace_layers(model, x)
    middle = len(layers) // 2
    seen: list[Tensor] = []
    layers[middle].module.register_forward_hook(lambda module, args, output: seen.append(args[0].clone()))
    with torch.no_grad():
        model(x)
        for parameter in layers.parameters(middle).values():
            parameter.normal_()
        model(x)
    assert torch.equal(seen[0], seen[1])


def owners(layers: LayerMap) -> dict[str, str]:
    return {name: layer.name for layer in layers for name, _ in layer.parameters}


def test_a_norm_belongs_to_the_layer_before_it() -> None:
    model, x = build("cifar_resnet18")
    found = owners(trace_layers(model, x))
    norms = [n.removesuffix(".weight") for n, p in model.named_parameters() if p.dim() == 1 and n.endswith(".weight")]
    assert len(norms) == 20
    for norm in norms:
        owner = norm.removesuffix(".1") + ".0" if "downsample" in norm else norm.replace("bn", "conv")
        assert found[f"{norm}.weight"] == found[f"{norm}.bias"] == owner


def test_loose_parameters_and_pre_norms_belong_to_the_last_layer_before_their_first_use() -> None:
    model, x = build("vision_transformer")
    found = owners(trace_layers(model, x))
    block = "encoder.layers.encoder_layer_{}"
    assert found["class_token"] == found["encoder.pos_embedding"] == "conv_proj"
    assert found[f"{block.format(0)}.ln_1.weight"] == "conv_proj"
    assert found[f"{block.format(0)}.ln_2.bias"] == f"{block.format(0)}.self_attention"
    assert found[f"{block.format(1)}.ln_1.weight"] == f"{block.format(0)}.mlp.3"
    assert found["encoder.ln.weight"] == f"{block.format(1)}.mlp.3"
    for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
        attention = f"{block.format(1)}.self_attention"
        assert found[f"{attention}.{part}"] == attention


def test_a_parameter_used_before_any_layer_belongs_to_the_first_layer() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 2)
            self.scale = nn.Parameter(torch.ones(4))
            self.first = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x * self.scale))

    layers = trace_layers(Scaled(), torch.zeros(1, 4))
    assert [layer.name for layer in layers] == ["first", "last"]
    assert owners(layers)["scale"] == "first"


def test_reading_a_parameters_dtype_or_shape_is_no_use_of_it() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(self.last.weight.dtype).reshape(-1, self.last.weight.shape[1])
            return self.last(self.second(self.first(x)))

    assert [layer.name for layer in trace_layers(Casting(), torch.zeros(1, 4))] == ["first", "second", "last"]


def test_layers_called_by_keyword_and_networks_with_several_inputs() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.left = nn.Linear(3, 4)
            self.right = nn.Linear(5, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.right(y) + self.left(input=x))

    layers = trace_layers(TwoInputs(), (torch.zeros(2, 3), torch.zeros(2, 5)))
    assert [layer.name for layer in layers] == ["right", "left", "head"]
    assert [layer.macs for layer in layers] == [20, 12, 8]


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "vision_transformer"])
def test_macs_equal_those_of_torchs_flop_counter(name: str) -> None:
    model, x = build(name, batch=3)
    model.eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x)
    counts = counter.get_flop_counts()["Global"]
    in_layers = sum(n for op, n in counts.items() if any(key in str(op) for key in ("convolution", "addmm", "aten.mm")))
    assert sum(layer.macs for layer in trace_layers(model, x)) == in_layers // 2 // 3


def test_macs_do_not_depend_on_the_example_batch() -> None:
    model = timm_swin()  # folds windows into the batch dimension
    one, four = (trace_layers(model, torch.zeros(n, 3, 32, 32)) for n in (1, 4))
    assert [layer.macs for layer in one] == [layer.macs for layer in four]


class Shared(nn.Module):
    """A layer used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(self.stem(x)))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class TiedEmbedding(nn.Module):
    """A classifier whose weight is the embedding in front of all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.one = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(x @ self.embedding.weight))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.extra = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Shared(), "layer 'twice' runs 2 times in one forward pass"),
        (Tied(), "layers 'one' and 'two' share the parameter 'two.weight'"),
        (TiedEmbedding(), "parameter 'head.weight' is used before its layer 'head' runs"),
        (
            Unused(),
            "no owner: extra.0.weight, extra.0.bias, extra.1.weight, extra.1.bias, extra.2.weight and 3 more",
        ),
        (nn.Sequential(nn.BatchNorm1d(4)), "no convolution or linear layer"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_has_no_place_in_the_order_is_refused_in_one_line(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        trace_layers(model, torch.zeros(2, 4))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_auxiliary_head_that_only_training_runs_is_refused() -> None:
    model, x = on_meta(lambda: torchvision.models.googlenet(aux_logits=True, init_weights=False), 64)
    with pytest.raises(ValueError, match=r"no owner: aux1\.conv\.conv\.weight"):
        trace_layers(model, x)


def test_tracing_leaves_the_network_as_it_was() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
            self.head = nn.Linear(4 * 36, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    model = Random()
    model.body[1].eval()  # a frozen batch norm, as in fine-tuning
    model.head.bias.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    trace_layers(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_a_failing_forward_pass_leaves_no_hook_and_no_mode_behind() -> None:
    model, _ = build("plain")
    with pytest.raises(RuntimeError):
        trace_layers(model, torch.zeros(1, 5, 8, 8))
    assert all(m.training and not m._forward_hooks for m in model.modules())


def test_a_transformer_encoder_is_traced_past_its_fast_path() -> None:
    """In evaluation mode torch would run a whole encoder layer as one kernel, which no hook sees."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2))
    layers = trace_layers(model, torch.zeros(1, 5, 4))
    inner = [f"1.layers.{i}.{name}" for i in range(2) for name in ("self_attn", "linear1", "linear2")]
    assert [layer.name for layer in layers] == ["0", *inner, "2"]
    assert layers.block_size == 3


@pytest.mark.parametrize(
    "normalised",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm],
    ids=lambda f: f.__name__,
)
def test_a_parametrized_layer_is_a_layer_that_rules_leave_alone(normalised: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(normalised(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(4 * 36, 2))
    layers = trace_layers(model, torch.zeros(1, 3, 8, 8))
    assert [layer.name for layer in layers] == ["0", "2"]
    assert [layer.updatable for layer in layers] == [False, True]
    assert owners(layers)["0.bias"] == "0"
    assert layers[0].weight.shape == (4, 3, 3, 3)  # diagnostics speak of the direction, not of gain or bias


@pytest.mark.parametrize("name", ["vision_transformer", "timm_swin"])
def test_attention_is_a_layer(name: str) -> None:
    model, x = build(name)
    for layer in trace_layers(model, x):
        is_opaque = isinstance(layer.module, nn.MultiheadAttention)
        assert layer.updatable is not is_opaque
        if is_opaque:
            assert layer.weight is layer.module.in_proj_weight


def test_a_subclass_with_a_forward_of_its_own_is_not_updatable() -> None:
    class Standardised(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, F.layer_norm(weight, weight.shape[1:]), bias)

    class Rectified(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    class Named(nn.Linear):
        """Computes what its base computes."""

    model = nn.Sequential(
        Standardised(3, 4, 3),
        timm.layers.Conv2dSame(4, 4, 3, stride=2),
        nn.Flatten(),
        Rectified(4 * 9, 8),
        Named(8, 2),
    )
    layers = trace_layers(model, torch.zeros(1, 3, 8, 8))
    assert [layer.name for layer in layers] == ["0", "1", "3", "4"]
    assert [layer.updatable for layer in layers] == [False, False, False, True]
