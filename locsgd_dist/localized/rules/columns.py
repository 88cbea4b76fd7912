"""Weight gradient of a dense convolution on the CPU as GEMMs over blocks of patches that stay in cache.

oneDNN's kernel takes 1.6 to 2.6 times as long as the layer's forward pass, this 1.0 to 1.5 times (3x3, 64 to 512
channels, one AVX2 core; docs/performance.md). With fewer channels the blocks are too thin and oneDNN is faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_BYTES = 2 << 20
_LEAST_CHANNELS = 64


def suits_columns(error: Tensor, a: Tensor, kernel: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether :func:`column_weight_gradient` computes this one, and faster than the backend."""
    return (
        a.device.type == "cpu"
        and a.dtype == torch.float32
        and a.dim() == 4
        and groups == 1
        and all(step == 1 for step in dilation)
        and max(kernel) > 1  # a pointwise convolution is one GEMM for the backend too
        and min(a.shape[1], error.shape[1]) >= _LEAST_CHANNELS
        and not torch.compiler.is_compiling()  # the loop over blocks would be unrolled into the graph
    )


def column_weight_gradient(
    error: Tensor, a: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Sum over samples and positions of ``error (x) patch(a)``.

    Args:
        error: [N, O, H', W'], float32.
        a: [N, C, H, W], float32; faster in channels-last format.

    Returns:
        [O, C, kernel height, kernel width], in channels-last format.
    """
    padded = F.pad(a, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1).contiguous()
    patches = padded.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1]).permute(0, 1, 2, 4, 5, 3)
    error = error.permute(0, 2, 3, 1)
    outputs, channels = error.shape[3], a.shape[1]
    length = kernel[0] * kernel[1] * channels
    total = a.new_zeros(outputs, length)
    for block in _blocks(*error.shape[:3], bytes_of_a_position=length * a.element_size()):
        total.addmm_(error[block].reshape(-1, outputs).T, patches[block].reshape(-1, length))
    return total.view(outputs, *kernel, channels).permute(0, 3, 1, 2)


def _blocks(samples: int, rows: int, columns: int, *, bytes_of_a_position: int) -> Iterator[tuple[slice, slice]]:
    """Samples and rows of the output, cut so that a block's patches take about ``_BLOCK_BYTES``, or are one row."""
    at_once = max(1, _BLOCK_BYTES // (columns * bytes_of_a_position))
    if at_once >= rows:
        step = at_once // rows
        yield from ((slice(n, n + step), slice(None)) for n in range(0, samples, step))
    else:
        for n in range(samples):
            yield from ((slice(n, n + 1), slice(r, r + at_once)) for r in range(0, rows, at_once))
