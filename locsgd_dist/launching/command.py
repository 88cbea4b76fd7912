"""``locsgd launch``: its options, what it submits and what it says of it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from locsgd_dist.config import Config, check_config, parse_config
from locsgd_dist.launching import kubeflow, slurm
from locsgd_dist.launching.job import TEMPLATES, Job, SubmissionError, job_name
from locsgd_dist.options import OneLineParser

_WHERE = ("local", "slurm", "kubeflow")


def launch(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code: 1 where the cluster's client is missing or has refused.

    Raises:
        ValueError: a wrong option or configuration; the message names it.
    """
    where = arguments[0] if arguments else ""
    if where in ("-h", "--help"):
        print(f"usage: locsgd launch {'|'.join(_WHERE)} --nodes N --gpus-per-node G [--config FILE] [options]\n")
        print("locsgd launch WHERE --help lists the options of each.")
        return 0
    if where not in _WHERE:
        raise ValueError(f"locsgd launch needs one of {', '.join(_WHERE)} first, got {where!r}")
    parser = _parser(where)
    options, trainer_arguments = parser.parse_known_args(arguments[1:])
    if {"-h", "--help"} & set(trainer_arguments):
        print(parser.format_help())
    config = parse_config(trainer_arguments, prog=f"locsgd launch {where}")
    if options.gpus_per_node == 0 and config.train.device == "cuda":
        raise ValueError("--gpus-per-node must be > 0 with train.device=cuda")
    ranks = options.ranks_per_node or max(1, options.gpus_per_node)
    if where == "local":
        return _local(options, config, trainer_arguments, ranks)
    job = Job(
        config=config,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        ranks_per_node=ranks,
        cpus_per_rank=options.cpus_per_rank,
        max_restarts=options.max_restarts,
        name=job_name(options.name or Path(config.run.dir).name),
    )
    return _slurm(options, job) if where == "slurm" else _kubeflow(options, job)


def _local(options: argparse.Namespace, config: Config, trainer_arguments: list[str], ranks: int) -> int:
    from locsgd_dist.cli import launch_environment, num_processes

    check_config(config)
    device = config.train.device if options.gpus_per_node else "cpu"
    if device != config.train.device:
        trainer_arguments = [*trainer_arguments, f"--train.device={device}"]
    torchrun = [f"--nproc-per-node={num_processes(str(ranks), device)}"]
    torchrun.append(f"--max-restarts={options.max_restarts}")
    if options.nodes > 1:
        if not options.rdzv_endpoint:
            raise ValueError("--rdzv-endpoint must name HOST:PORT of the first machine where --nodes is > 1")
        name = job_name(options.name or Path(config.run.dir).name)
        torchrun += [f"--nnodes={options.nodes}", "--rdzv-backend=c10d", f"--rdzv-id={name}"]
        torchrun.append(f"--rdzv-endpoint={options.rdzv_endpoint}")
    script = [str(TEMPLATES / "local.sh"), *torchrun, "--", *trainer_arguments, f"--run.dir={config.run.dir}"]
    if not options.dry_run:
        print(f"run: {config.run.dir}", flush=True)
        os.execvpe("bash", ["bash", *script], launch_environment(ranks) | {"PYTHON": sys.executable})
    print(shlex.join(["env", f"PYTHON={sys.executable}", *script]))
    return 0


def _slurm(options: argparse.Namespace, job: Job) -> int:
    check_config(job.config, "shared")
    run_dir = Path(job.config.run.dir).absolute()
    files = slurm.next_files(run_dir)
    text = slurm.batch_file(job, run_dir, files, slurm.parse_options(options.sbatch))
    if options.dry_run:
        print(text, end="")
        return 0
    slurm.write_files(files, text, job.config.to_yaml())
    try:
        job_id = slurm.submit_batch_file(files.batch_file)
    except SubmissionError as error:
        _say(f"{error}; the batch file is ready: sbatch {shlex.quote(str(files.batch_file))}")
        return 1
    output = shlex.quote(str(files.output(job_id)))
    _show(f"job: {job_id}", run_dir, [f"squeue --job {job_id}", f"tail -F {output}", f"scancel {job_id}"])
    return 0


def _kubeflow(options: argparse.Namespace, job: Job) -> int:
    check_config(job.config, "elsewhere")
    if not options.image:
        raise ValueError("--image must name the container image (docker/Dockerfile builds one)")
    cluster = kubeflow.ClusterSettings(
        image=options.image,
        memory_per_rank=options.memory_per_rank,
        runs_claim=options.runs_claim,
        data_claim=options.data_claim,
        runtime=options.runtime,
        namespace=options.namespace,
    )
    text = kubeflow.manifest(job, cluster)
    if options.dry_run:
        print(text, end="")
        return 0
    try:
        created = kubeflow.create(text)
    except SubmissionError as error:
        print(text, end="")
        _say(f"{error}; the manifest is printed above, for kubectl create -f -")
        _say(f"its namespace needs {kubeflow.runtime_file()} first")
        return 1
    run_dir = kubeflow.run_dir_in_pod(job.config.run.dir)
    _show(
        f"job: {created}",
        f"{run_dir} on claim {cluster.runs_claim}",
        kubeflow.follow_commands(job.name, cluster.namespace),
    )
    return 0


def _show(job: str, run_dir: Path | str, commands: Sequence[str]) -> None:
    print(job, f"run: {run_dir}", "follow:", *(f"  {command}" for command in commands), sep="\n")


def _say(message: str) -> None:
    print(f"locsgd: {message}", file=sys.stderr)


def _parser(where: str) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=f"locsgd launch {where}",
        add_help=False,
        allow_abbrev=False,
        usage=f"locsgd launch {where} --nodes N --gpus-per-node G [--config FILE] [--section.key=value ...] [options]",
    )
    add = parser.add_argument
    add("--nodes", type=_whole(1), default=1, metavar="N", help="machines (default 1)")
    add("--gpus-per-node", type=_whole(0), required=True, metavar="G", help="GPUs of each machine; 0: on the CPU")
    add("--ranks-per-node", type=_whole(1), metavar="R", help="processes on each machine (default: one per GPU, or 1)")
    add("--max-restarts", type=_whole(0), default=3, metavar="K", help="restarts after a failed rank (default 3)")
    add("--name", help="of the job (default: the run directory's)")
    add("--dry-run", action="store_true", help="show what would be submitted, and stop")
    if where == "local":
        add("--rdzv-endpoint", metavar="HOST:PORT", help="for several machines: the first one, and a free port on it")
        return parser
    add("--cpus-per-rank", type=_whole(1), default=8, metavar="C", help="cores for each rank (default 8)")
    if where == "slurm":
        add(
            "--sbatch",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="an option of sbatch, such as partition=gpu or time=12:00:00; may be repeated",
        )
        return parser
    defaults = kubeflow.ClusterSettings(image="")
    add("--image", help="container image that has this package")
    add("--memory-per-rank", default=defaults.memory_per_rank, help="default %(default)s")
    add("--runs-claim", default=defaults.runs_claim, help="PersistentVolumeClaim of /runs (default %(default)s)")
    add("--data-claim", help="PersistentVolumeClaim of /data, mounted read-only")
    add("--runtime", default=defaults.runtime, help="TrainingRuntime (default %(default)s)")
    add("--namespace", help="default: kubectl's")
    return parser


def _whole(lowest: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {lowest}, got {text!r}")
        return int(text)

    return convert
