"""The per-GPU batch while training: it grows where the footprint has fallen, learning rates follow, and a batch that
did not fit is never tried again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from locsgd_dist.config import Config
from locsgd_dist.data import DataBundle
from locsgd_dist.distributed import Runtime
from locsgd_dist.localized.selection import shift_interval
from locsgd_dist.memory import (
    BatchPolicy,
    FootprintMonitor,
    LrScale,
    OutOfMemoryLog,
    StepOutOfMemoryError,
    is_out_of_memory,
)
from locsgd_dist.recording import Recorder, RunDirectory
from locsgd_dist.step import TrainStep


class BatchController:
    """Carries out what the batch policy decides: measures, tries, changes the sampler and the learning rates' scale.

    All ranks call every method at the same time; what they decide from is the same on all of them.

    Attributes:
        lr_scale, local_lr_scale: factors on the two learning rates, by epoch.
    """

    def __init__(
        self,
        config: Config,
        *,
        step: TrainStep,
        data: DataBundle,
        monitor: FootprintMonitor,
        runtime: Runtime,
        recorder: Recorder,
        directory: RunDirectory,
        num_layers: int,
        block_size: int,
    ):
        self.lr_scale = LrScale(config.batch.lr_scaling, config.batch.lr_ramp_epochs)
        self.local_lr_scale = LrScale(config.localized.lr_scaling, config.batch.lr_ramp_epochs)
        self._config = config
        self._step = step
        self._data = data
        self._monitor = monitor
        self._runtime = runtime
        self._recorder = recorder
        self._directory = directory
        self._start_world_size = runtime.world_size
        self._incidents = OutOfMemoryLog(directory.path / "oom")
        self._policy = BatchPolicy(
            config.batch,
            interval=shift_interval(
                config.selection, num_layers=num_layers, block_size=block_size, epochs=config.train.epochs
            ),
            num_train=data.num_train,
            batches_per_step=runtime.world_size * config.train.gradient_accumulation,
        )

    @property
    def _configured(self) -> int:
        """Batch of all ranks at the run's start."""
        return self._config.batch.per_gpu * self._start_world_size

    def local_lr(self, epoch: int, done: float, rate: float) -> float:
        """Length of a localized step in ``epoch``, after ``done`` epochs (fractions count).

        Args:
            rate: the SGD region's learning rate over ``optim.lr``, the batch's factor left out.
        """
        config = self._config
        # At the run's first global batch; a last short step counts as its share.
        steps = self._data.num_train / (self._configured * config.train.gradient_accumulation)
        length = config.localized.lr_at(epoch, rate=rate, steps_per_epoch=steps)
        return length * self.local_lr_scale.at(done)

    def grow(self, metrics: Mapping[str, Any], *, is_last: bool) -> None:
        """At an epoch's edge, after the boundary has moved: tries a larger batch and takes it if it fits.

        Args:
            metrics: record of the epoch that ended.
            is_last: no epoch follows.
        """
        epoch, samples_seen = metrics["epoch"], metrics["samples_seen"]
        self._policy.observe(metrics["footprint_bytes"])
        if is_last or not self._policy.is_due(epoch):
            return
        # The boundary may just have moved: what the present batch needs from now on is measured, not what it needed.
        footprint = self._trial(self._policy.per_gpu, epoch, samples_seen)
        candidate = None if footprint is None else self._policy.propose(epoch, footprint)
        while candidate is not None:
            candidate = self._policy.judge(candidate, self._trial(candidate, epoch, samples_seen))
        self._apply(epoch, samples_seen)

    @contextmanager
    def leaving_on_out_of_memory(self, epoch: int) -> Iterator[None]:
        """Around training: a rank that runs out of memory writes down at which batch, then leaves.

        Raises:
            StepOutOfMemoryError: in the place of the allocator's error.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            per_gpu, rank = self._data.train.per_gpu_batch, self._runtime.rank
            self._incidents.write(rank, per_gpu)
            raise StepOutOfMemoryError(
                f"rank {rank} ran out of memory in epoch {epoch} at a batch of {per_gpu} per GPU"
            ) from error

    def respect_incidents(self, epoch: int, samples_seen: int) -> None:
        """When a process starts: back to a batch that fits, if one did not in an earlier process of this run.

        Raises:
            ValueError: no smaller batch has worked in this run.
        """
        incidents = self._incidents.read()
        # Ranks may see the folder at different moments; rank 0's view decides.
        failed = int(self._runtime.share([min((i.per_gpu for i in incidents), default=0)])[0])
        if failed == 0:
            return
        if self._runtime.is_main:
            recorded = {event.get("incident") for event in self._directory.load_events()}
            for incident in incidents:
                if incident.time not in recorded:
                    self._record_oom(
                        epoch,
                        samples_seen,
                        incident.per_gpu,
                        "training step",
                        oom_rank=incident.rank,
                        incident=incident.time,
                    )
        if not self._policy.fall_back(failed):
            raise ValueError(
                f"batch.per_gpu={failed} does not fit into this device's memory, and no smaller batch has worked in "
                "this run; lower batch.per_gpu"
            )
        self._apply(epoch, samples_seen)

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self._policy.state_dict(),
            "lr_scale": self.lr_scale.state_dict(),
            "local_lr_scale": self.local_lr_scale.state_dict(),
            "start_world_size": self._start_world_size,
            "world_size": self._runtime.world_size,
            "configured_per_gpu": self._config.batch.per_gpu,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores, once the stream stands where the run does; where the number of ranks has changed, batch and rates
        follow (``elastic.keep``). Where ``batch.per_gpu`` is not that of the run which is gone on from, batch and rates
        start as configured."""
        if state.get("configured_per_gpu", self._config.batch.per_gpu) != self._config.batch.per_gpu:
            return
        self._policy.load_state_dict(state["policy"])
        self.lr_scale.load_state_dict(state["lr_scale"])
        self.local_lr_scale.load_state_dict(state["local_lr_scale"])
        self._data.train.set_per_gpu_batch(self._policy.per_gpu)
        self._start_world_size = state["start_world_size"]
        before, now = state["world_size"], self._runtime.world_size
        if before != now:
            if self._config.elastic.keep == "global":
                self._policy.keep_global_batch(before, now)
                self._data.train.set_per_gpu_batch(self._policy.per_gpu)
            self._scale_learning_rates()

    def _trial(self, per_gpu: int, epoch: int, samples_seen: int) -> int | None:
        """Footprint of a step at this batch, the most of all ranks; None where one of them ran out of memory."""
        num_bytes, failed = 0, False
        self._monitor.reset_peak()
        try:
            with self._monitor.measured_step(self._step.model, self._step.optimizer):
                self._step.trial(per_gpu, self._data.input_shape, self._data.num_classes)
            num_bytes = self._monitor.footprint().bytes
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        self._monitor.reset_peak()
        most, any_failed = self._runtime.max([num_bytes, failed])
        if any_failed:
            self._record_oom(epoch, samples_seen, per_gpu, "trial step")
            return None
        return int(most)

    def _apply(self, epoch: int, samples_seen: int) -> None:
        """Brings the sampler and the learning rates to the policy's batch."""
        before, per_gpu = self._data.train.per_gpu_batch, self._policy.per_gpu
        if per_gpu == before:
            return
        self._data.train.set_per_gpu_batch(per_gpu)
        self._scale_learning_rates()
        self._recorder.event("batch", epoch=epoch, samples_seen=samples_seen, per_gpu_from=before, per_gpu_to=per_gpu)

    def _scale_learning_rates(self) -> None:
        """From here on they follow the global batch, relative to that of the run's start."""
        growth = self._policy.per_gpu * self._runtime.world_size / self._configured
        for scale in (self.lr_scale, self.local_lr_scale):
            scale.set_growth(growth, self._data.train.epochs_done)

    def _record_oom(self, epoch: int, samples_seen: int, per_gpu: int, where: str, **fields: Any) -> None:
        self._recorder.event("oom", epoch=epoch, samples_seen=samples_seen, per_gpu=per_gpu, where=where, **fields)
