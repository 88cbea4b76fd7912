"""What a configuration stands for: benchmark, strategy, and what makes two runs seeds of one variant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from locsgd_dist.config import Config
from locsgd_dist.data import DataShape, data_shape
from locsgd_dist.data.standard_sets import STANDARD_SETS
from locsgd_dist.localized import SelectionConfig

_SAME_RUN = re.compile(
    r"(run|monitor|checkpoint)\..*|distributed\.(backend|timeout_minutes|bucket_mib)|selection\.trace"
    r"|data\.(root|download|workers|in_memory|cache|val_batch)|train\.(seed|evaluate_every)|localized\.keep_gib"
)
"""Keys in which seeds of one variant may differ: where a run lies, how it is watched, how its images are kept."""

_ONLY_LOCALIZED = re.compile(r"(localized|selection|replicas)\..*")
"""Keys without effect on plain SGD."""

SCHEDULE_LENGTH = frozenset(("train.epochs", "optim.step_epochs", "optim.warmup_epochs"))
"""Keys that stretch with the length of a schedule."""

_IMAGENET_NAMES = ("imagenet", "ilsvrc")
_CLASSES = {"imagenet": 1000} | {name: standard.num_classes for name, standard in STANDARD_SETS.items()}
_IMAGENET_SIDE = 224


@dataclass(frozen=True)
class Traits:
    """What a run is an instance of.

    Attributes:
        network: ``model.name`` without its source, as the paper's tables name it.
        dataset: the data set, also where it is read from an image folder.
        num_gpus: ranks at the start of the run.
        strategy: see :func:`strategy_of`.
        weak_supervision: ``localized.weak_supervision``.
        batch: ``fixed`` or ``variable``.
        constants: ``common`` where localized learning has the paper's constants, else ``tuned``.
    """

    network: str
    dataset: str
    num_gpus: int
    strategy: str
    weak_supervision: bool | str
    batch: str
    constants: str

    @classmethod
    def of(cls, config: Config, num_gpus: int) -> Traits:
        return cls(
            network=config.model.name.rpartition(":")[2],
            dataset=dataset_of(config),
            num_gpus=num_gpus,
            strategy=strategy_of(config),
            weak_supervision=config.localized.weak_supervision,
            batch="fixed" if config.batch.policy == "fixed" else "variable",
            constants="common" if has_common_constants(config) else "tuned",
        )


def strategy_of(config: Config) -> str:
    """The strategy by the paper's names, or what the rule and the selection say of themselves.

    ``sgd``, ``stochastic_depth``, ``pruning``; with a localized region: ``local_sgd`` (the paper's rule, algorithm 1),
    ``local_sgd_static`` (appendix 6.5), ``freezing`` (on whatever boundary), ``freezeout`` (that after annealing), else
    ``RULE``, ``RULE_SELECTION``, ``RULE_CRITERION`` or ``RULE_refresh``. Two of them at once are joined by ``+``.
    """
    parts = ["stochastic_depth"] if config.stochastic_depth.survival < 1 else []
    parts += ["pruning"] if prunes(config) else []
    rule, selection = config.localized.rule, _selection_of(config.selection)
    if config.localized.refresh_every:
        parts.append(f"{rule}_refresh")
    elif rule == "frozen":
        parts.append("freezeout" if config.selection.anneal else "freezing")
    elif rule == "hebbian" and not config.localized.rule_options and selection in ("dynamic", "static"):
        parts.append("local_sgd" if selection == "dynamic" else "local_sgd_static")
    elif rule != "none":
        parts.append(rule if selection in ("dynamic", "replay") else f"{rule}_{selection}")
    return "+".join(parts) or "sgd"


def _selection_of(selection: SelectionConfig) -> str:
    if selection.kind == "dynamic" and selection.criterion != "update_norm":
        return selection.criterion
    return f"{selection.kind}_annealed" if selection.anneal else selection.kind


def prunes(config: Config) -> bool:
    """Whether the network shrinks during training."""
    return config.pruning.every_epochs > 0


def has_common_constants(config: Config) -> bool:
    """Whether localized learning has the constants that the paper uses for all networks of a data set (section 2.2)."""
    localized, selection = config.localized, config.selection
    updates = (localized.lr, localized.batch_fraction, localized.update_every)
    return (*updates, selection.alpha, selection.lmax, selection.start_epoch) == (0.01, 1.0, 1, 0.95, 0.75, 0)


def dataset_of(config: Config) -> str:
    """The set's name; of an image folder the one that its path or its normalisation tells, else the folder's name."""
    data = config.data
    if data.name != "imagefolder":
        return data.name
    folder = Path(data.root).name.lower()
    plain = re.sub(r"[^a-z0-9]", "", folder)
    if any(name in plain for name in _IMAGENET_NAMES):
        return "imagenet"
    known = sorted(STANDARD_SETS, key=len, reverse=True)  # cifar100 before cifar10
    for name in known:
        if name.replace("_", "") in plain:
            return name
    return data.normalization if data.normalization in STANDARD_SETS else folder


def shape_of(config: Config) -> DataShape | None:
    """What the network takes and gives; None where only the data itself could tell."""
    if config.data.name == "digits" or config.data.name in STANDARD_SETS:
        return data_shape(config.data)
    classes = _CLASSES.get(dataset_of(config))
    if config.data.name != "imagefolder" or classes is None:
        return None
    return DataShape(classes, config.data.image_size or _IMAGENET_SIDE)


def flat(config: Config) -> dict[str, Any]:
    """``section.key`` → value."""
    tree = asdict(config)
    return {
        f"{section.name}.{key}": value
        for section in fields(config)
        if is_dataclass(getattr(config, section.name))
        for key, value in tree[section.name].items()
    }


def variant_settings(config: Config) -> dict[str, Any]:
    """The settings that seeds of one variant share."""
    settings = {key: value for key, value in flat(config).items() if not _SAME_RUN.fullmatch(key)}
    return settings | {"data.root": dataset_of(config)}


def schedule_settings(config: Config) -> dict[str, Any]:
    """The settings that plain SGD runs along schedules of different lengths share."""
    return {
        key: value
        for key, value in variant_settings(config).items()
        if key not in SCHEDULE_LENGTH and not _ONLY_LOCALIZED.fullmatch(key)
    }


def benchmark_settings(config: Config) -> dict[str, Any]:
    """The settings that runs share which may be compared with each other: network, data, device."""
    settings = variant_settings(config)
    return {
        key: settings[key]
        for key in settings
        if (key.startswith("model.") and key != "model.weights")
        or key in ("data.name", "data.root", "data.train_samples", "data.image_size", "data.kwargs", "train.device")
    }


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Keys with different values."""
    return [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
