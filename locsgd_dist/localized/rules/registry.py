"""Rules by name, and what can be set of them."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from locsgd_dist.localized.rules.rule import LocalizedRule

_RULES: dict[str, type[LocalizedRule]] = {}


def register_rule(name: str) -> Callable[[type[LocalizedRule]], type[LocalizedRule]]:
    """Class decorator that makes a rule available as ``localized.rule=NAME``."""

    def register(rule: type[LocalizedRule]) -> type[LocalizedRule]:
        if _RULES.setdefault(name, rule) is not rule:
            raise ValueError(f"a localized rule named {name!r} is registered already")
        return rule

    return register


def rule_names() -> list[str]:
    return sorted(_RULES)


def make_rule(name: str, seed: int = 0, options: Mapping[str, Any] | None = None) -> LocalizedRule:
    """The registered rule of that name, or the class that ``package.module:Class`` names.

    Args:
        seed: of rules that draw random numbers.
        options: keyword arguments of the rule's constructor.

    Raises:
        ValueError: no such rule, and the message lists those there are; an option that the rule does not take, or a
            value that is not of its type.
    """
    rule = _rule_class(name)
    if options:
        _check_options(name, rule, options)
    try:
        return rule(seed, **(options or {}))
    except TypeError as error:
        raise ValueError(f"localized.rule {name} cannot be made: {error}") from None


def _rule_class(name: str) -> type[LocalizedRule]:
    module_name, colon, class_name = name.partition(":")
    if colon:
        return _imported_rule(module_name, class_name)
    if name not in _RULES:
        raise ValueError(
            f"localized.rule must be one of {', '.join(['none', *rule_names()])}, got {name!r}{_hint(name, _RULES)}"
        )
    return _RULES[name]


def _imported_rule(module_name: str, class_name: str) -> type[LocalizedRule]:
    try:
        rule = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # somebody's module may fail with anything
        raise ValueError(f"localized.rule {module_name}:{class_name} cannot be imported: {error}") from None
    if not (isinstance(rule, type) and issubclass(rule, LocalizedRule)):
        raise ValueError(f"localized.rule {module_name}:{class_name} must be a class derived from LocalizedRule")
    return rule


def _check_options(name: str, rule: type[LocalizedRule], options: Mapping[str, Any]) -> None:
    keywords = inspect.Parameter.KEYWORD_ONLY
    taken = [p.name for p in inspect.signature(rule).parameters.values() if p.kind == keywords]
    try:
        types = get_type_hints(rule.__init__)
    except Exception:  # names that exist for type checkers alone: values are then taken as they are
        types = {}
    for key, value in options.items():
        if key not in taken:
            listed = f"takes {', '.join(taken)}" if taken else "takes none"
            raise ValueError(f"localized.rule_options: rule {name} {listed}; got {key!r}{_hint(str(key), taken)}")
        if (expected := _unmet(value, types.get(key))) is not None:
            raise ValueError(f"localized.rule_options.{key} must be {expected}, got {value!r}")


def _unmet(value: Any, annotation: Any) -> str | None:
    """What the annotation asks for, in words, if the value is something else; None if it fits or cannot be told."""
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        return None if value in choices else f"one of {', '.join(map(str, choices))}"
    kinds: dict[Any, tuple[tuple[type, ...], str]] = {
        float: ((int, float), "a number"),
        int: ((int,), "a whole number"),
        bool: ((bool,), "true or false"),
        str: ((str,), "text"),
    }
    if annotation not in kinds:
        return None
    accepted, spoken = kinds[annotation]
    fits = isinstance(value, accepted) and (annotation is bool or not isinstance(value, bool))
    return None if fits else spoken


def _hint(word: str, words: Any) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
