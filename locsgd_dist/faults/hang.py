"""A rank that hangs holds all others up until a collective runs out of time; the message then says which it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from locsgd_dist.distributed import Runtime
from locsgd_dist.distributed.runtime import ROLL_CALL


@contextmanager
def naming_silent_ranks(runtime: Runtime, patience: timedelta = ROLL_CALL) -> Iterator[None]:
    """Around training: an error of a collective says in addition which ranks no longer answer.

    Args:
        patience: how long a rank may take to answer the roll call.

    Raises:
        RuntimeError: the collective's own error, with the ranks in a line above it.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_collective(error):
            raise
        raise RuntimeError(f"rank {runtime.rank}: a collective failed; {runtime.roll_call(patience)}") from error


_WORDS = ("gloo", "nccl", "connection closed", "connection reset", "timed out waiting", "pair closure")


def _is_of_a_collective(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(word in text for word in _WORDS)
