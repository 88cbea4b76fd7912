"""Localized rules: what stands in the place of the error at a layer's output, and how long a step is.

A rule turns what a forward pass of one layer has at hand (its input ``a`` and pre-activation output ``z``) into a
weight update. Rules are kept in a registry; ``register_rule`` adds one of your own:

    @register_rule("mean_free")
    class MeanFree(LocalizedRule):
        def signal(self, layer, z):
            return z - z.mean(dim=0)
"""

from locsgd_dist.localized.rules import competitive, paper, stable
from locsgd_dist.localized.rules.products import weight_gradient
from locsgd_dist.localized.rules.registry import make_rule, register_rule, rule_names
from locsgd_dist.localized.rules.rule import LocalizedRule

__all__ = [
    "LocalizedRule",
    "competitive",
    "make_rule",
    "paper",
    "register_rule",
    "rule_names",
    "stable",
    "weight_gradient",
]
