"""``locsgd plan``: its options, and the plan written out."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from locsgd_dist.config import Config, parse_config
from locsgd_dist.memory.batch_policy import parse_bytes
from locsgd_dist.options import OneLineParser
from locsgd_dist.planner.costs import Machine
from locsgd_dist.planner.inputs import planned_data

MAX_GPUS = 4096
PIPE_WIDTH = 140
"""Columns where the output is no terminal, so that tables are not cut."""


def plan(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code.

    Raises:
        ValueError: a wrong option or configuration; the message names it.
    """
    parser = _parser()
    options, config_arguments = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(config_arguments):
        print(parser.format_help())
    config = parse_config(config_arguments, prog="locsgd plan")
    check_plannable(config)
    machine = Machine(
        gpus=options.gpus,
        flops_per_second=None if options.gpu_tflops is None else options.gpu_tflops * 1e12,
        bytes_per_second=None if options.link_gbps is None else options.link_gbps * 1e9 / 8,
        latency_seconds=options.latency_us * 1e-6,
        memory_bytes=None if options.gpu_memory is None else parse_bytes(options.gpu_memory, "--gpu-memory"),
    )
    if options.boundary_trace is not None and options.pace is not None:
        raise ValueError("--pace and --boundary-trace exclude each other: a recorded trace has its own pace")
    if options.link_gbps is not None and options.gpu_tflops is None:
        raise ValueError("--link-gbps needs --gpu-tflops: without the time of a step that of its exchange says nothing")
    if options.gpu_tflops is not None and options.gpus > 1 and options.link_gbps is None:
        raise ValueError("--gpu-tflops needs --link-gbps on more than one GPU")
    data = planned_data(config.data, options.num_classes, options.num_train)

    from rich.console import Console

    from locsgd_dist.planner.plan import Planner
    from locsgd_dist.planner.rendering import print_plan, write_plots

    if options.plots is not None:
        try:
            options.plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--plots must be a folder that can be written: {error}") from None
    try:
        planner = Planner(
            config, data, machine, pace=options.pace, trace=options.boundary_trace, policy=options.batch_policy
        )
    except ValueError as error:
        if options.boundary_trace is None:
            raise
        raise ValueError(str(error).replace("selection.trace", "--boundary-trace", 1)) from None
    if options.json:
        print(json.dumps(planner.to_json()))
    else:
        print_plan(planner, Console(width=None if sys.stdout.isatty() else PIPE_WIDTH))
    if options.plots is not None:
        written = write_plots(planner, options.plots)
        if not options.json:
            print(*written, sep="\n")
    return 0


def check_plannable(config: Config) -> None:
    """Checks that the run's network is the same in every step.

    Raises:
        ValueError: one line that names the key.
    """
    if config.pruning.every_epochs:
        raise ValueError(
            "pruning.every_epochs > 0 cannot be planned: which channels go is seen in training; plan with "
            "pruning.every_epochs=0, which is what the run needs at its start"
        )
    if config.localized.alignment_every:
        raise ValueError(
            "localized.alignment_every > 0 cannot be planned: steps that backpropagate through the whole network are "
            "not foretold; plan with localized.alignment_every=0, the least that the run needs"
        )
    localized = config.localized
    if localized.refresh_growth != 1:
        raise ValueError(
            f"localized.refresh_growth={localized.refresh_growth:g} cannot be planned: how often a boundary is "
            "refreshed depends on when it is reached; plan with localized.refresh_growth=1 and localized.refresh_every "
            "at either end"
        )
    in_part = localized.refresh_every > 0 and localized.refresh_fraction < 1
    if in_part and config.batch.per_gpu * localized.refresh_fraction < 2:
        raise ValueError(
            f"batch.per_gpu must be >= {math.ceil(2 / localized.refresh_fraction)} to be planned with "
            f"localized.refresh_fraction={localized.refresh_fraction:g}, got {config.batch.per_gpu}: the part of a "
            "batch that refreshes is two images at least"
        )
    if config.stochastic_depth.survival < 1:
        raise ValueError(
            "stochastic_depth.survival < 1 cannot be planned: each step runs other blocks; plan with "
            "stochastic_depth.survival=1, the most that a step can need"
        )


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="locsgd plan",
        add_help=False,
        allow_abbrev=False,
        usage="locsgd plan [--config FILE] [--section.key=value ...] [options]",
        description="Foretells memory, batch, traffic and time of a run. Needs no GPU, no data and no weights.",
    )
    add = parser.add_argument
    add("--gpu-memory", metavar="SIZE", help="memory per GPU that training may use, such as 10GiB")
    add("--gpus", type=_whole(1, MAX_GPUS), default=1, metavar="N", help=f"GPUs, 1 to {MAX_GPUS} (default 1)")
    add("--pace", choices=["dynamic", "static", "linear"], help="how the boundary moves (default: selection.kind)")
    add("--boundary-trace", type=Path, metavar="FILE", help="a run directory, its metrics.jsonl or a JSON list")
    add(
        "--batch-policy", choices=["fixed", "halving", "fit"], help="default: batch.policy; halving where that is fixed"
    )
    add("--gpu-tflops", type=_positive, metavar="X", help="10^12 operations per second that one GPU sustains")
    add("--link-gbps", type=_positive, metavar="Y", help="10^9 bits per second of each GPU's link, per direction")
    add("--latency-us", type=_not_negative, default=10.0, metavar="Z", help="microseconds per message (default 10)")
    add("--num-classes", type=_whole(1), metavar="C", help="classes, where data.name does not tell")
    add("--num-train", type=_whole(1), metavar="N", help="training images, where data.name does not tell")
    add("--json", action="store_true", help="print one JSON object, with every boundary and every epoch")
    add("--plots", type=Path, metavar="DIR", help="write the figures there as PNGs")
    return parser


def _whole(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    allowed = f">= {lowest}" if highest is None else f"from {lowest} to {highest}"

    def convert(text: str) -> int:
        value = int(text) if text.lstrip("-").isdecimal() else lowest - 1
        if value < lowest or (highest is not None and value > highest):
            raise argparse.ArgumentTypeError(f"must be a whole number {allowed}, got {text!r}")
        return value

    return convert


def _number(text: str, allowed: str, is_allowed: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and is_allowed(value)):
        raise argparse.ArgumentTypeError(f"must be a number {allowed}, got {text!r}")
    return value


def _positive(text: str) -> float:
    return _number(text, "> 0", lambda value: value > 0)


def _not_negative(text: str) -> float:
    return _number(text, ">= 0", lambda value: value >= 0)
