"""What an epoch did to each layer: how long its weights are, how far they moved, how many directions they span."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locsgd_dist.localized.layers import LayerMap


@dataclass(frozen=True)
class EpochDiagnostics:
    """One value per layer, in execution order.

    Attributes:
        norm: Frobenius norm of the weight at the epoch's end.
        update_norm: norm of the weight's change over the epoch (u of algorithm 1).
        effective_rank: exp of the entropy of the normalised squared singular values; 1 ... min(rows, columns).
    """

    norm: list[float]
    update_norm: list[float]
    effective_rank: list[float]

    @property
    def drift(self) -> list[float]:
        """``update_norm / norm``: how much of a layer an epoch replaced."""
        return [u / n if n > 0 else 0.0 for u, n in zip(self.update_norm, self.norm, strict=True)]


class WeightTrace:
    """Remembers every layer's weight at the start of an epoch, in host memory so that no device pays for it."""

    def __init__(self, layers: LayerMap):
        self._layers = layers
        self._start: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Call at the start of an epoch."""
        weights = [layer.weight.detach() for layer in self._layers]
        # A pruned network's weights have shrunk since the last epoch.
        if [kept.shape for kept in self._start] == [weight.shape for weight in weights]:
            for kept, weight in zip(self._start, weights, strict=True):
                kept.copy_(weight)
        else:
            self._start = [weight.to("cpu", copy=True) for weight in weights]

    def state_dict(self) -> dict[str, Tensor]:
        """The weights at the start of the epoch under way, by layer."""
        return {layer.name: start for layer, start in zip(self._layers, self._start, strict=False)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._start = [state[layer.name] for layer in self._layers]

    @torch.no_grad()
    def end(self) -> EpochDiagnostics:
        """Call at the end of the epoch that :meth:`begin` opened."""
        norms, updates, ranks = [], [], []
        for layer, start in zip(self._layers, self._start, strict=True):
            weight = layer.weight.detach().float()
            norms.append(torch.linalg.vector_norm(weight))
            updates.append(torch.linalg.vector_norm(weight - start.to(weight.device)))
            ranks.append(effective_rank(weight))
        gathered = torch.stack([torch.stack(norms), torch.stack(updates), torch.stack(ranks)]).tolist()
        return EpochDiagnostics(norm=gathered[0], update_norm=gathered[1], effective_rank=gathered[2])


def effective_rank(weight: Tensor) -> Tensor:
    """exp of the entropy of ``weight``'s squared singular values (rows: output features), as a scalar tensor.

    The squared singular values come from the smaller Gram matrix, which is far cheaper than a decomposition of the
    weight itself. A weight that is all zero or not finite has rank 0.
    """
    matrix = weight.flatten(1).double() if weight.dim() > 1 else weight[None].double()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    gram = matrix @ matrix.T
    if not torch.isfinite(gram).all():
        return weight.new_zeros(())
    squared = torch.linalg.eigvalsh(gram).clamp_min(0)
    total = squared.sum()
    share = squared / total.clamp_min(torch.finfo(torch.float64).tiny)
    entropy = -torch.special.xlogy(share, share).sum()
    return torch.where(total > 0, entropy.exp(), 0.0).to(weight.dtype)
