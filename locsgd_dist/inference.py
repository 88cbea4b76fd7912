"""A run's trained network: loaded again, evaluated, exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from locsgd_dist.baselines import restore_trained, with_droppable_blocks
from locsgd_dist.checkpoint import CheckpointStore, load_state, save_atomically
from locsgd_dist.config import Config, load_config
from locsgd_dist.data import build_data, data_shape
from locsgd_dist.distributed import resolve_device
from locsgd_dist.models import build_model
from locsgd_dist.recording import RunDirectory
from locsgd_dist.validation import evaluate

ExportFormat = Literal["state_dict", "torch_export", "onnx"]


@dataclass(frozen=True)
class TrainedModel:
    """A network with the weights of a checkpoint, on the CPU in evaluation mode."""

    config: Config
    model: nn.Module
    checkpoint: Path
    num_classes: int
    input_shape: tuple[int, int, int]


def load_trained(run: Path, checkpoint: str = "best", *, ema: bool = False) -> TrainedModel:
    """The network of a run.

    Args:
        run: the run directory.
        checkpoint: ``best`` (by validation top-1), ``newest``, or a file.
        ema: take the moving average of the weights.

    Raises:
        ValueError: no run or no such checkpoint there, or it holds no moving average.
    """
    directory = RunDirectory(run)
    if not directory.config.is_file():
        raise ValueError(f"{run} is not a run directory: it has no config.yaml")
    store = CheckpointStore(directory.checkpoints)
    if checkpoint == "newest":
        if (found := store.load_newest()) is None:
            raise ValueError(f"{run} has no readable checkpoint yet")
        path, state = found
    else:
        path = store.best if checkpoint == "best" else Path(checkpoint)
        state = load_state(path)
    weights = state["model"]
    if ema:
        if state["ema"] is None:
            raise ValueError(f"{path} holds no moving average: the run had optim.ema_decay=0")
        weights = ema_weights(state["ema"])
    config = load_config(directory.config)
    shape = data_shape(config.data)
    # The checkpoint replaces every weight: whatever the run started from is not needed again.
    model = build_model(replace(config.model, weights=None), shape.num_classes)
    restore_trained(with_droppable_blocks(model, config.stochastic_depth), config, weights)
    size = (shape.channels, shape.image_size, shape.image_size)
    return TrainedModel(config, model.eval(), path, shape.num_classes, size)


def ema_weights(averaged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's own keys out of an ``AveragedModel``'s state."""
    return {key.removeprefix("module."): value for key, value in averaged.items() if key.startswith("module.")}


def evaluate_trained(trained: TrainedModel, device: str | None = None) -> dict[str, float]:
    """Cross-entropy and top-1 (a fraction) over the whole validation set, on one process."""
    config = trained.config
    where = resolve_device(device or config.train.device)
    data = build_data(
        config.data,
        seed=config.train.seed,
        rank=0,
        world_size=1,
        local_world_size=1,
        device=where,
        per_gpu_batch=config.batch.per_gpu,
        channels_last=config.train.channels_last,
    )
    try:
        loss, correct, samples = evaluate(trained.model.to(where), data.val, config.train, where)
    finally:
        data.close()
    return {"val_loss": loss / samples, "val_top1": correct / samples, "samples": samples}


def export_trained(trained: TrainedModel, output: Path, export_format: ExportFormat = "state_dict") -> None:
    """Writes the network for use without this package.

    ``state_dict`` loads into the plain network with ``strict=True``; ``torch_export`` (a ``.pt2`` program) and ``onnx``
    take batches of any size.

    Raises:
        ValueError: the onnx packages are missing.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    if export_format == "state_dict":
        save_atomically(trained.model.state_dict(), output)
        return
    # A batch of one would be specialised on: its size would become a constant of the program.
    example = torch.zeros(2, *trained.input_shape)
    batch = {0: torch.export.Dim("batch")}
    if export_format == "torch_export":
        program = torch.export.export(trained.model, (example,), dynamic_shapes=(batch,))
        torch.export.save(program, output)
        return
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ValueError("--format onnx needs the onnx extra: pip install 'locsgd-dist[onnx]'") from None
    torch.onnx.export(
        trained.model,
        (example,),
        str(output),
        dynamo=True,
        dynamic_shapes=(batch,),
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
    )
