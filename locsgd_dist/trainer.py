"""The training loop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, Self

import torch

from locsgd_dist.baselines import make_baseline, with_droppable_blocks
from locsgd_dist.batching import BatchController
from locsgd_dist.checkpoint import was_restarted
from locsgd_dist.config import Config
from locsgd_dist.data import Batch, build_data
from locsgd_dist.distributed import (
    Refresh,
    RegionDDP,
    Runtime,
    Traffic,
    make_replicas,
    pool_buffers,
    refuse_synchronised_norms,
    resolve_device,
)
from locsgd_dist.epoch_record import EpochRecords
from locsgd_dist.faults import StepGuard, StopSignals, naming_silent_ranks
from locsgd_dist.localized import (
    LocalizedLearner,
    WeakSupervision,
    WeightTrace,
    make_selector,
)
from locsgd_dist.localized.selection import ScheduledSelector, Selector
from locsgd_dist.memory import FootprintMonitor
from locsgd_dist.models import build_model, network_size, to_channels_last
from locsgd_dist.optimization import RegionOptimizer, averaged_model, lr_at
from locsgd_dist.progress import Progress
from locsgd_dist.recording import Recorder, RunDirectory
from locsgd_dist.run_state import RunState, seed_everything
from locsgd_dist.saving import Checkpointer
from locsgd_dist.step import TrainStep, evaluate

UNEVALUATED: dict[str, Any] = {"val_loss": None, "val_top1": None, "eval_seconds": 0.0}


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
        signals = self._closing(StopSignals().__enter__())
        # Before the first use of CUDA, so that the context counts in the footprint.
        self.monitor = self._closing(FootprintMonitor(config.monitor, device))
        self.runtime = self._closing(Runtime(device, config.distributed))
        if config.run.resume == "never" and not was_restarted():
            if self.runtime.is_main:
                self.directory.move_aside()
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
        model = build_model(config.model, self.data.num_classes)
        refuse_synchronised_norms(model, self.runtime.world_size)
        self.model = with_droppable_blocks(model, config.stochastic_depth).to(device)
        if config.train.channels_last:
            to_channels_last(self.model, device)
        self.ema = averaged_model(self.model, config.optim.ema_decay) if config.optim.ema_decay else None
        self.example_input = torch.zeros(1, *self.data.input_shape, device=device)
        self.learner = LocalizedLearner(
            self.model,
            self.example_input,
            rule="frozen" if config.localized.rule == "none" else config.localized.rule,
            batch_fraction=config.localized.batch_fraction,
            seed=config.train.seed,
            hold_statistics=config.localized.norm_statistics == "held",
        )
        networks = [self.model] if self.ema is None else [self.model, self.ema.module]
        self.baseline = make_baseline(config, networks, self.learner.layers, self.example_input, self.runtime)
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
            skipped=self.baseline.skipped,
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
        self.guard = StepGuard(device, self.runtime.data_group, max_bad_steps=config.faults.max_bad_steps)
        self.step = TrainStep(
            config.train,
            self.region,
            self.replicas,
            self.optimizer,
            guard=self.guard,
            refresh=self.refresh,
            world_size=self.runtime.world_size,
            device=device,
            label_smoothing=config.optim.label_smoothing,
            penalty=self.baseline.penalty,
        )
        if config.train.compile:
            self.model.compile()
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
        self.progress = Progress(device)
        self.records = EpochRecords(
            config,
            runtime=self.runtime,
            data=self.data,
            learner=self.learner,
            progress=self.progress,
            guard=self.guard,
            monitor=self.monitor,
            traffic=self.traffic,
            plain_gradient_bytes=sum(p.numel() * p.element_size() for p in self.optimizer.parameters),
        )
        self.checkpoints = self._closing(
            Checkpointer(
                config.checkpoint,
                self._run_state(),
                directory=self.directory,
                recorder=self.recorder,
                signals=signals,
            )
        )
        # Weights are equal on all ranks; what is drawn while training (dropout) need not be.
        seed_everything(config.train.seed + 1 + self.runtime.rank)
        if not self.checkpoints.restore(config.run.resume):
            self.recorder.truncate_to(-1, 0)
            self._move_boundary(self.selector.boundary)
        self.size = network_size(self.model, self.example_input)
        self.batching.respect_incidents(self.progress.epoch, self.progress.samples_seen)

    def fit(self) -> dict[str, Any]:
        """Trains to the last epoch; returns its record.

        Raises:
            Preempted: the run was asked to leave and has saved itself.
            TooManyBadStepsError: one step after the other was not finite.
            StepOutOfMemoryError: a step did not fit; the next start goes on with a batch that does.
        """
        metrics: dict[str, Any] = {}
        with naming_silent_ranks(self.runtime):
            while self.progress.epoch < self.config.train.epochs:
                metrics = self._run_epoch()
            self.checkpoints.finish()
        return metrics

    def _run_epoch(self) -> dict[str, Any]:
        """Training, evaluation, and what follows from them; goes on where an earlier process has left the epoch."""
        progress = self.progress
        is_last = progress.epoch + 1 == self.config.train.epochs
        is_evaluated = is_last or (progress.epoch + 1) % self.config.train.evaluate_every == 0
        trained: dict[str, Any] | None = progress.record
        if trained is None:
            with self.batching.leaving_on_out_of_memory(progress.epoch):
                self._train_epoch()
            trained = self.records.of_training() | self.size
            self._pool(with_average=is_evaluated)
            change = self.trace.end()
            self._prune()
            progress.record = trained = trained | self.records.of_state(change)
        metrics = trained | (self._validate() if is_evaluated else UNEVALUATED)
        progress.end_epoch()
        self._decide(metrics)
        self.recorder.epoch(metrics)
        self._move_boundary(metrics["boundary_next"])
        self.batching.grow(metrics, is_last=is_last)
        self.checkpoints.at_epoch_end(metrics, is_last=is_last)
        return metrics

    def _train_epoch(self) -> None:
        """One pass over the training set, or what is left of it."""
        config, progress = self.config, self.progress
        if not progress.is_under_way:
            self.learner.sign = self.supervision.sign
            self.data.train.set_epoch(progress.epoch)
            self.trace.begin()
            self.monitor.reset_peak()
            self.guard.begin_epoch()
            progress.begin_epoch()
        self.learner.train()
        for batches in self._steps():
            done = progress.samples_seen / self.data.num_train
            progress.lr = lr_at(config.optim, done, config.train.epochs) * self.batching.lr_scale.at(done)
            self.optimizer.lr = progress.lr
            self.learner.lr = config.localized.lr_at(progress.epoch) * self.batching.local_lr_scale.at(done)
            with self.baseline.step(progress.samples_seen, progress.tally), self._measured():
                self.step(batches, progress.tally)
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            progress.count_step(sum(batch.global_size for batch in batches))
            self._show_progress()
            self._report_bad_steps(self.guard.check())
            self.checkpoints.after_step()
        self._report_bad_steps(self.guard.finish_epoch())

    def _measured(self) -> AbstractContextManager[None]:
        """Around a step: measures its memory, if it is one that needs as much as any of the epoch."""
        progress = self.progress
        # The second step is the first with momentum and settled buckets; a refresh step needs more.
        is_telling = progress.steps == 1 or len(self.data.train) == 0 == progress.steps
        if self.refresh.is_due:
            is_telling |= progress.num_refreshes == 0
            progress.num_refreshes += 1
        return self.monitor.measured_step(self.model, self.optimizer.optimizer) if is_telling else nullcontext()

    def _report_bad_steps(self, count: int) -> None:
        if count:
            where = {"epoch": self.progress.epoch, "samples_seen": self.progress.samples_seen}
            self.recorder.event("bad_step", **where, skipped_steps=count, message="loss or gradient not finite")

    def _steps(self) -> Iterator[list[Batch]]:
        """Micro-batches, as many at a time as make a step."""
        stream = iter(self.data.train)
        while batches := list(itertools.islice(stream, self.config.train.gradient_accumulation)):
            yield batches

    def _pool(self, *, with_average: bool) -> None:
        """Makes the network equal on all ranks, and its moving average where it is about to be evaluated."""
        self.replicas.synchronise()
        pool_buffers(self.model, self.runtime.data_group)
        if self.ema is not None and with_average:
            self.replicas.synchronise_copy(self.ema.module)
            pool_buffers(self.ema, self.runtime.data_group)

    def _validate(self) -> dict[str, Any]:
        start = time.perf_counter()
        metrics: dict[str, Any] = {}
        models = {"": self.model}
        if self.ema is not None:
            models["ema_"] = self.ema.module
        listen = self.checkpoints.between_batches
        for prefix, model in models.items():
            sums = evaluate(model, self.data.val, self.config.train, self.runtime.device, between=listen)
            # All ranks listen equally often: one with fewer batches makes up for it.
            for _ in range(self.data.val.num_rounds - len(self.data.val)):
                listen()
            loss, correct, samples = self.runtime.sum(sums)
            metrics |= {f"{prefix}val_loss": loss / samples, f"{prefix}val_top1": correct / samples}
        return metrics | {"eval_seconds": time.perf_counter() - start}

    def _decide(self, metrics: dict[str, Any]) -> None:
        """What the next epoch does differently, from numbers that all ranks share."""
        if self.config.localized.weak_supervision:
            self.supervision.observe(metrics["train_loss"])
        update_norms = self.runtime.share(metrics["layer_update_norm"])
        if self.progress.epoch < self.config.train.epochs:
            self.selector.observe(metrics["epoch"], update_norms)
        metrics["boundary_next"] = self.selector.boundary

    def _prune(self) -> None:
        """Lets the baseline cut the network at an epoch's end, and everything that speaks of its weights follows."""
        surgery = self.baseline.end_epoch(self.progress.epoch)
        if surgery is None:
            return
        self.optimizer.cut(surgery.cut)
        self.region.refresh()
        if self.config.train.compile:
            torch._dynamo.reset()
        before, self.size = self.size, network_size(self.model, self.example_input)
        self.recorder.event(
            "prune",
            epoch=self.progress.epoch,
            samples_seen=self.progress.samples_seen,
            removed_channels=surgery.removed_channels,
            num_parameters_from=before["num_parameters"],
            num_parameters_to=self.size["num_parameters"],
            forward_macs_from=before["forward_macs"],
            forward_macs_to=self.size["forward_macs"],
        )

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
            epoch=max(0, self.progress.epoch - 1),
            samples_seen=self.progress.samples_seen,
            boundary_from=before,
            boundary_to=boundary,
        )
        held = [layer.name for layer in self.learner.layers[before:boundary] if not layer.updatable]
        if held and self.learner.rule.updates:
            self.recorder.event(
                "warning",
                epoch=max(0, self.progress.epoch - 1),
                samples_seen=self.progress.samples_seen,
                message=f"frozen in the localized region, since no localized rule applies: {', '.join(held)}",
            )

    def _show_progress(self) -> None:
        if not self.recorder.step_due:
            return
        progress = self.progress
        loss, _, samples = progress.tally.sums()
        done = progress.samples_seen / self.data.num_train - progress.epoch
        self.recorder.step(
            epoch=progress.epoch,
            fraction=done,
            loss=loss / max(1.0, samples),
            images_per_second=done * self.data.num_train / progress.seconds,
        )

    def _run_state(self) -> RunState:
        return RunState(
            runtime=self.runtime,
            seed=self.config.train.seed,
            progress=self.progress,
            model=self.model,
            ema=self.ema,
            learner=self.learner,
            region=self.region,
            replicas=self.replicas,
            refresh=self.refresh,
            optimizer=self.optimizer,
            scaler=self.step.scaler,
            guard=self.guard,
            baseline=self.baseline,
            selector=self.selector,
            supervision=self.supervision,
            trace=self.trace,
            batching=self.batching,
            stream=self.data.train,
            monitor=self.monitor,
            traffic=self.traffic,
        )

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
