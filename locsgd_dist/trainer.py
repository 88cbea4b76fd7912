"""The training loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, Self

import torch

from locsgd_dist.annealing import annealed_lr, hand_over_epochs
from locsgd_dist.baselines import make_baseline, with_droppable_blocks
from locsgd_dist.batching import BatchController
from locsgd_dist.checkpoint import was_restarted
from locsgd_dist.config import Config
from locsgd_dist.data import Batch, build_data
from locsgd_dist.decisions import Decisions
from locsgd_dist.distributed import (
    Alignment,
    KeptOutputs,
    Recurrence,
    Refresh,
    RegionDDP,
    Runtime,
    Traffic,
    make_replicas,
    refuse_synchronised_norms,
    resolve_device,
)
from locsgd_dist.epoch_record import EpochRecords, agreed
from locsgd_dist.faults import CollapsedError, StepGuard, StopSignals, naming_silent_ranks
from locsgd_dist.localized import LocalizedLearner, WeightTrace
from locsgd_dist.memory import FootprintMonitor
from locsgd_dist.models import build_model, to_channels_last
from locsgd_dist.optimization import RegionOptimizer, averaged_model, lr_at
from locsgd_dist.progress import Progress
from locsgd_dist.recording import Recorder, RunDirectory
from locsgd_dist.run_state import RunState, seed_everything
from locsgd_dist.saving import Checkpointer, NotSavedError
from locsgd_dist.step import TrainStep, autocast
from locsgd_dist.transitions import Transitions
from locsgd_dist.validation import Validation


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
        # torchrun counts on each node for itself, and not every restart on all of them.
        is_restart = bool(self.runtime.max([float(was_restarted())])[0])
        # Before whatever may fail from here on: a process that is started again takes the run it finds for its own.
        if config.run.resume == "never" and not is_restart:
            if self.runtime.is_main:
                self.directory.move_aside()
            self.runtime.barrier()
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
            rule=config.localized.make_rule(config.train.seed),
            batch_fraction=config.localized.batch_fraction,
            update_every=config.localized.update_every,
            hold_statistics=config.localized.norm_statistics == "held",
        )
        networks = [self.model] if self.ema is None else [self.model, self.ema.module]
        self.baseline = make_baseline(config, networks, self.learner.layers, self.example_input, self.runtime)
        self.decisions = Decisions(config, self.learner.layers, num_classes=self.data.num_classes)
        self.trace = WeightTrace(self.learner.layers)
        self.traffic = Traffic()
        self.region = RegionDDP(
            self.model,
            self.runtime.data_group,
            self.traffic,
            compression=config.distributed.gradient_compression,
            deterministic=config.train.deterministic,
            skipped=self.baseline.skipped,
            bucket_mib=config.distributed.bucket_mib,
        )
        self.replicas = make_replicas(
            config.replicas,
            self.learner,
            self.runtime.data_group,
            self.traffic,
            overlap=not config.train.compile,
        )
        self.refresh = Refresh(self.learner, self.runtime.data_group, self.traffic, config.localized)
        self.alignment = Alignment(
            self.learner,
            self.refresh,
            self.runtime.data_group,
            self.traffic,
            config.localized,
            sums_updates=config.replicas.mode == "all_reduce",
        )
        self.optimizer = RegionOptimizer(
            self.model,
            config.optim,
            keeps_released=self.refresh.enabled,
            carries_released=config.localized.refresh_carry,
            hand_overs=hand_over_epochs(config, self.learner.layers),
        )
        self.kept = KeptOutputs(
            config.localized,
            self.model,
            self.learner,
            self.runtime,
            example=self.example_input,
            recurrence=Recurrence.of(
                self.data.train.num_keys, config.data.draws, config.data.draws_from, config.train.epochs
            ),
            autocast=autocast(config.train, device),
        )
        self.guard = StepGuard(device, self.runtime.data_group, max_bad_steps=config.faults.max_bad_steps)
        self.step = TrainStep(
            config.train,
            self.region,
            self.replicas,
            self.optimizer,
            guard=self.guard,
            refresh=self.refresh,
            alignment=self.alignment,
            kept=self.kept,
            world_size=self.runtime.world_size,
            device=device,
            label_smoothing=config.optim.label_smoothing,
            penalty=self.baseline.penalty,
        )
        self.validation = Validation(
            config.train, self.model, self.ema, replicas=self.replicas, data=self.data, runtime=self.runtime
        )
        if config.train.compile:
            self.model.compile()
        # From here on the run directory is written to: what may refuse the configuration, but for a checkpoint that
        # does not fit it, stands above.
        self.monitor.start_trace(self.directory.memory, self.runtime.rank)
        self.recorder = self._closing(
            Recorder.open(self.directory.path, config.run, rank=self.runtime.rank, config_yaml=config.to_yaml())
        )
        # Before the recorder closes, with which the last report is drawn.
        self._resources.callback(self.monitor.flush_trace)
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
        self.transitions = Transitions(
            self.model,
            self.example_input,
            learner=self.learner,
            baseline=self.baseline,
            optimizer=self.optimizer,
            region=self.region,
            replicas=self.replicas,
            kept=self.kept,
            recorder=self.recorder,
            progress=self.progress,
            is_compiled=config.train.compile,
        )
        self.records = EpochRecords(
            config,
            runtime=self.runtime,
            data=self.data,
            learner=self.learner,
            progress=self.progress,
            guard=self.guard,
            monitor=self.monitor,
            traffic=self.traffic,
            alignment=self.alignment,
            kept=self.kept,
            plain_gradient_bytes=sum(p.numel() * p.element_size() for p in self.optimizer.parameters),
        )
        self.checkpoints = self._closing(
            Checkpointer(
                config.checkpoint,
                self._run_state(),
                directory=self.directory,
                recorder=self.recorder,
                signals=signals,
                is_restart=is_restart,
            )
        )
        # Weights are equal on all ranks; what is drawn while training (dropout) need not be.
        seed_everything(config.train.seed + 1 + self.runtime.rank)
        if not self.checkpoints.restore(config.run.resume):
            self.recorder.truncate_to(-1, 0)
        if not self.progress.is_under_way:
            boundary = self.decisions.selector.start(self.progress.epoch)
            if boundary > self.learner.boundary:
                self.trace.begin()
                self.decisions.begin(agreed(self.trace.end(), self.runtime))
            self.transitions.move_boundary(boundary)
        self.transitions.keep_outputs(self.progress.epoch)
        self.transitions.measure()
        self.batching.respect_incidents(self.progress.epoch, self.progress.samples_seen)

    def fit(self) -> dict[str, Any]:
        """Trains to the last epoch; returns its record.

        Raises:
            Preempted: the run was asked to leave and has saved itself, if it could.
            NotSavedError: the last checkpoint could not be written.
            TooManyBadStepsError: one step after the other was not finite.
            CollapsedError: the network has collapsed, and the run is to stop then; it has saved itself, if it could.
            StepOutOfMemoryError: a step did not fit; the next start goes on with a batch that does.
        """
        metrics: dict[str, Any] = {}
        collapse = self.decisions.collapse
        with naming_silent_ranks(self.runtime):
            while self.progress.epoch < self.config.train.epochs and not collapse.ends_run:
                metrics = self._run_epoch()
            try:
                self.checkpoints.finish()
            except NotSavedError as error:
                if collapse.ends_run:
                    raise CollapsedError(f"the network has collapsed ({collapse.verdict}), and {error}") from error
                raise
            if collapse.ends_run:
                # A rank that fails has the others killed: none may be writing.
                self.runtime.barrier()
                raise CollapsedError(
                    f"the network has collapsed ({collapse.verdict}); the run is saved, and goes on with "
                    "faults.on_collapse=warn"
                )
        return metrics

    def _run_epoch(self) -> dict[str, Any]:
        """Training, evaluation, and what follows from them; goes on where an earlier process has left the epoch."""
        progress = self.progress
        is_last = progress.epoch + 1 == self.config.train.epochs
        is_evaluated = self.validation.is_due(progress.epoch)
        trained: dict[str, Any] | None = progress.record
        if trained is None:
            with self.batching.leaving_on_out_of_memory(progress.epoch):
                self._train_epoch()
            trained = self.records.of_training() | self.transitions.size
            self.validation.pool(with_average=is_evaluated)
            change = agreed(self.trace.end(), self.runtime)
            self.transitions.prune()
            progress.record = trained = trained | self.records.of_state(change)
        measured = self.validation.measure(self.checkpoints.between_batches) if is_evaluated else Validation.UNEVALUATED
        metrics = trained | measured
        progress.end_epoch()
        self.decisions.observe(metrics)
        self.recorder.epoch(metrics)
        self.decisions.look_for_collapse(metrics, self.recorder)
        self.transitions.move_boundary(metrics["boundary_next"])
        self.batching.grow(metrics, is_last=is_last)
        self.checkpoints.at_epoch_end(metrics, is_last=is_last or self.decisions.collapse.ends_run)
        return metrics

    def _train_epoch(self) -> None:
        """One pass over the training set, or what is left of it."""
        progress = self.progress
        if not progress.is_under_way:
            self.learner.sign = self.decisions.sign
            self.data.train.set_epoch(progress.epoch)
            self.trace.begin()
            self.monitor.reset_peak()
            self.guard.begin_epoch()
            progress.begin_epoch()
        self.refresh.interval = self.config.localized.refresh_interval(progress.epoch, self.config.train.epochs)
        self.learner.train()
        for done, batches in self._steps():
            self._set_learning_rates(done)
            with self.baseline.step(progress.samples_seen, progress.tally), self._measured():
                self.step(batches, progress.tally)
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            progress.count_step(sum(batch.global_size for batch in batches))
            self._show_progress()
            self._report_bad_steps(self.guard.check())
            self.checkpoints.after_step()
        self._report_bad_steps(self.guard.finish_epoch())

    def _set_learning_rates(self, done: float) -> None:
        """Those of the next step, after ``done`` epochs."""
        config, epochs, scale = self.config, self.config.train.epochs, self.batching.lr_scale.at(done)
        rate = lr_at(config.optim, done, epochs)
        self.progress.lr = self.optimizer.lr = rate * scale
        self.optimizer.anneal(
            lambda hand_over: annealed_lr(config.optim, done, epochs, hand_over, config.selection.anneal_scale) * scale
        )
        self.learner.lr = self.batching.local_lr(self.progress.epoch, done, rate / config.optim.lr)

    def _measured(self) -> AbstractContextManager[None]:
        """Around a step: measures its memory, if it is one that needs as much as any of the epoch."""
        progress = self.progress
        # The second step is the first with momentum and settled buckets. A step through the whole network needs more,
        # and so does one that computes a localized update, where others do not.
        is_telling = progress.steps == 1 or len(self.data.train) == 0 == progress.steps
        if self.refresh.is_due:
            is_telling |= progress.num_refreshes == 0
            progress.num_refreshes += 1
        if self.alignment.is_due:
            is_telling |= progress.num_alignments == 0
            progress.num_alignments += 1
        if self.learner.updated_layers and self.step.is_update_due:
            is_telling |= progress.num_updates < 2 and self.learner.update_every > 1
            progress.num_updates += 1
        return self.monitor.measured_step(self.model, self.optimizer.optimizer) if is_telling else nullcontext()

    def _report_bad_steps(self, count: int) -> None:
        if count:
            where = {"epoch": self.progress.epoch, "samples_seen": self.progress.samples_seen}
            self.recorder.event("bad_step", **where, skipped_steps=count, message="loss or gradient not finite")

    def _steps(self) -> Iterator[tuple[float, list[Batch]]]:
        """Epochs done before a step, and its micro-batches."""
        stream = iter(self.data.train)
        while len(self.data.train):
            done = self.data.train.epochs_done
            yield done, list(itertools.islice(stream, self.config.train.gradient_accumulation))

    def _show_progress(self) -> None:
        if not self.recorder.step_due:
            return
        progress = self.progress
        loss, _, samples = progress.tally.sums()
        done = self.data.train.epochs_done - progress.epoch
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
            alignment=self.alignment,
            kept=self.kept,
            optimizer=self.optimizer,
            scaler=self.step.scaler,
            guard=self.guard,
            collapse=self.decisions.collapse,
            baseline=self.baseline,
            selector=self.decisions.selector,
            supervision=self.decisions.supervision,
            trace=self.trace,
            batching=self.batching,
            stream=self.data.train,
            monitor=self.monitor,
            traffic=self.traffic,
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
