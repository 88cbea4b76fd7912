"""Channels-last memory format, where it can be trusted."""

from __future__ import annotations

import torch
from torch import nn

MIN_CHANNELS = 8


def to_channels_last(model: nn.Module, device: torch.device) -> None:
    """Puts the weights of ``model`` into channels-last memory format, in place.

    Raises:
        ValueError: on the CPU, a convolution has fewer than 8 output channels. There the backward pass of torch 2.14
            writes past the end of its buffers: wrong numbers, a crash, or a process that hangs.
    """
    if device.type == "cpu":
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and module.out_channels < MIN_CHANNELS:
                raise ValueError(
                    f"train.channels_last=true needs convolutions of at least {MIN_CHANNELS} channels on the CPU, "
                    f"but {name} has {module.out_channels}; set train.channels_last=false or raise model.width"
                )
    model.to(memory_format=torch.channels_last)
