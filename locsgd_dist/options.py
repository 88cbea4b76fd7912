"""Options of the ``locsgd`` commands."""

from __future__ import annotations

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line that names the option, like those of the configuration.

    Raises:
        ValueError: from ``parse_args`` and its kin: a wrong option.
    """

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))
