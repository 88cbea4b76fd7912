"""What the HTML pages share: the template environment, and a figure as templates take it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template

_SPACE_BEFORE_UNIT = re.compile(r"(?<=\d) (?=%|(?:[KMGTP]iB|B|s|min|h|img/s)\b)")


@dataclass(frozen=True)
class Card:
    """A figure as the template takes it."""

    key: str
    title: str
    caption: str
    svg: str


def page_template(name: str) -> Template:
    """A template of ``templates/``. Text that it is given is escaped unless it says ``| safe``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("locsgd_dist.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["keep_units"] = lambda text: _SPACE_BEFORE_UNIT.sub("\u00a0", text)
    return environment.get_template(name)
