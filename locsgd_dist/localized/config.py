"""How the localized region learns, as the ``localized`` section has it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from locsgd_dist.localized.rules import LocalizedRule, make_rule


@dataclass(frozen=True)
class LocalizedConfig:
    """How the localized region learns."""

    rule: str = "hebbian"
    """Localized rule: hebbian (the paper's), hebbian_relative, centred, oja, softhebb, winner, the controls frozen,
    random and anti_hebbian, package.module:Class, or none for plain SGD."""
    rule_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the rule: length (absolute, layer, filter) and hold_norm of every rule that moves;
    temperature and losers of softhebb, k of winner."""
    lr: float = 0.01
    """Length of a localized step (eta of eq. 4) at the first epoch; > 0."""
    lr_decay: float = 0.5
    """Factor on localized.lr every localized.lr_decay_epochs epochs; in (0, 1]. Paper: 0.5 (CIFAR), 0.1 (ImageNet)."""
    lr_decay_epochs: int = 30
    """Epochs between two decays of localized.lr; >= 1."""
    lr_schedule: Literal["decay", "optim"] = "decay"
    """decay (localized.lr_decay every localized.lr_decay_epochs epochs: the paper's) or optim (localized.lr in the same
    proportion as the SGD region's rate to optim.lr: its schedule and warm-up)."""
    lr_per: Literal["step", "epoch"] = "step"
    """What localized.lr is the length of: of each step (the paper's) or of the steps of an epoch together, at the
    configured batch."""
    weak_supervision: bool | Literal["alignment"] = True
    """Sign of localized updates: true (reversed in the epoch after one whose training loss rose: algorithm 2), false
    (never reversed) or alignment (reversed where the epoch's mean cosine to the descent direction was negative)."""
    update_every: int = 1
    """Compute and apply a localized update in every m-th step only, not counting refresh steps; >= 1. 1 is the paper's.
    Each update is as long as with 1: the region moves 1/m as far in an epoch."""
    alignment_every: int = 0
    """Measure the cosine between the localized step and the descent direction of each localized layer in every n-th
    refresh step, or, without refresh steps, in every n-th step, at the cost of one; 0 = never; >= 0."""
    batch_fraction: float = 1.0
    """Share of the batch from which localized updates are computed; in (0, 1]. 1 is the paper's."""
    norm_statistics: Literal["moving", "held"] = "moving"
    """Batch norms of the localized region while training: moving (they normalise by the batch and go on averaging) or
    held (they normalise by their running statistics, which stay as they were at the shift)."""
    keep_outputs: bool = False
    """Keep what layers at rest make of each image, and use it again when the image comes back; needs data.draws, by
    which images do come back, localized.rule=frozen and localized.norm_statistics=held."""
    keep_gib: float = 4.0
    """Outputs that take more than so many GiB on a machine, in its temporary folder, are not kept; > 0."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How localized.lr follows the global batch: linear keeps the way that a layer moves in an epoch."""
    refresh_every: int = 0
    """Every n-th step backpropagates through the whole network and trains the localized region too; 0 = never, the
    paper; >= 0."""
    refresh_growth: float = 1.0
    """Interval between refresh steps in the last epoch over that in the first, refresh_every; in between it follows a
    geometric progression, in whole steps: 4 makes true gradients rarer as rates fall; in (0, 1e6]."""
    refresh_recompute: bool = True
    """Keep only the inputs of the localized region's blocks in a refresh step and run them anew in its backward pass:
    less memory, more arithmetic."""
    refresh_fraction: float = 1.0
    """Share of a refresh step's batch that backpropagates through the whole network; the rest of the batch passes the
    localized region as in any other step. Each part is normalised by its own batch statistics; in (0, 1]."""
    refresh_gain: float = 1.0
    """Factor on the localized region's gradients in a refresh step; > 0."""
    refresh_carry: bool = False
    """Between refresh steps the momentum of the localized region moves its weights on, and decays, as in steps of
    gradient 0; needs optim.name=sgd with momentum and an interval >= 2 in the first or the last epoch."""

    def __post_init__(self) -> None:
        if not self.rule:
            raise ValueError("localized.rule must be the name of a rule, or none for plain SGD; got an empty one")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"localized.lr must be > 0 and finite, got {self.lr}")
        if not 0 < self.lr_decay <= 1:
            raise ValueError(f"localized.lr_decay must lie in (0, 1], got {self.lr_decay}")
        if self.lr_decay_epochs < 1:
            raise ValueError(f"localized.lr_decay_epochs must be >= 1, got {self.lr_decay_epochs}")
        if self.update_every < 1:
            raise ValueError(f"localized.update_every must be >= 1, got {self.update_every}")
        if self.alignment_every < 0:
            raise ValueError(f"localized.alignment_every must be >= 0, got {self.alignment_every}")
        if self.weak_supervision == "alignment" and self.alignment_every == 0:
            raise ValueError("localized.alignment_every must be >= 1 for localized.weak_supervision=alignment, got 0")
        if not 0 < self.batch_fraction <= 1:
            raise ValueError(f"localized.batch_fraction must lie in (0, 1], got {self.batch_fraction}")
        if not self.keep_gib > 0:
            raise ValueError(f"localized.keep_gib must be > 0, got {self.keep_gib:g}")
        if not 0 <= self.refresh_every <= 10**9:
            raise ValueError(f"localized.refresh_every must lie in [0, 1000000000], got {self.refresh_every}")
        if not 0 < self.refresh_growth <= 1e6:
            raise ValueError(f"localized.refresh_growth must lie in (0, 1e6], got {self.refresh_growth}")
        if self.refresh_growth != 1 and not self.refresh_every:
            raise ValueError(
                f"localized.refresh_every must be >= 1 for localized.refresh_growth={self.refresh_growth:g}, got 0"
            )
        if not 0 < self.refresh_fraction <= 1:
            raise ValueError(f"localized.refresh_fraction must lie in (0, 1], got {self.refresh_fraction}")
        if not 0 < self.refresh_gain < math.inf:
            raise ValueError(f"localized.refresh_gain must be > 0, got {self.refresh_gain}")
        if self.refresh_carry and max(self.refresh_interval(0, 2), self.refresh_interval(1, 2)) < 2:
            raise ValueError(
                "localized.refresh_every must be >= 2, in the first or, by localized.refresh_growth, in the last "
                f"epoch, for localized.refresh_carry=true, got {self.refresh_every}: momentum is carried on between "
                "refresh steps"
            )

    def make_rule(self, seed: int = 0) -> LocalizedRule:
        """The rule with its options; for none a rule that updates nothing.

        Raises:
            ValueError: no such rule, or an option that it does not take.
        """
        if self.rule == "none" and self.rule_options:
            raise ValueError(f"localized.rule_options must be empty for localized.rule=none, got {self.rule_options}")
        return make_rule("frozen" if self.rule == "none" else self.rule, seed, self.rule_options)

    def refresh_interval(self, epoch: int, epochs: int) -> int:
        """Steps from one refresh step to the next in ``epoch`` (from 0) of ``epochs``; 0: there are none."""
        if not self.refresh_every:
            return 0
        return max(1, round(self.refresh_every * self.refresh_growth ** (epoch / max(1, epochs - 1))))

    def lr_at(self, epoch: int, *, rate: float = 1.0, steps_per_epoch: float = 1.0) -> float:
        """Length of a localized step in ``epoch`` (from 0).

        Args:
            rate: the SGD region's present learning rate over ``optim.lr``.
            steps_per_epoch: at the configured batch.
        """
        factor = rate if self.lr_schedule == "optim" else self.lr_decay ** (epoch // self.lr_decay_epochs)
        return self.lr * factor / (steps_per_epoch if self.lr_per == "epoch" else 1.0)
