"""``locsgd sweep``: its options, what it checks before the first run starts, and the report at the end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from locsgd_dist.cli import num_processes
from locsgd_dist.options import OneLineParser
from locsgd_dist.sweeping.execution import Progress, run_here
from locsgd_dist.sweeping.expansion import Plan, check_machine, plan_sweep
from locsgd_dist.sweeping.launching import train_command
from locsgd_dist.sweeping.manifest import in_turn, write_manifest
from locsgd_dist.sweeping.resolution import State, check_existing, resolve, state_of
from locsgd_dist.sweeping.spec import load_sweep


def sweep(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code: 0 all runs are finished, 1 some are not, 2 something is wrong with the
    file or the options (raised as ValueError), 130 and 143 the sweep was interrupted.

    Raises:
        ValueError: one line that names the option, variant or key; nothing has been started.
    """
    options, extra = _parser().parse_known_args(arguments)
    description = load_sweep(options.file)
    output = options.output or Path("runs") / description.name
    plan = plan_sweep(description, output, extra, only=options.only, seeds=options.seeds)
    check_machine(plan)
    _check_needs(plan)
    check_existing(plan, {r.name: r for run in plan.selected for r in (*plan.needs(run), run)}.values())
    device = plan.variants[0].config.train.device
    nproc = _num_ranks(options.nproc or str(description.nproc), device, on_cluster=options.slurm is not None)
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    if options.dry_run:
        _show(plan, nproc)
        return 0
    if options.slurm is None:
        progress = Progress.of(plan, on_change=lambda: write_manifest(plan))
        write_manifest(plan)
        run_here(progress, nproc=nproc, jobs=options.jobs or 1)
    else:
        from locsgd_dist.sweeping.slurm import make_executor, run_in_waves

        parameters = description.slurm | ({"partition": options.slurm} if options.slurm else {})
        executor = make_executor(
            plan.output / "slurm",
            parameters,
            nproc=nproc,
            jobs=options.jobs,
            name=description.name,
            gpus=device != "cpu",
        )
        progress = Progress.of(plan, on_change=lambda: write_manifest(plan))
        write_manifest(plan)
        run_in_waves(progress, executor, nproc=nproc)
    code = progress.summary()
    if progress.interrupted is None and not options.no_report:
        _report(plan)
    return code


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="locsgd sweep",
        description="Carries out the runs that a sweep file describes, skips those that are done, and compares them.",
        epilog="--section.key=value arguments go to all runs: locsgd sweep FILE --data.root=DIR",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="sweep file, such as benchmarks/reproduce/table2.yaml")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the runs (default: runs/NAME)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: 1; with --slurm no limit)")
    parser.add_argument("--nproc", metavar="N", help="ranks of each run, gpu or auto (default: the file's)")
    parser.add_argument(
        "--slurm",
        nargs="?",
        const="",
        metavar="PARTITION",
        help="job arrays on a Slurm cluster; the file's slurm entry holds further parameters",
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants or benchmarks; * is a wildcard")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="these seeds of the file's")
    parser.add_argument("--dry-run", action="store_true", help="check everything and show the runs; start nothing")
    parser.add_argument("--no-report", action="store_true", help="leave out the comparison at the end")
    return parser


def _num_ranks(nproc: str, device: str, *, on_cluster: bool) -> int:
    """Ranks of each run; on a cluster this machine's GPUs say nothing about the nodes'."""
    if not on_cluster:
        return num_processes(nproc, device)
    if not nproc.isdecimal() or int(nproc) < 1:
        raise ValueError(f"--nproc must be a whole number >= 1 with --slurm, got {nproc!r}")
    return int(nproc)


def _check_needs(plan: Plan) -> None:
    """A run that needs one which is neither done nor to be done would wait for ever."""
    selected = {run.name for run in plan.selected}
    for run in plan.selected:
        for need in plan.needs(run):
            if need.name not in selected and state_of(need) is not State.FINISHED:
                raise ValueError(
                    f"{run.name} needs {need.name}, which is not finished: add {need.variant.name} to --only"
                )


def _show(plan: Plan, nproc: int) -> None:
    for run in plan.selected:
        try:
            arguments = resolve(plan, run).arguments
        except ValueError:  # what it needs is not finished yet
            arguments = run.variant.arguments
            arguments += (f"--train.seed={run.seed}", f"--run.dir={run.directory}")
        print(f"{run.name} [{state_of(run).value}]{_needs(plan, run.variant.name, run.seed)}")
        print(f"    {shlex.join(train_command(arguments, nproc)[1:])}")
    states = [state_of(run) for run in plan.selected]
    print(f"{len(states)} runs, {states.count(State.FINISHED)} of them finished, in {plan.output}")


def _needs(plan: Plan, variant: str, seed: int) -> str:
    planned = plan.run_of(variant, seed).variant
    phrases = [f"boundary of {planned.trace_of}"] if planned.trace_of else []
    phrases += [f"as many epochs as cost what {planned.cost_of} did"] if planned.cost_of else []
    return f"  ({', '.join(phrases)})" if phrases else ""


def _report(plan: Plan) -> None:
    finished = [run.directory for run in plan.runs if state_of(run) is State.FINISHED]
    if not finished:
        return
    from locsgd_dist.reporting.comparison import write_comparison

    try:
        with in_turn(plan.output):
            print(write_comparison([plan.output], plan.output))
    except (OSError, ValueError) as error:  # the runs are done all the same
        print(f"locsgd sweep: warning: no comparison was written: {error}", file=sys.stderr)
