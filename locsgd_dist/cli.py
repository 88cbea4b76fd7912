"""``locsgd``: train, launch, plan, sweep, compare, evaluate, export, report."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from locsgd_dist.config import check_config, config_error_exit, parse_config
from locsgd_dist.launching.environment import launch_environment
from locsgd_dist.options import OneLineParser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code (2: the command line or configuration is wrong)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["train"]:
            return train(arguments[1:])
        if arguments[:1] == ["plan"]:
            from locsgd_dist.planner.command import plan

            return plan(arguments[1:])
        if arguments[:1] == ["sweep"]:
            from locsgd_dist.sweeping.command import sweep

            return sweep(arguments[1:])
        if arguments[:1] == ["compare"]:
            from locsgd_dist.reporting.comparison.command import compare

            return compare(arguments[1:])
        if arguments[:1] == ["launch"]:
            from locsgd_dist.launching.command import launch

            return launch(arguments[1:])
        return _run(arguments)
    except ValueError as error:
        return config_error_exit(error, is_main=True)


def _run(arguments: Sequence[str]) -> int:
    parser = OneLineParser(prog="locsgd", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "train", help="start a run: locsgd train [--nproc N|gpu|auto] [--config FILE] [--section.key=value ...]"
    )
    commands.add_parser(
        "launch", help="start a run on a cluster: locsgd launch local|slurm|kubeflow --nodes N --gpus-per-node G ..."
    )
    commands.add_parser(
        "plan", help="foretell memory, batch, traffic and time: locsgd plan [--config FILE] [--gpu-memory 10GiB] ..."
    )
    commands.add_parser("sweep", help="many runs from one file, compared: locsgd sweep FILE [--jobs N] [--slurm] ...")
    commands.add_parser("compare", help="runs beside each other and the paper: locsgd compare RUN_OR_SWEEP ...")
    evaluate = commands.add_parser("evaluate", help="evaluate a run's network on its validation set")
    export = commands.add_parser("export", help="write a run's weights for use without this package")
    report = commands.add_parser("report", help="write report.html of a run")
    for command in (evaluate, export, report):
        command.add_argument("run", type=Path, metavar="RUN", help="run directory")
    for command in (evaluate, export):
        command.add_argument("--checkpoint", default="best", help="best (default), newest, or a checkpoint file")
        command.add_argument("--ema", action="store_true", help="the moving average of the weights")
    evaluate.add_argument("--device", choices=["auto", "cuda", "cpu"], help="default: the run's train.device")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    export.add_argument("--output", type=Path, required=True, metavar="FILE")
    export.add_argument("--format", choices=["state_dict", "torch_export", "onnx"], default="state_dict")
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    options = parser.parse_args(arguments)
    match options.command:
        case "evaluate":
            return _evaluate(options)
        case "export":
            return _export(options)
        case _:
            return _report(options)


def train(arguments: Sequence[str]) -> int:
    """Checks the configuration, then becomes torchrun with one rank per process asked for."""
    parser = OneLineParser(prog="locsgd train", add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc", default="auto")
    parser.add_argument("--max-restarts", type=int, default=3)
    options, trainer_arguments = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(trainer_arguments):
        print("--nproc N|gpu|auto   processes to start here (default auto: one per GPU, one on a machine without)")
        print("--max-restarts N     how often to start all ranks anew after one has failed (default 3)\n")
    config = parse_config(trainer_arguments, prog="locsgd train")
    check_config(config)
    nproc = num_processes(options.nproc, config.train.device)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    command += [f"--max-restarts={options.max_restarts}", "-m", "locsgd_dist.train", *trainer_arguments]
    sys.stdout.flush()
    os.execve(sys.executable, command, launch_environment(nproc))


def num_processes(nproc: str, device: str) -> int:
    """How many ranks ``--nproc`` means on this machine.

    Raises:
        ValueError: not a number, gpu or auto; no GPU for gpu; more ranks than GPUs.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() and device != "cpu" else 0
    if nproc == "auto":
        return max(1, gpus)
    if nproc == "gpu":
        if not gpus:
            raise ValueError("--nproc=gpu needs a CUDA GPU, none is in use here; give a number of processes")
        return gpus
    if not nproc.isdecimal() or int(nproc) < 1:
        raise ValueError(f"--nproc must be a whole number >= 1, gpu or auto, got {nproc!r}")
    if gpus and int(nproc) > gpus:
        raise ValueError(f"--nproc must be at most {gpus}, the GPUs of this machine, got {nproc}")
    return int(nproc)


def _evaluate(options: argparse.Namespace) -> int:
    from locsgd_dist.inference import evaluate_trained, load_trained

    trained = load_trained(options.run, options.checkpoint, ema=options.ema)
    result = evaluate_trained(trained, options.device)
    if options.json:
        print(json.dumps({"checkpoint": str(trained.checkpoint), **result}))
    else:
        print(
            f"{trained.checkpoint}: top-1 {100 * result['val_top1']:.2f} %, loss {result['val_loss']:.4f} "
            f"on {int(result['samples'])} images"
        )
    return 0


def _export(options: argparse.Namespace) -> int:
    from locsgd_dist.inference import export_trained, load_trained

    export_trained(load_trained(options.run, options.checkpoint, ema=options.ema), options.output, options.format)
    print(options.output)
    return 0


def _report(options: argparse.Namespace) -> int:
    from locsgd_dist.reporting import write_report

    if not (options.run / "config.yaml").is_file():
        raise ValueError(f"{options.run} is not a run directory: it has no config.yaml")
    print(write_report(options.run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
