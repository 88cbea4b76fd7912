"""What a rank sends: the payload of each collective, counted where it is issued."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Traffic:
    """Bytes and collectives since the last :meth:`take`; each collective's payload counts once per rank."""

    gradient_bytes: int = 0
    gradient_collectives: int = 0
    replica_bytes: int = 0
    replica_collectives: int = 0

    def add_gradients(self, num_bytes: int) -> None:
        self.gradient_bytes += num_bytes
        self.gradient_collectives += 1

    def add_replicas(self, num_bytes: int) -> None:
        self.replica_bytes += num_bytes
        self.replica_collectives += 1

    def state_dict(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def take(self) -> Traffic:
        """What was counted so far; counting starts anew."""
        taken = Traffic(**{f.name: getattr(self, f.name) for f in fields(self)})
        for f in fields(self):
            setattr(self, f.name, 0)
        return taken
