"""From ``model.name`` to a network: where a name leads, whether it leads anywhere, and the network built."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision.models
from torch import nn

from .cifar import resnet18, vgg13
from .config import ModelConfig
from .weights import check_weights_file, load_weights, read_state_dict

logger = logging.getLogger(__name__)

CIFAR_NETWORKS: dict[str, Callable[..., nn.Module]] = {"resnet18": resnet18, "vgg13": vgg13}
IMAGENET_NETWORKS = ("resnet34", "resnet50", "mobilenet_v2")
TUPLE_OUTPUT = ("googlenet", "inception_v3")  # in training, with torchvision's auxiliary heads


def check_model(config: ModelConfig) -> None:
    """Check that the named network and weights exist, without building or downloading anything large.

    Raises:
        ValueError: one line that names the ``model.`` key at fault and what would be right.
    """
    builder = _find_builder(config)
    source, name = _source(config)
    if config.kwargs and source in ("cifar", "torchvision"):
        with torch.device("meta"):  # their constructors run in milliseconds without allocating
            _construct(builder, config, num_classes=10)
    if config.weights is None:
        return
    if config.weights != "DEFAULT":
        check_weights_file(config.weights)
    elif source == "torchvision":
        if not len(torchvision.models.get_model_weights(name)):
            raise ValueError(f"model.weights=DEFAULT: torchvision has no pretrained weights for {name}")
    elif source == "timm":
        timm = importlib.import_module("timm")
        if not timm.is_model_pretrained(name):
            raise ValueError(f"model.weights=DEFAULT: timm has no pretrained weights for {name}")
    else:
        raise ValueError(
            f"model.weights=DEFAULT exists for torchvision: and timm: networks only; "
            f"{config.name} takes the path of a state_dict or null"
        )


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build the configured network with ``num_classes`` outputs, on the current default device.

    Pretrained or given weights are loaded strictly, except that a head for another number of classes stays as
    initialised (logged). The random draws of the initialisation come from torch's global generator.

    Raises:
        ValueError: as :func:`check_model`, or where ``model.kwargs`` or ``model.weights`` do not fit.
    """
    builder = _find_builder(config)
    source, name = _source(config)
    pretrained = config.weights == "DEFAULT"
    if pretrained:
        check_model(config)
    if pretrained and source == "timm":
        return _timm_pretrained(config, builder, num_classes)
    model = _construct(builder, config, num_classes)
    if pretrained:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        try:
            state = weights.get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise _not_fetched(weights.url, error) from error
        load_weights(model, state, num_classes, origin=f"DEFAULT ({weights})")
    elif config.weights is not None:
        load_weights(model, read_state_dict(config.weights), num_classes, origin=config.weights)
    return model


def _source(config: ModelConfig) -> tuple[str, str]:
    """The kind of ``model.name`` (cifar, torchvision, timm, factory) and the name within it."""
    prefix, colon, rest = config.name.partition(":")
    if not colon:
        return ("cifar" if config.name in CIFAR_NETWORKS else "torchvision"), config.name
    return (prefix, rest) if prefix in ("torchvision", "timm") else ("factory", config.name)


def _find_builder(config: ModelConfig) -> Callable[..., nn.Module]:
    """The callable behind ``model.name``; it takes ``num_classes`` and ``model.kwargs``."""
    source, name = _source(config)
    if source in ("torchvision", "timm") and (own := {"weights", "pretrained"} & config.kwargs.keys()):
        raise ValueError(f"model.kwargs must not contain {own.pop()}: use model.weights")
    if source == "cifar":
        return partial(CIFAR_NETWORKS[name], width=config.width) if config.width else CIFAR_NETWORKS[name]
    builders = {"torchvision": _torchvision_builder, "timm": _timm_builder}
    builder = builders[source](config, name) if source in builders else _imported_builder(config)
    if config.width is not None:
        known = " and ".join(CIFAR_NETWORKS)
        raise ValueError(f"model.width must be null for {config.name}: it is a setting of {known} only")
    return builder


def _torchvision_builder(config: ModelConfig, name: str) -> Callable[..., nn.Module]:
    classifiers = torchvision.models.list_models(module=torchvision.models)
    if ":" not in config.name and name not in IMAGENET_NETWORKS:
        paper = (*CIFAR_NETWORKS, *IMAGENET_NETWORKS)
        names = {n: f"torchvision:{n}" for n in classifiers} | {n: n for n in paper}
        raise ValueError(
            f"model.name {config.name} is unknown{_suggest(name, names)}; bare names are {', '.join(paper)}, "
            f"others are torchvision:NAME, timm:NAME or package.module:factory"
        )
    if name not in classifiers:
        names = {n: f"torchvision:{n}" for n in classifiers}
        raise ValueError(f"model.name {config.name} is no classifier of torchvision{_suggest(name, names)}")
    if name in TUPLE_OUTPUT and config.kwargs.get("aux_logits") is not False:
        raise ValueError(f"model.kwargs must set aux_logits: false for {config.name}: its loss would get a tuple")
    return partial(torchvision.models.get_model, name)


def _timm_builder(config: ModelConfig, name: str) -> Callable[..., nn.Module]:
    if importlib.util.find_spec("timm") is None:
        raise ValueError(f"model.name {config.name} needs timm, which is not installed: pip install timm")
    timm = importlib.import_module("timm")
    known = timm.is_model_pretrained(name) if "." in name else timm.is_model(name)  # a dot: a pretrained tag
    if not known:
        names = {n: f"timm:{n}" for n in (*timm.list_models(), *timm.list_pretrained())}
        raise ValueError(f"model.name {config.name} is unknown to timm{_suggest(name, names)}")
    return partial(timm.create_model, name)


def _imported_builder(config: ModelConfig) -> Callable[..., nn.Module]:
    module_name, _, attribute = config.name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module missing *inside* the user's is their traceback to read, not a mistyped model.name.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"model.name {config.name}: there is no module {module_name} on the Python path") from error
    except (TypeError, ValueError) as error:  # what importlib makes of an empty or a relative name
        raise ValueError(f"model.name {config.name} must read package.module:factory") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = {n: f"{module_name}:{n}" for n, value in vars(module).items() if callable(value)}
        raise ValueError(f"model.name {config.name}: {module_name} has no such factory{_suggest(attribute, names)}")
    try:
        inspect.signature(factory).bind(num_classes=10, **config.kwargs)
    except TypeError as error:
        raise ValueError(
            f"model.kwargs: {config.name} cannot be called as factory(num_classes=C, **model.kwargs): {error}"
        ) from error
    return factory


def _construct(builder: Callable[..., Any], config: ModelConfig, num_classes: int, **extra: Any) -> nn.Module:
    try:
        model = builder(num_classes=num_classes, **extra, **config.kwargs)
    except TypeError as error:
        if _source(config)[0] == "factory" or not config.kwargs:
            raise  # not a matter of the configuration: keep the traceback
        raise ValueError(f"model.kwargs does not fit {config.name}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model.name {config.name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _timm_pretrained(config: ModelConfig, builder: Callable[..., nn.Module], num_classes: int) -> nn.Module:
    """timm fetches, adapts and loads by itself, the replaced head included."""
    try:
        model = _construct(builder, config, num_classes, pretrained=True)
    except OSError as error:
        raise _not_fetched(config.name, error) from error
    pretrained_for = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if pretrained_for not in (None, num_classes):
        logger.info("model.weights: head for %d classes replaced by one for %d", pretrained_for, num_classes)
    return model


def _not_fetched(what: str, error: OSError) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"model.weights=DEFAULT could not fetch {what} ({reason}); give a path or null instead")


def _suggest(name: str, names: dict[str, str]) -> str:
    """`` (did you mean …?)`` with the keys closest to ``name``, each given as its value; or nothing."""
    close = difflib.get_close_matches(name, names, n=3)
    return f" (did you mean {' or '.join(names[n] for n in close)}?)" if close else ""
