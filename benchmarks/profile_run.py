"""Where the time of a whole run goes, from the start of the interpreter on: a table for docs/performance.md.

    torchrun --standalone --nproc-per-node=2 benchmarks/profile_run.py --output profile.json --config quickstart \\
        --run.dir=runs/profile --run.resume=never

What is not an option of this script goes to the trainer. Times are rank 0's, by the clock on the wall. The exchange of
gradients is inside the backward pass, which waits for it.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from pathlib import Path

from measuring import environment, write_json
from rich.console import Console
from rich.table import Table
from stopwatch import Stopwatch

from locsgd_dist.config import check_config, parse_config
from locsgd_dist.distributed import environment_rank, resolve_device
from locsgd_dist.trainer import Trainer


def seconds_since_start() -> float:
    """Age of this process."""
    started = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def watch_run(watch: Stopwatch, trainer: Trainer) -> None:
    """Counts what a run does beside its steps."""
    watch.watch_step(trainer.step, trainer.learner)
    watch.watch(trainer, "_train_epoch", "data, loss and the rest of steps")
    for owner, names, part in [
        (trainer.replicas, ["start", "finish_step"], "replicas"),
        (trainer.validation, ["pool", "measure"], "evaluation"),
        (trainer.trace, ["begin", "end"], "norms and ranks of the weights"),
        (trainer.records, ["of_training", "of_state"], "records"),
        (trainer.transitions, ["move_boundary"], "moving the boundary"),
        (trainer.batching, ["grow"], "growing the batch"),
        (trainer.checkpoints, ["after_step", "at_epoch_end", "finish"], "checkpoints"),
        (trainer.recorder, ["epoch", "event", "step"], "console, files, report"),
    ]:
        for name in names:
            watch.watch(owner, name, part, whole=True)


def main() -> None:
    imported = seconds_since_start()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options, rest = parser.parse_known_args()
    config = parse_config(rest)
    watch = Stopwatch(resolve_device(config.train.device), clock="wall")
    watch.seconds["interpreter and imports"] = imported
    watch.around("setting up", check_config)(config)
    gc.freeze()  # as the trainer's own start does
    with watch.around("setting up", Trainer)(config) as trainer:
        watch_run(watch, trainer)
        metrics = watch.around("between epochs", trainer.fit)()
        watch.around("closing", trainer.close)()
    watch.release()
    if environment_rank() == 0:
        show(watch.seconds)
        steps = {"epochs": config.train.epochs, "world_size": int(os.environ.get("WORLD_SIZE", 1))}
        write_json(
            options.output,
            environment(resolve_device(config.train.device))
            | steps
            | {"top1": metrics["val_top1"], "seconds": watch.seconds},
        )


def show(seconds: dict[str, float]) -> None:
    total = sum(seconds.values())
    table = Table("part", "s", "share", title=f"{total:.1f} s")
    for part, taken in sorted(seconds.items(), key=lambda pair: -pair[1]):
        table.add_row(part, f"{taken:.2f}", f"{taken / total:.1%}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
