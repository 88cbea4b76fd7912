"""The whole configuration: one section per part, each declared beside the code that it configures."""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from locsgd_dist.baselines import PruningConfig, StochasticDepthConfig, check_baselines
from locsgd_dist.checkpoint import CheckpointConfig, check_resume
from locsgd_dist.data import DataConfig, check_data
from locsgd_dist.distributed import DistributedConfig, ReplicaConfig, resolve_device
from locsgd_dist.faults import FaultConfig
from locsgd_dist.localized import LocalizedConfig, SelectionConfig
from locsgd_dist.localized.selection import load_boundary_trace
from locsgd_dist.memory import BatchConfig, ElasticConfig, MonitorConfig
from locsgd_dist.models import ModelConfig, check_model
from locsgd_dist.optimization import OptimConfig
from locsgd_dist.recording import RunConfig, check_run
from locsgd_dist.step import TrainConfig

PACKAGED_CONFIGS = Path(__file__).parent / "configs"
DEFAULT_CONFIG = "quickstart"

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line that names the key and what is allowed."""


@dataclass(frozen=True)
class Config:
    """A run, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    localized: LocalizedConfig = field(default_factory=LocalizedConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    stochastic_depth: StochasticDepthConfig = field(default_factory=StochasticDepthConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    replicas: ReplicaConfig = field(default_factory=ReplicaConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False)


@functools.cache  # building it takes longer than all else, and a sweep parses hundreds of command lines
def make_parser(prog: str = "python -m locsgd_dist.train") -> ArgumentParser:
    """Parser of every key of :class:`Config`, its help text and ``--config``, ``--print_config``."""
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,  # in a file a key cut short is refused too
        description="Trains a network whose growing prefix of layers learns locally, the rest by SGD under DDP.",
        epilog=f"--config takes a file or one of the packaged configurations: {', '.join(packaged_configs())}.",
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file or packaged configuration; several merge in order, keys given after them override them "
        f"(default: {DEFAULT_CONFIG})",
    )
    for section in fields(Config):
        parser.add_class_arguments(section.default_factory, section.name, help=None)
    return parser


def packaged_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(str(p.relative_to(PACKAGED_CONFIGS).with_suffix("")) for p in PACKAGED_CONFIGS.rglob("*.yaml"))


def parse_config(argv: Sequence[str], prog: str = "python -m locsgd_dist.train") -> Config:
    """The configuration that a command line describes.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, an unreadable file.
        SystemExit: ``--help`` or ``--print_config`` was asked for.
    """
    parser = make_parser(prog)
    try:
        namespace = parser.parse_args(_resolve_config_files(argv))
        return _instantiate(parser, namespace)
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse raises ArgumentError, yaml and OS errors; all are the user's input
        raise ConfigError(_one_line(str(error))) from None


def load_config(path: Path) -> Config:
    """The configuration of a finished or running run, from its ``config.yaml``."""
    return parse_config(["--config", str(path)])


def check_config(config: Config, where: Literal["here", "shared", "elsewhere"] = "here") -> None:
    """Checks what only a machine can tell: data, model, rule, devices, the run directory.

    Args:
        where: what of this machine the run will see: all of it, its files only (a cluster's login node), or nothing.

    Raises:
        ConfigError: one line that names the key and the remedy.
    """
    try:
        check_model(config.model)
        check_baselines(config)
        _check_annealing(config)
        _check_carry(config)
        _check_pace(config)
        _check_kept_outputs(config)
        config.localized.make_rule()
        if where == "here":
            _check_device(config.train)
        if where != "elsewhere":
            _check_files(config)
    except ValueError as error:
        raise ConfigError(_one_line(str(error))) from None


def _check_annealing(config: Config) -> None:
    if config.selection.anneal and config.localized.refresh_every:
        raise ValueError(
            f"selection.anneal=true needs localized.refresh_every=0, got {config.localized.refresh_every}: the "
            "learning rate of a layer that has been handed over is 0"
        )


def _check_carry(config: Config) -> None:
    if not config.localized.refresh_carry:
        return
    if config.optim.name != "sgd" or config.optim.momentum == 0:
        raise ValueError(
            "localized.refresh_carry=true needs optim.name=sgd and optim.momentum > 0, "
            f"got {config.optim.name} and {config.optim.momentum:g}"
        )
    if config.train.precision == "fp16":
        raise ValueError("localized.refresh_carry=true needs train.precision=fp32 or bf16, got fp16")


def _check_pace(config: Config) -> None:
    selection, last = config.selection, config.train.epochs - 1
    full = selection.full_at * last
    if selection.kind == "linear" and last > 0 and selection.start_epoch >= full:
        raise ValueError(
            f"selection.start_epoch must be below selection.full_at * (train.epochs - 1) = {full:g}, "
            f"got {selection.start_epoch}"
        )


def _check_kept_outputs(config: Config) -> None:
    """Only where layers at rest say the same of an image each time can it be kept."""
    if not config.localized.keep_outputs:
        return
    needed = {
        "localized.rule": (config.localized.rule, "frozen"),
        "localized.norm_statistics": (config.localized.norm_statistics, "held"),
        "localized.refresh_every": (config.localized.refresh_every, 0),
        "localized.alignment_every": (config.localized.alignment_every, 0),
        "data.mixup_alpha": (config.data.mixup_alpha, 0),
        "data.cutmix_alpha": (config.data.cutmix_alpha, 0),
        "stochastic_depth.survival": (config.stochastic_depth.survival, 1),
        "pruning.every_epochs": (config.pruning.every_epochs, 0),
        "train.compile": (config.train.compile, False),
    }
    for key, (value, need) in needed.items():
        if value != need:
            need, value = (str(v).lower() if isinstance(v, bool) else v for v in (need, value))
            raise ValueError(f"localized.keep_outputs=true needs {key}={need}, got {value}")
    if config.data.draws is None:
        raise ValueError(
            "localized.keep_outputs=true needs data.draws, got null: an image augmented anew in each epoch does not "
            "come back"
        )


def _check_device(train: TrainConfig) -> None:
    device = resolve_device(train.device)
    if train.precision == "fp16" and device.type == "cpu":
        raise ValueError("train.precision=fp16 needs a GPU; use bf16 or fp32 with train.device=cpu")


def _check_files(config: Config) -> None:
    check_data(config.data)
    check_run(config.run)
    if config.selection.kind == "replay":
        load_boundary_trace(Path(config.selection.trace or ""))
    defaults = asdict(Config())
    check_resume(Path(config.run.dir), config.run.resume, config.train.epochs, asdict(config), defaults)


def _instantiate(parser: ArgumentParser, namespace: Namespace) -> Config:
    for section in fields(Config):
        if not isinstance(namespace[section.name], Namespace):
            raise ConfigError(f"{section.name} must be a mapping of its keys, got {namespace[section.name]!r}")
    tree = parser.instantiate(namespace)
    return Config(**{section.name: tree[section.name] for section in fields(Config)})


def _resolve_config_files(argv: Sequence[str]) -> list[str]:
    """Replaces names of packaged configurations by their files; without ``--config`` the default one comes first."""
    resolved: list[str] = []
    expects_file = False
    found = False
    for argument in argv:
        if expects_file:
            argument, expects_file = _config_file(argument), False
        elif argument == "--config":
            expects_file = found = True
        elif argument.startswith("--config="):
            argument, found = f"--config={_config_file(argument.partition('=')[2])}", True
        resolved.append(argument)
    return resolved if found else ["--config", _config_file(DEFAULT_CONFIG), *resolved]


def _config_file(name: str) -> str:
    if os.path.exists(name):
        return name
    stem = name.removeprefix("configs/").removesuffix(".yaml")
    packaged = PACKAGED_CONFIGS / f"{stem}.yaml"
    if packaged.is_file():
        return str(packaged)
    known = packaged_configs()
    raise ConfigError(f"config must be a YAML file or one of {', '.join(known)}, got {name!r}{_hint(stem, known)}")


def _known_keys() -> dict[str, str]:
    """Type of every ``section.key``, as written in its dataclass."""
    return {
        f"{section.name}.{key.name}": str(key.type)
        for section in fields(Config)
        for key in fields(section.default_factory)  # type: ignore[arg-type]
    }


def _one_line(message: str) -> str:
    """jsonargparse's messages, which span lines and name Python types, in one line that names the key and a remedy."""
    if match := re.match(r'Parser key "([\w.]+)":\s+(.*)', message, re.DOTALL):
        key, detail = match.groups()
        if key in _known_keys() and (value := re.search(r"(?:Got value|Given value): (.*)", detail)):
            got = "a mapping" if value[1].startswith("Namespace(") else repr(value[1].strip())
            return f"{key} must be {_spoken_type(_known_keys()[key])}, got {got}"
        return f"{key}: {' '.join(detail.split())}"
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        return _unknown_key(match[1].lstrip("-").partition("=")[0])
    if match := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return _unknown_key(f"{match[1]}.{match[2]}")
    if match := re.search(r"Option '([\w.]+)' is not accepted", message):
        return _unknown_key(match[1])
    return " ".join(message.split())


def _unknown_key(key: str) -> str:
    return f"unknown key {key}{_hint(key, _known_keys())}; --help lists all keys"


def _hint(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _spoken_type(annotation: str) -> str:
    spoken = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "None": "null",
    }
    spoken["dict[str, Any]"] = "a mapping"
    options: list[str] = []
    for part in re.findall(r"Literal\[.*?\]|dict\[.*?\]|\w+", annotation):
        if part.startswith("Literal"):
            options += re.findall(r"[\"'](.*?)[\"']", part)
        else:
            options.append(spoken.get(part, part))
    return " | ".join(options) if len(options) < 3 else f"one of {', '.join(options)}"


def config_error_exit(error: ValueError, *, is_main: bool) -> int:
    """Prints a configuration's error once per run and returns the exit code for it."""
    if is_main:
        print(f"locsgd: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
