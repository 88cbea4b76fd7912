"""Checkpoints of a run: written whole or not at all, the newest readable one found again, never a pickle executed."""

from locsgd_dist.checkpoint.file import load_state, save_atomically
from locsgd_dist.checkpoint.resume import (
    changed_keys,
    check_resume,
    checkpointed_epochs,
    differing_keys,
    was_restarted,
)
from locsgd_dist.checkpoint.store import (
    CheckpointConfig,
    CheckpointStore,
    Position,
    Written,
    completed_epochs,
    position_of,
)

__all__ = [
    "CheckpointConfig",
    "CheckpointStore",
    "Position",
    "Written",
    "changed_keys",
    "check_resume",
    "checkpointed_epochs",
    "completed_epochs",
    "differing_keys",
    "load_state",
    "position_of",
    "save_atomically",
    "was_restarted",
]
