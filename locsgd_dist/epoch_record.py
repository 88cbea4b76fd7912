"""An epoch's record: what its training came to, and the state, memory and traffic that it left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from locsgd_dist.config import Config
from locsgd_dist.data import DataBundle
from locsgd_dist.distributed import Alignment, KeptOutputs, Runtime, Traffic
from locsgd_dist.faults import StepGuard
from locsgd_dist.localized import EpochDiagnostics, LocalizedLearner
from locsgd_dist.memory import FootprintMonitor
from locsgd_dist.progress import Progress


def agreed(change: EpochDiagnostics, runtime: Runtime) -> EpochDiagnostics:
    """Rank 0's, on all ranks: they decide, and may differ in a bit between devices."""
    num = len(change.norm)
    values = runtime.share([*change.norm, *change.update_norm, *change.effective_rank])
    return replace(
        change, norm=values[:num], update_norm=values[num : 2 * num], effective_rank=values[2 * num : 3 * num]
    )


class EpochRecords:
    """Puts the record of an epoch together; all ranks call every method at the same time.

    Args:
        plain_gradient_bytes: of all parameters that the run trains: what plain DDP would reduce in each step.
    """

    def __init__(
        self,
        config: Config,
        *,
        runtime: Runtime,
        data: DataBundle,
        learner: LocalizedLearner,
        progress: Progress,
        guard: StepGuard,
        monitor: FootprintMonitor,
        traffic: Traffic,
        alignment: Alignment,
        kept: KeptOutputs,
        plain_gradient_bytes: int,
    ):
        self._config = config
        self._runtime = runtime
        self._data = data
        self._learner = learner
        self._progress = progress
        self._guard = guard
        self._monitor = monitor
        self._traffic = traffic
        self._alignment = alignment
        self._kept = kept
        self._plain_gradient_bytes = plain_gradient_bytes

    def of_training(self) -> dict[str, Any]:
        """Loss, steps and time of the epoch that has just been trained, over all ranks."""
        progress = self._progress
        loss, correct, samples = self._runtime.sum(progress.tally.sums())
        seconds, cpu_seconds = self._runtime.max([progress.seconds, progress.cpu_seconds])
        return {
            "epoch": progress.epoch,
            "samples_seen": progress.samples_seen,
            "lr": progress.lr,
            "sum_of_lr": progress.sum_of_lr,
            "num_steps": progress.steps,
            "num_refresh_steps": progress.num_refreshes,
            "num_update_steps": progress.num_updates,
            "num_alignment_steps": progress.num_alignments,
            "num_kept_layers": self._kept.num_layers,  # before its count is taken
            "num_kept_samples": round(self._runtime.sum([self._kept.take()])[0]),
            "skipped_steps": self._guard.num_skipped,
            "train_loss": loss / max(1.0, samples),
            "train_top1": correct / max(1.0, samples),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "images_per_second": samples / seconds,
        }

    def of_state(self, change: EpochDiagnostics) -> dict[str, Any]:
        """Boundary, batch, layers, memory and traffic; traffic is counted anew from here."""
        traffic = self._traffic.take()
        footprint = self._monitor.footprint()
        boundary, num_layers = self._learner.boundary, len(self._learner.layers)
        world_size, per_gpu = self._runtime.world_size, self._data.train.per_gpu_batch
        batches_per_step = world_size * self._config.train.gradient_accumulation
        plain_steps = -(-self._data.num_train // (batches_per_step * self._config.batch.per_gpu))
        update_norm = change.update_norm[min(boundary, num_layers - 1)]
        sum_of_lr = self._progress.sum_of_lr
        # The transition layer then has a rate of its own, which the sum does not tell.
        is_annealed = self._config.selection.anneal
        return {
            "boundary": boundary,
            "num_layers": num_layers,
            "per_gpu_batch": per_gpu,
            "global_batch": per_gpu * batches_per_step,
            "world_size": world_size,
            "local_lr": self._learner.lr,
            "sign": self._learner.sign,
            "transition_update_norm": update_norm,
            "transition_update_norm_per_lr": update_norm / sum_of_lr if sum_of_lr > 0 and not is_annealed else None,
            "footprint_bytes": int(self._runtime.max([footprint.bytes])[0]),
            "footprint_source": footprint.source,
            "grad_all_reduce_bytes": traffic.gradient_bytes,
            "grad_all_reduce_count": traffic.gradient_collectives,
            "replica_sync_bytes": traffic.replica_bytes,
            "replica_sync_count": traffic.replica_collectives,
            "plain_ddp_bytes": self._plain_gradient_bytes * plain_steps if world_size > 1 else 0,
            "layer_names": [layer.name for layer in self._learner.layers],
            "layer_norm": change.norm,
            "layer_drift": change.drift,
            "layer_update_norm": change.update_norm,
            "layer_effective_rank": change.effective_rank,
            "layer_alignment": self._alignment.take(),
        }
