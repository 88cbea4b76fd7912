"""Products that rules are made of: sums over samples and positions, in the layer's own arithmetic, given in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def weight_gradient(module: nn.Module, a: Tensor, error: Tensor) -> Tensor:
    """The gradient of a convolution's or linear map's weight if ``error`` were the loss's gradient at its output.

    One GEMM (eq. 3 with ``error = z``). Dense, strided, dilated, padded, grouped and depthwise convolutions in one to
    three dimensions, batched or not, and linear maps on inputs of any number of dimensions.

    Args:
        module: a convolution (1d-3d) or linear module.
        a: its input; the dtype of ``error``.
        error: tensor of its output's shape.

    Returns:
        A float32 tensor of the weight's shape, in the weight's memory format where the backend gives it.
    """
    if (root := _half_scale(module, error)) is not None:
        return _weight_gradient(module, a / root, error / root).float() * root**2
    return _weight_gradient(module, a, error).float()


def output_products(module: nn.Module, z: Tensor) -> Tensor:
    """Sum of ``z z^T`` over samples and positions, between output channels of one group.

    Args:
        module: a convolution (1d-3d) or linear module.
        z: tensor of its output's shape.

    Returns:
        [groups, channels of a group, channels of a group] in float32.
    """
    if (root := _half_scale(module, z)) is not None:
        return _output_products(module, z / root).float() * root**2
    return _output_products(module, z).float()


def channel_dim(module: nn.Module) -> int:
    """The dimension of a layer's output that counts its channels, from the end: the batch dimension may be missing."""
    return 1 - module.get_parameter("weight").dim()


def response(module: nn.Module, z: Tensor) -> Tensor:
    """The output without its bias: what the weight alone makes of the input."""
    bias = module._parameters.get("bias")
    return z if bias is None else z - along_channels(module, bias).to(z.dtype)


def along_channels(module: nn.Module, values: Tensor) -> Tensor:
    """One value per output channel, shaped to broadcast against the layer's output."""
    return values.view(-1, *[1] * (-channel_dim(module) - 1))


def sum_positions(module: nn.Module, z: Tensor) -> Tensor:
    """Sum over samples and positions: one value per output channel, in float32."""
    kept = z.dim() + channel_dim(module)
    others = [dim for dim in range(z.dim()) if dim != kept]
    return z.sum(others, dtype=torch.float32) if others else z.float()


def _half_scale(module: nn.Module, error: Tensor) -> float | None:
    """What both operands of a product are divided by in half precision, which overflows where thousands of positions
    are summed. Each takes half of the scale, so that small values do not vanish instead; a power of two leaves the
    mantissa alone."""
    if error.dtype != torch.float16:
        return None
    positions = error.numel() // module.get_parameter("weight").shape[0]
    return float(2.0 ** -(-positions.bit_length() // 2))


def _weight_gradient(module: nn.Module, a: Tensor, error: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return error.flatten(0, -2).T @ a.flatten(0, -2) if a.dim() > 1 else torch.outer(error, a)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)), type(module)
    spatial = module.weight.dim() - 2
    if a.dim() == spatial + 1:
        a, error = a.unsqueeze(0), error.unsqueeze(0)
    padding: Sequence[int] = [0] * spatial
    if module.padding_mode != "zeros":
        a = F.pad(a, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    elif module.padding == "same":
        a = F.pad(a, module._reversed_padding_repeated_twice)
    elif module.padding != "valid":
        padding = module.padding  # type: ignore[assignment]
    weight = module.weight.to(error.dtype)
    return _convolution_weight_gradient(error, a, weight, module.stride, padding, module.dilation, module.groups)


def _output_products(module: nn.Module, z: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return _weight_gradient(module, z, z)[None]
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)), type(module)
    spatial = module.weight.dim() - 2
    if z.dim() == spatial + 1:
        z = z.unsqueeze(0)
    channels = module.out_channels // module.groups
    # As the weight gradient of a pointwise convolution from z to z: grouped, and without a copy in any memory format.
    weight = z.new_empty(module.out_channels, channels, *[1] * spatial)
    ones = [1] * spatial
    products = _convolution_weight_gradient(z, z, weight, ones, [0] * spatial, ones, module.groups)
    return products.reshape(module.groups, channels, channels)


def _convolution_weight_gradient(
    error: Tensor,
    a: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    no_output_padding = [0] * (weight.dim() - 2)
    wanted = [False, True, False]
    return torch.ops.aten.convolution_backward(
        error, a, weight, None, stride, padding, dilation, False, no_output_padding, groups, wanted
    )[1]
