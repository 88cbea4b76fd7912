"""The measured step under DDP: buckets are counted, and no bit of the training changes."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from locsgd_dist.memory import FootprintMonitor, MonitorConfig

SIZES = (50, 120, 90, 4)
BATCH = 8
NUM_PARAMETERS = sum(a * b + b for a, b in pairwise(SIZES))


def train(measured: bool, options: dict[str, Any]) -> tuple[list[torch.Tensor], list[int]]:
    """Four steps on this rank's data; the weights after them and the footprint of each."""
    torch.manual_seed(0)
    model = nn.Sequential(*[m for a, b in pairwise(SIZES) for m in (nn.Linear(a, b), nn.Tanh())])
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.03, **options)  # several buckets, rebuilt after a step
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = torch.Generator().manual_seed(1 + dist.get_rank())
    footprints = []
    with FootprintMonitor(MonitorConfig(), torch.device("cpu")) as monitor:
        for _ in range(4):
            images = torch.randn(BATCH, SIZES[0], generator=data)
            monitor.reset_peak()
            with monitor.measured_step(ddp, optimizer) if measured else contextlib.nullcontext():
                ddp(images).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            footprint = monitor.footprint()
            assert footprint.source == ("tensor_bytes" if measured else "host_rss")
            footprints.append(footprint.bytes)
    return [p.detach().clone() for p in model.parameters()], footprints


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_as_bucket_view": True},
        {"gradient_as_bucket_view": True, "static_graph": True, "forward_sync_buffers": False},
    ],
)
def test_a_measured_step_changes_no_bit_and_counts_buckets(two_ranks: Any, options: dict[str, Any]) -> None:
    plain = two_ranks.run(train, False, options)
    measured = two_ranks.run(train, True, options)
    for (plain_weights, _), (measured_weights, _) in zip(plain, measured, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain_weights, measured_weights, strict=True))
    (_, footprints), (_, of_rank_1) = measured
    # In its second step, with a static graph its third, DDP settles its buckets: it broadcasts the parameters they hold
    # and how many they are, then the size of each, all int32. A thread of gloo's may still hold either at the peak.
    indices, sizes = (2 * (len(SIZES) - 1) + 1) * 4, 2 * 4
    settling = 2 if "static_graph" in options else 1
    for of_rank in (footprints, of_rank_1):
        assert of_rank[settling] - of_rank[3] in (0, sizes, indices, indices + sizes)
        of_rank[settling] = of_rank[3]
    assert footprints == of_rank_1
    # Weights, momentum and buckets throughout, gradients too unless they are views into the buckets: then one layer's
    # at a time, before it is copied there. The rest are activations and their gradients: less than twice all of them.
    copies = 3 if options else 4
    transient = max(a * b for a, b in pairwise(SIZES)) + 2 * BATCH * sum(SIZES)
    assert transient < NUM_PARAMETERS
    assert copies * NUM_PARAMETERS * 4 <= footprints[-1] <= (copies * NUM_PARAMETERS + transient) * 4
