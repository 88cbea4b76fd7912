"""A run as a Slurm batch job: ``launch/slurm.sbatch`` with its settings filled in."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from locsgd_dist.launching.job import TEMPLATES, Job, submit
from locsgd_dist.recording.directory import write_atomically

# sbatch reads directives itself, with rules of its own for quotes: values that would need them are refused.
_OPTION = re.compile(r"([a-z][a-z-]*)(?:=([\w.,:;@%+/=*\[\]-]+))?")


@dataclass(frozen=True)
class SlurmFiles:
    """Where one submission's files lie: the frozen configuration, the batch file, the job's output."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def batch_file(self) -> Path:
        return self.folder / "job.sbatch"

    def output(self, job_id: str = "%j") -> Path:
        return self.folder / f"{job_id}.out"


def next_files(run_dir: Path) -> SlurmFiles:
    """A folder beside the run directory that no earlier submission uses, since that job may still wait in the queue.

    Not inside it: a run that starts afresh moves the whole directory aside.
    """
    return SlurmFiles(next(p for k in itertools.count(1) if not (p := Path(f"{run_dir}.slurm") / str(k)).exists()))


def parse_options(texts: Sequence[str]) -> dict[str, str]:
    """``KEY=VALUE`` or ``KEY`` of ``--sbatch`` as a mapping; a flag has an empty value.

    Raises:
        ValueError: not of this form.
    """
    options = {}
    for text in texts:
        match = _OPTION.fullmatch(text)
        if match is None:
            raise ValueError(f"--sbatch must be KEY=VALUE as of sbatch, without spaces or quotes, got {text!r}")
        options[match[1]] = match[2] or ""
    return options


def batch_file(job: Job, run_dir: Path, files: SlurmFiles, options: Mapping[str, str]) -> str:
    """The text of the batch file. ``options`` are further ones of sbatch and override what is derived from ``job``."""
    directives = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "gpus-per-node": str(job.gpus_per_node) if job.gpus_per_node else None,
        "cpus-per-task": str(job.cpus_per_node),
        "output": _directive_path(files.output()),
        **options,
    }
    settings = {
        "WORK_DIR": shlex.quote(str(Path.cwd())),
        "PYTHON": shlex.quote(sys.executable),
        "RUN_DIR": shlex.quote(str(run_dir)),
        "RANKS_PER_NODE": str(job.ranks_per_node),
        "MAX_RESTARTS": str(job.max_restarts),
        "TRAINER": f"({shlex.join([f'--config={files.config}'])})",
    }
    return fill(TEMPLATES.joinpath("slurm.sbatch").read_text(encoding="utf-8"), directives, settings)


def fill(template: str, directives: Mapping[str, str | None], settings: Mapping[str, str]) -> str:
    """``template`` with ``#SBATCH --key=value`` and ``NAME=value`` lines replaced; directives it lacks are added.

    Args:
        directives: None removes a line; an empty value makes a flag.
        settings: values as Bash source.

    Raises:
        LookupError: the template has no line for a setting, or two.
    """
    lines = template.splitlines()
    remaining = dict(directives)
    filled, last_directive = [], 0
    unset = dict(settings)
    for line in lines:
        if match := re.match(r"#SBATCH --([a-z-]+)", line):
            if match[1] not in remaining:
                filled.append(line)
            elif (value := remaining.pop(match[1])) is not None:
                filled.append(_directive(match[1], value))
            last_directive = len(filled)
        elif (match := re.match(r"([A-Z_]+)=", line)) and match[1] in unset:
            filled.append(f"{match[1]}={unset.pop(match[1])}")
        else:
            filled.append(line)
    if unset:
        raise LookupError(f"the batch file has no line for {', '.join(unset)}")
    added = [_directive(key, value) for key, value in remaining.items() if value is not None]
    return "\n".join([*filled[:last_directive], *added, *filled[last_directive:], ""])


def write_files(files: SlurmFiles, text: str, config_yaml: str) -> None:
    """Writes batch file and configuration; a job that waits or is requeued does not see later edits."""
    files.folder.mkdir(parents=True)
    write_atomically(files.config, config_yaml)
    write_atomically(files.batch_file, text)


def submit_batch_file(path: Path) -> str:
    """Hands the file to sbatch; returns the job's id.

    Raises:
        SubmissionError: sbatch is missing or has refused.
    """
    return submit(["sbatch", "--parsable", str(path)]).partition(";")[0]


def _directive(key: str, value: str) -> str:
    return f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}"


def _directive_path(path: Path) -> str:
    # sbatch ends an unquoted value at a space; a quote or a line's end would end a quoted one, and % starts a pattern.
    if re.search(r"[\"'\\\n\r%]", str(path.parent)):
        raise ValueError(
            f"run.dir: {str(path.parent)!r} holds a quote, backslash, % or line end, which sbatch misreads"
        )
    return f'"{path}"'
