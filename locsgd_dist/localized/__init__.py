"""Localized learning in a growing prefix of a network's layers. Imports torch alone: any training loop can use it."""

from locsgd_dist.localized.config import LocalizedConfig
from locsgd_dist.localized.cut import Cut, find_cut
from locsgd_dist.localized.diagnostics import EpochDiagnostics, WeightTrace, effective_rank
from locsgd_dist.localized.layers import Layer, LayerMap, trace_layers
from locsgd_dist.localized.learner import LocalizedLearner
from locsgd_dist.localized.rules import LocalizedRule, make_rule, register_rule, rule_names, weight_gradient
from locsgd_dist.localized.selection import SelectionConfig, Selector, criterion_values, make_selector
from locsgd_dist.localized.supervision import WeakSupervision

__all__ = [
    "Cut",
    "EpochDiagnostics",
    "Layer",
    "LayerMap",
    "LocalizedConfig",
    "LocalizedLearner",
    "LocalizedRule",
    "SelectionConfig",
    "Selector",
    "WeakSupervision",
    "WeightTrace",
    "criterion_values",
    "effective_rank",
    "find_cut",
    "make_rule",
    "make_selector",
    "register_rule",
    "rule_names",
    "trace_layers",
    "weight_gradient",
]
