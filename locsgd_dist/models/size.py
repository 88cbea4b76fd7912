"""How large a network is."""

from __future__ import annotations

from torch import Tensor, nn

from locsgd_dist.localized.layers import trace_layers


def network_size(model: nn.Module, example_input: Tensor) -> dict[str, int]:
    """Parameters, and multiply-adds of one forward pass per sample, as an epoch's record names them.

    Multiply-adds are those of convolutions and linear maps.
    """
    return {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_macs": sum(layer.macs for layer in trace_layers(model, example_input)),
    }
