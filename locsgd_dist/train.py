"""``python -m locsgd_dist.train``: reads the configuration and trains. Under torchrun, one process per rank."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Sequence

from locsgd_dist.config import check_config, config_error_exit, parse_config
from locsgd_dist.distributed import environment_rank
from locsgd_dist.faults import CollapsedError, Preempted, TooManyBadStepsError
from locsgd_dist.memory import StepOutOfMemoryError
from locsgd_dist.saving import NotSavedError
from locsgd_dist.trainer import Trainer

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        config = parse_config(sys.argv[1:] if argv is None else argv)
        check_config(config)
        # Collections, of which each measurement has one, then pass over all that was imported: it stays anyway.
        gc.freeze()
        # What only the built network can tell (a boundary beyond its layers, weights that do not fit) is still an
        # error of the configuration: nothing has been trained yet.
        trainer = Trainer(config)
    except ValueError as error:
        log.debug("configuration refused", exc_info=True)
        return config_error_exit(error, is_main=environment_rank() == 0)
    try:
        with trainer:
            trainer.fit()
    except StepOutOfMemoryError as error:
        print(
            f"locsgd: {error}; the next start goes on from the newest checkpoint with a batch that fits",
            file=sys.stderr,
        )
        return 1
    except (TooManyBadStepsError, CollapsedError, NotSavedError) as error:
        if environment_rank() == 0:
            print(f"locsgd: error: {error}", file=sys.stderr)
        return 1
    except Preempted as preempted:
        # Not a failure: torchrun would start the run again on a machine that is going away.
        if environment_rank() == 0:
            print(f"locsgd: asked to leave, {preempted}", file=sys.stderr)
        return 0
    if environment_rank() == 0:
        has_report = config.run.report_every is not None and trainer.directory.report.exists()
        report = f"  report: {trainer.directory.report}" if has_report else ""
        print(f"run: {trainer.directory.path}{report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
