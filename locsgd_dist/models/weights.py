"""Reading a state_dict from a file and loading it, with a head for other classes left as initialised."""

from __future__ import annotations

import importlib.util
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

logger = logging.getLogger(__name__)

MAX_LISTED = 3  # keys listed in an error message, of each kind


def check_weights_file(path: str) -> None:
    """Raise ValueError naming ``model.weights`` unless ``path`` is a file of a kind that can be read here."""
    if not Path(path).is_file():
        raise ValueError(f"model.weights must be DEFAULT, null or the path of a state_dict; no file {path}")
    if Path(path).suffix == ".safetensors" and importlib.util.find_spec("safetensors") is None:
        raise ValueError(f"model.weights={path} needs safetensors, which is not installed: pip install safetensors")


def read_state_dict(path: str) -> dict[str, Any]:
    """Read a state_dict onto the CPU, never unpickling code (``weights_only``).

    A training checkpoint that holds the weights under ``state_dict`` or ``model`` is understood, and so is
    DDP's ``module.`` in front of every key.

    Raises:
        ValueError: naming ``model.weights``, where the file is missing, damaged or something else.
    """
    check_weights_file(path)
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"model.weights={path} is damaged or holds more than tensors; save a state_dict") from error
    except Exception as error:  # zip, pickle and safetensors each fail in their own way: the file is what is wrong
        reason = " ".join(str(error).split())
        raise ValueError(f"model.weights={path} cannot be read: {reason or type(error).__name__}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"model.weights={path} must hold a state_dict (parameter name -> tensor)")
    state = dict(state)
    consume_prefix_in_state_dict_if_present(state, "module.")
    return state


def load_weights(model: nn.Module, state: Mapping[str, Any], num_classes: int, origin: str) -> None:
    """Load ``state`` into ``model`` strictly, except for a head made for another number of classes.

    A head is a module whose weight and bias differ from the model's in their first dimension alone, which is
    ``num_classes`` in the model; it keeps its initialisation, and the log says so. (A hidden layer of that
    size is not mistaken for one: the layer behind it differs too, in another dimension.)

    Args:
        origin: what to call the weights in messages.

    Raises:
        ValueError: one line naming ``model.weights`` and the first keys that do not fit.
    """
    own = {key: _shape(value) for key, value in model.state_dict().items()}
    given = {key: _shape(value) for key, value in state.items()}
    differing = [key for key in own if key in given and given[key] != own[key]]
    heads = [k for k in differing if own[k][:1] == (num_classes,) and given[k][1:] == own[k][1:] and given[k]]
    problems = [
        _listed("missing", [key for key in own if key not in given]),
        _listed("unexpected", [key for key in given if key not in own]),
        _listed("misshapen", [f"{k} {given[k]}, not {own[k]}" for k in differing if k not in heads]),
    ]
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        raise ValueError(f"model.weights={origin} does not fit the network: {found}")
    initial = model.state_dict()
    model.load_state_dict({k: initial[k] if k in heads else v for k, v in state.items()}, strict=True)
    for key in heads:
        if len(own[key]) > 1:  # the weight speaks for its bias
            logger.info(
                "model.weights: %s is for %d classes; %s, for %d, starts from its initialisation",
                *(origin, given[key][0], key.rpartition(".")[0] or key, num_classes),
            )


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of a tensor; empty for anything else that a state_dict may hold."""
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _listed(kind: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - MAX_LISTED} more" if len(keys) > MAX_LISTED else ""
    return f"{len(keys)} {kind} ({', '.join(keys[:MAX_LISTED])}{more})"
