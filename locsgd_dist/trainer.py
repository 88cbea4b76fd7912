"""The training loop."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from locsgd_dist.batching import BatchController
from locsgd_dist.checkpoint import CheckpointStore, load_state, was_restarted
from locsgd_dist.config import Config
from locsgd_dist.data import Batch, build_data
from locsgd_dist.distributed import Refresh, RegionDDP, Runtime, Traffic, make_replicas, pool_buffers, resolve_device
from locsgd_dist.localized import (
    EpochDiagnostics,
    LocalizedLearner,
    WeakSupervision,
    WeightTrace,
    make_selector,
)
from locsgd_dist.localized.selection import ScheduledSelector, Selector
from locsgd_dist.memory import FootprintMonitor
from locsgd_dist.models import build_model
from locsgd_dist.optimization import RegionOptimizer, averaged_model, lr_at
from locsgd_dist.recording import Recorder, RunDirectory
from locsgd_dist.step import Tally, TrainStep, evaluate


class Trainer:
    """One run: trains, evaluates, moves the boundary, records, and can go on where an earlier process stopped.

    Use as a context manager; :meth:`fit` returns the last epoch's metrics.
    """

    def __init__(self, config: Config):
        self.config = config
        self._resources = ExitStack()
        device = resolve_device(config.train.device)
        if config.train.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        self.directory = RunDirectory(config.run.dir)
        # Before the first use of CUDA, so that the context counts in the footprint.
        self.monitor = self._closing(FootprintMonitor(config.monitor, device))
        self.runtime = self._closing(Runtime(device, config.distributed))
        if config.run.resume == "never" and not was_restarted():
            if self.runtime.is_main:
                move_aside(self.directory.path)
            self.runtime.barrier()
        self.monitor.start_trace(self.directory.memory, self.runtime.rank)
        self.data = self._closing(
            build_data(
                config.data,
                seed=config.train.seed,
                rank=self.runtime.rank,
                world_size=self.runtime.world_size,
                local_world_size=self.runtime.local_world_size,
                device=device,
                per_gpu_batch=config.batch.per_gpu,
                channels_last=config.train.channels_last,
            )
        )
        seed_everything(config.train.seed)
        self.model = build_model(config.model, self.data.num_classes).to(device)
        if config.train.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.ema = averaged_model(self.model, config.optim.ema_decay) if config.optim.ema_decay else None
        self.learner = LocalizedLearner(
            self.model,
            torch.zeros(1, *self.data.input_shape, device=device),
            rule="frozen" if config.localized.rule == "none" else config.localized.rule,
            batch_fraction=config.localized.batch_fraction,
            seed=config.train.seed,
        )
        self.selector = self._make_selector()
        self.supervision = WeakSupervision()
        self.trace = WeightTrace(self.learner.layers)
        self.traffic = Traffic()
        self.region = RegionDDP(
            self.model,
            self.runtime.data_group,
            self.traffic,
            compression=config.distributed.gradient_compression,
            deterministic=config.train.deterministic,
        )
        self.replicas = make_replicas(
            config.replicas,
            self.learner,
            self.runtime.data_group,
            self.traffic,
            overlap=not config.train.compile,
        )
        self.refresh = Refresh(
            self.learner,
            self.runtime.data_group,
            self.traffic,
            every=config.localized.refresh_every,
            recompute=config.localized.refresh_recompute,
            gain=config.localized.refresh_gain,
        )
        self.optimizer = RegionOptimizer(self.model, config.optim, keeps_released=self.refresh.enabled)
        self.step = TrainStep(
            config.train,
            self.region,
            self.replicas,
            self.optimizer,
            refresh=self.refresh,
            world_size=self.runtime.world_size,
            device=device,
            label_smoothing=config.optim.label_smoothing,
        )
        if config.train.compile:
            self.model.compile()
        self.plain_gradient_bytes = sum(p.numel() * p.element_size() for p in self.optimizer.parameters)
        self.checkpoints = CheckpointStore(self.directory.checkpoints, config.checkpoint.keep)
        self.recorder = self._closing(
            Recorder.open(self.directory.path, config.run, rank=self.runtime.rank, config_yaml=config.to_yaml())
        )
        self.batching = BatchController(
            config,
            step=self.step,
            data=self.data,
            monitor=self.monitor,
            runtime=self.runtime,
            recorder=self.recorder,
            directory=self.directory,
            num_layers=len(self.learner.layers),
            block_size=self.learner.layers.block_size,
        )
        self.epoch = 0
        self.samples_seen = 0
        self.best_top1 = -1.0
        # Weights are equal on all ranks; what is drawn while training (dropout) need not be.
        seed_everything(config.train.seed + 1 + self.runtime.rank)
        if not self._resume():
            self.recorder.truncate_to(-1, 0)
            self._move_boundary(self.selector.boundary)
        self.batching.respect_incidents(self.epoch, self.samples_seen)

    def fit(self) -> dict[str, Any]:
        """Trains to the last epoch."""
        metrics: dict[str, Any] = {}
        while self.epoch < self.config.train.epochs:
            with self.batching.leaving_on_out_of_memory(self.epoch):
                metrics = self._train_epoch()
            self.replicas.synchronise()
            pool_buffers(self.model, self.runtime.data_group)
            is_last = self.epoch + 1 == self.config.train.epochs
            if is_last or (self.epoch + 1) % self.config.train.evaluate_every == 0:
                metrics |= self._validate()
            else:
                metrics |= {"val_loss": None, "val_top1": None, "eval_seconds": 0.0}
            change = self.trace.end()
            metrics |= self._record_of(change, metrics["sum_of_lr"])
            self.epoch += 1
            self._decide(metrics, change)
            self.recorder.epoch(metrics)
            self._move_boundary(metrics["boundary_next"])
            self.batching.grow(metrics, is_last=is_last)
            self._save(metrics)
        return metrics

    def _train_epoch(self) -> dict[str, Any]:
        """One pass over the training set; returns its part of the epoch's record."""
        config, epoch = self.config, self.epoch
        self.learner.sign = self.supervision.sign
        self.data.train.set_epoch(epoch)
        self.trace.begin()
        self.monitor.reset_peak()
        self.model.train()
        tally = Tally(self.runtime.device)
        num_refreshes = 0
        sum_of_lr, start, cpu_start = 0.0, time.perf_counter(), time.process_time()
        for index, batches in enumerate(self._steps()):
            done = self.samples_seen / self.data.num_train
            self.optimizer.lr = lr_at(config.optim, done, config.train.epochs) * self.batching.lr_scale.at(done)
            self.learner.lr = config.localized.lr_at(epoch) * self.batching.local_lr_scale.at(done)
            sum_of_lr += self.optimizer.lr
            # The second step is the first with momentum and settled buckets; a refresh step needs more.
            measure = index == 1 or len(self.data.train) == 0 == index
            if self.refresh.is_due:
                measure |= num_refreshes == 0
                num_refreshes += 1
            with self.monitor.measured_step(self.model, self.optimizer.optimizer) if measure else nullcontext():
                self.step(batches, tally)
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            self.samples_seen += sum(batch.global_size for batch in batches)
            self._show_progress(tally, start)
        loss, correct, samples = self.runtime.sum(tally.sums())
        seconds, cpu_seconds = self.runtime.max([time.perf_counter() - start, time.process_time() - cpu_start])
        return {
            "epoch": epoch,
            "samples_seen": self.samples_seen,
            "lr": self.optimizer.lr,
            "sum_of_lr": sum_of_lr,
            "num_steps": index + 1,
            "num_refresh_steps": num_refreshes,
            "train_loss": loss / samples,
            "train_top1": correct / samples,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "images_per_second": samples / seconds,
        }

    def _steps(self) -> Iterator[list[Batch]]:
        """Micro-batches, as many at a time as make a step."""
        stream = iter(self.data.train)
        while batches := list(itertools.islice(stream, self.config.train.gradient_accumulation)):
            yield batches

    def _validate(self) -> dict[str, Any]:
        start = time.perf_counter()
        metrics: dict[str, Any] = {}
        models = {"": self.model}
        if self.ema is not None:
            self.replicas.synchronise_copy(self.ema.module)
            pool_buffers(self.ema, self.runtime.data_group)
            models["ema_"] = self.ema.module
        for prefix, model in models.items():
            sums = evaluate(model, self.data.val, self.config.train, self.runtime.device)
            loss, correct, samples = self.runtime.sum(sums)
            metrics |= {f"{prefix}val_loss": loss / samples, f"{prefix}val_top1": correct / samples}
        return metrics | {"eval_seconds": time.perf_counter() - start}

    def _decide(self, metrics: dict[str, Any], change: EpochDiagnostics) -> None:
        """What the next epoch does differently, from numbers that all ranks share."""
        if self.config.localized.weak_supervision:
            self.supervision.observe(metrics["train_loss"])
        update_norms = self.runtime.share(change.update_norm)
        if self.epoch < self.config.train.epochs:
            self.selector.observe(metrics["epoch"], update_norms)
        metrics["boundary_next"] = self.selector.boundary

    def _move_boundary(self, boundary: int) -> None:
        """Hands layers over to localized learning, and everything that speaks of the SGD region follows."""
        before = self.learner.boundary
        if boundary == before:
            return
        released = self.learner.advance(boundary)
        self.optimizer.release(released)
        self.region.refresh()
        self.replicas.refresh()
        if self.config.train.compile:
            # Past its limit of recompilations dynamo silently stops compiling; a shift invalidates all anyway.
            torch._dynamo.reset()
        self.recorder.event(
            "shift",
            epoch=max(0, self.epoch - 1),
            samples_seen=self.samples_seen,
            boundary_from=before,
            boundary_to=boundary,
        )
        held = [layer.name for layer in self.learner.layers[before:boundary] if not layer.updatable]
        if held and self.learner.rule.updates:
            self.recorder.event(
                "warning",
                epoch=max(0, self.epoch - 1),
                samples_seen=self.samples_seen,
                message=f"frozen in the localized region, since no localized rule applies: {', '.join(held)}",
            )

    def _record_of(self, change: EpochDiagnostics, sum_of_lr: float) -> dict[str, Any]:
        """The part of an epoch's record that describes its state, memory and traffic."""
        traffic = self.traffic.take()
        footprint = self.monitor.footprint()
        boundary = self.learner.boundary
        world_size, per_gpu = self.runtime.world_size, self.data.train.per_gpu_batch
        batches_per_step = world_size * self.config.train.gradient_accumulation
        plain_steps = -(-self.data.num_train // (batches_per_step * self.config.batch.per_gpu))
        update_norm = change.update_norm[min(boundary, len(change.update_norm) - 1)]
        return {
            "boundary": boundary,
            "num_layers": len(self.learner.layers),
            "per_gpu_batch": per_gpu,
            "global_batch": per_gpu * batches_per_step,
            "world_size": world_size,
            "local_lr": self.learner.lr,
            "sign": self.learner.sign,
            "transition_update_norm": update_norm,
            "transition_update_norm_per_lr": update_norm / sum_of_lr if sum_of_lr > 0 else None,
            "footprint_bytes": int(self.runtime.max([footprint.bytes])[0]),
            "footprint_source": footprint.source,
            "grad_all_reduce_bytes": traffic.gradient_bytes,
            "grad_all_reduce_count": traffic.gradient_collectives,
            "replica_sync_bytes": traffic.replica_bytes,
            "replica_sync_count": traffic.replica_collectives,
            "plain_ddp_bytes": self.plain_gradient_bytes * plain_steps if world_size > 1 else 0,
            "layer_names": [layer.name for layer in self.learner.layers],
            "layer_norm": change.norm,
            "layer_drift": change.drift,
            "layer_update_norm": change.update_norm,
            "layer_effective_rank": change.effective_rank,
        }

    def _show_progress(self, tally: Tally, start: float) -> None:
        if not self.recorder.step_due:
            return
        loss, _, samples = tally.sums()
        done = self.samples_seen / self.data.num_train - self.epoch
        rate = done * self.data.num_train / (time.perf_counter() - start)
        self.recorder.step(epoch=self.epoch, fraction=done, loss=loss / max(1.0, samples), images_per_second=rate)

    def _save(self, metrics: dict[str, Any]) -> None:
        """A checkpoint at the epoch's edge, where all ranks are equal but for their random state."""
        is_last = self.epoch == self.config.train.epochs
        top1 = metrics["val_top1"]
        is_best = top1 is not None and top1 > self.best_top1
        if is_best:
            self.best_top1 = top1
        if not (is_last or is_best or self.epoch % self.config.checkpoint.every_epochs == 0):
            return
        rng = self.runtime.gather(torch.get_rng_state())
        if self.runtime.is_main:
            path = self.checkpoints.save(self._state_dict(rng), epochs=self.epoch, is_best=is_best)
            self.recorder.event("checkpoint", epoch=metrics["epoch"], samples_seen=self.samples_seen, path=path.name)
        self.runtime.barrier()

    def _state_dict(self, rng: Any) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "samples_seen": self.samples_seen,
            "best_top1": self.best_top1,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.step.scaler is None else self.step.scaler.state_dict(),
            "learner": self.learner.state_dict(),
            "replicas": self.replicas.state_dict(),
            "refresh": self.refresh.state_dict(),
            "selector": self.selector.state_dict(),
            "supervision": self.supervision.state_dict(),
            "batching": self.batching.state_dict(),
            "rng": rng,
        }

    def _resume(self) -> bool:
        """Goes on from the newest checkpoint, if any: boundary, wrap, optimizer, then the state of each by name."""
        found: tuple[Path, dict[str, Any]] | None = None
        resume = self.config.run.resume
        if resume == "auto" or was_restarted():
            found = self.checkpoints.load_newest()
        if found is None and resume not in ("auto", "never"):
            found = Path(resume), load_state(Path(resume))
        if found is None:
            return False
        path, state = found
        self.epoch, self.samples_seen = state["epoch"], state["samples_seen"]
        self.best_top1 = state["best_top1"]
        self.recorder.truncate_to(self.epoch - 1, self.samples_seen)
        self.model.load_state_dict(state["model"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.release(self.learner.load_state_dict(state["learner"]))
        self.region.refresh()
        self.replicas.refresh()
        self.optimizer.load_state_dict(state["optimizer"])
        if self.step.scaler is not None and state["scaler"] is not None:
            self.step.scaler.load_state_dict(state["scaler"])
        self.replicas.load_state_dict(state["replicas"])
        self.refresh.load_state_dict(state["refresh"])
        self.selector.load_state_dict(state["selector"])
        self.supervision.load_state_dict(state["supervision"])
        self.batching.load_state_dict(state["batching"])
        if len(state["rng"]) == self.runtime.world_size:
            torch.set_rng_state(state["rng"][self.runtime.rank])
        self.recorder.event("resume", epoch=self.epoch, samples_seen=self.samples_seen, path=str(path))
        return True

    def _make_selector(self) -> Selector:
        if self.config.localized.rule == "none":
            return ScheduledSelector([0])
        layers = self.learner.layers
        return make_selector(
            self.config.selection,
            num_layers=len(layers),
            block_size=layers.block_size,
            epochs=self.config.train.epochs,
        )

    def _closing(self, resource: Any) -> Any:
        self._resources.callback(resource.close)
        return resource

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def move_aside(path: Path) -> None:
    """Renames a run directory that holds something to ``NAME.old-K``: starting afresh loses nothing."""
    if path.is_dir() and any(path.iterdir()):
        path.rename(next(p for k in itertools.count(1) if not (p := path.with_name(f"{path.name}.old-{k}")).exists()))
