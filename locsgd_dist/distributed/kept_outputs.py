"""Outputs of layers at rest, kept by image and used again: an image that comes back does not pass those layers anew.

Where the localized region does not move, what it says of an image is the same in every epoch; and where augmentations
go round (``data.draws``), images do come back.
"""

from __future__ import annotations

import secrets
import socket
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from locsgd_dist.distributed.output_store import OutputStore, row_bytes
from locsgd_dist.distributed.runtime import Runtime
from locsgd_dist.localized import Cut, LocalizedConfig, LocalizedLearner, find_cut


@dataclass(frozen=True)
class Recurrence:
    """Which images come back: ``num_images`` different ones, each from ``draws`` epochs after epoch ``start`` on, in a
    run of ``num_epochs``."""

    num_images: int
    draws: int
    start: int
    num_epochs: int

    @classmethod
    def of(cls, num_images: int | None, draws: int | None, start: int, num_epochs: int) -> Recurrence | None:
        """None where images never come back."""
        return None if num_images is None or draws is None else cls(num_images, draws, start, num_epochs)

    def comes_back(self, epoch: int) -> bool:
        """Whether any image that is first seen in ``epoch`` or later does."""
        return max(epoch, self.start) + self.draws < self.num_epochs


class KeptOutputs:
    """Outputs at the last cut before the boundary, in a file in the system's temporary folder that the ranks of a
    machine share and that is gone with them.

    Nothing of it is needed to go on: what is not there is computed, and then kept.

    Args:
        model: the network, not wrapped.
        learner: of its localized region, which must be at rest.
        example: a batch of one image, for its shape, dtype and device.
        recurrence: which images come back; None: none do.
        autocast: in which forward passes run.

    Attributes:
        num_used: samples of this epoch on this rank that did not pass the layers before the cut.
    """

    def __init__(
        self,
        config: LocalizedConfig,
        model: nn.Module,
        learner: LocalizedLearner,
        runtime: Runtime,
        *,
        example: Tensor,
        recurrence: Recurrence | None,
        autocast: AbstractContextManager[None] | None = None,
    ):
        self._max_gib = config.keep_gib
        self._model = model
        self._learner = learner
        self._runtime = runtime
        self._example = example
        self._recurrence = recurrence if config.keep_outputs else None
        self._autocast = autocast or nullcontext()
        self._boundary = 0
        self._place: _Place | None = None
        self._store: OutputStore | None = None
        self._num_layers_before = 0
        self.num_used = 0

    @property
    def num_layers(self) -> int:
        """Layers whose outputs :attr:`num_used` counts: those before the cut; 0: nothing is kept."""
        return self._num_layers_before if self._place is None else self._place.cut.num_layers

    def refresh(self, epoch: int) -> str | None:
        """Call after the boundary has moved, and after a learner has been restored; all ranks at the same time.

        What is kept already holds behind any boundary, and is given up for a later cut only.

        Args:
            epoch: the first that follows, from 0.

        Returns:
            What there is to tell of it; None where nothing has changed.
        """
        if self._recurrence is None or self._learner.boundary in (0, self._boundary):
            return None
        self._boundary = self._learner.boundary
        if self._recurrence.comes_back(epoch):
            place, refusal = self._find()
        else:
            place, refusal = None, f"no image comes back in this run (data.draws={self._recurrence.draws})"
        # Ranks read what others have written: all have found the same place to cut, or none keeps anything.
        # Why it found none is each rank's own affair.
        found = "" if place is None else place.describe(self._model)
        if self._is_anywhere(found != self._runtime.share_text(found)):
            place, refusal = None, "the ranks' networks cannot be cut alike"
        if place is None:
            return None if self._place else f"outputs are not kept: {refusal}"
        if self._place is not None and place.cut.module is self._place.cut.module:
            return None
        return self._open(place)

    def around(self, images: Tensor, keys: Tensor | None) -> AbstractContextManager[None]:
        """Around a forward pass of the network on ``images``, in which the layers before the cut do not run: for images
        of which nothing is kept they run here.

        Args:
            keys: int64 [b] on the host, the same for the same image; None: these images do not come back.
        """
        if keys is None or self._place is None or self._store is None:
            return nullcontext()
        return self._place.cut.behind(self._outputs(self._place, self._store, images, keys))

    def take(self) -> int:
        """:attr:`num_used`, which is counted anew from here."""
        num_used, self.num_used = self.num_used, 0
        self._num_layers_before = 0
        return num_used

    def state_dict(self) -> dict[str, Any]:
        """This rank's count of the epoch under way: what is kept is not saved."""
        return {"num_used": self.num_used, "num_layers": self.num_layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_used, self._num_layers_before = state["num_used"], state["num_layers"]

    def _find(self) -> tuple[_Place | None, str]:
        """Where to cut; or why nothing can be kept."""
        # Batch norms at rest are in another mode than those that train.
        self._learner.train()
        try:
            with self._autocast:
                cut = find_cut(self._model, self._learner.layers, self._boundary, self._example)
                if cut is None:
                    return (
                        None,
                        f"the network cannot be cut before layer {self._boundary}, or not so that outputs repeat",
                    )
                outputs = cut.outputs(self._example)
        except Exception as error:  # no memory for the trials, most of all; other ranks wait for what is found
            return None, f"{type(error).__name__} in a trial: {str(error).partition(chr(10))[0]}"
        is_channels_last = outputs.dim() == 4 and not outputs.is_contiguous()
        rows = outputs.permute(0, 2, 3, 1) if is_channels_last else outputs
        place = _Place(cut, tuple(rows.shape[1:]), rows.dtype, is_channels_last)
        if self._gib(place) > self._max_gib:
            return None, f"{self._size(place)}, localized.keep_gib is {self._max_gib:g}"
        return place, ""

    def _open(self, place: _Place) -> str:
        assert self._recurrence is not None
        self._place = self._store = None
        # The same name for the ranks of a machine, another on every machine: they may share the folder.
        name = f"locsgd-{self._runtime.share_text(secrets.token_hex(8))}-{_machine()}.outputs"
        path = Path(tempfile.gettempdir()) / name
        store: OutputStore | None = None
        reason = "there is no room on another machine"
        # Until here some rank may have had the table of an earlier cut open.
        self._runtime.barrier()
        try:
            try:
                store = OutputStore(path, self._recurrence.num_images, place.shape, place.dtype)
            except OSError as error:
                reason = f"{error} (TMPDIR names another folder)"
            if self._is_anywhere(store is None):
                return f"outputs are not kept: {reason}"
        finally:
            # All have it open, and nobody needs its name: the system gives its room back with the last process.
            path.unlink(missing_ok=True)
        self._place, self._store = place, store
        return f"outputs are kept: {self._size(place)} in {path.parent}"

    def _is_anywhere(self, value: bool) -> bool:
        return bool(self._runtime.max([float(value)])[0])

    def _gib(self, place: _Place) -> float:
        assert self._recurrence is not None
        return self._recurrence.num_images * row_bytes(place.shape, place.dtype) / 2**30

    def _size(self, place: _Place) -> str:
        assert self._recurrence is not None
        return f"{self._recurrence.num_images} outputs of {place.cut.num_layers} layers take {self._gib(place):.2f} GiB"

    @torch.no_grad()
    def _outputs(self, place: _Place, store: OutputStore, images: Tensor, keys: Tensor) -> Tensor:
        is_kept = store.has(keys)
        self.num_used += int(is_kept.sum())
        if is_kept.all():
            return place.as_outputs(store.read(keys).to(images.device))
        missing = (~is_kept).nonzero().flatten()
        fresh = place.as_rows(place.cut.outputs(images[missing.to(images.device)]))
        # A step that is not finite is passed over, and its images are to have another chance.
        is_finite = fresh.view(len(fresh), -1).isfinite().all(dim=1)
        store.write(keys[missing[is_finite.cpu()]], fresh[is_finite])
        if not is_kept.any():
            return place.as_outputs(fresh)
        rows, kept = fresh.new_empty(len(keys), *place.shape), is_kept.nonzero().flatten()
        rows[kept.to(rows.device)] = store.read(keys[kept]).to(rows.device)
        rows[missing.to(rows.device)] = fresh
        return place.as_outputs(rows)


@dataclass(frozen=True)
class _Place:
    """A cut, and how an image's output there is kept: as it lies in memory."""

    cut: Cut
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_channels_last: bool

    def describe(self, model: nn.Module) -> str:
        """The same on ranks that keep the same."""
        name = next(name for name, module in model.named_modules() if module is self.cut.module)
        return f"{name} {self.shape} {self.dtype} {self.is_channels_last}"

    def as_rows(self, outputs: Tensor) -> Tensor:
        return (outputs.permute(0, 2, 3, 1) if self.is_channels_last else outputs).contiguous()

    def as_outputs(self, rows: Tensor) -> Tensor:
        return rows.permute(0, 3, 1, 2) if self.is_channels_last else rows


def _machine() -> str:
    """The same in all containers of a machine, where it can be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
