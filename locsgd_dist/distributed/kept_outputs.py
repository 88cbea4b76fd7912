"""Outputs of layers at rest, kept by image and used again: an image that comes back does not pass those layers anew.

Where the localized region does not move, what it says of an image is the same in every epoch; and where augmentations
go round (``data.draws``), images do come back.
"""

from __future__ import annotations

import secrets
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from locsgd_dist.distributed.output_store import OutputStore, row_bytes
from locsgd_dist.distributed.runtime import Runtime
from locsgd_dist.localized import Cut, LocalizedConfig, LocalizedLearner, find_cut, is_repeatable


class KeptOutputs:
    """Outputs at the last cut before the boundary, in a file in the system's temporary folder that the ranks of a
    machine share and that is gone with them.

    Nothing of it is needed to go on: what is not there is computed, and then kept.

    Args:
        model: the network, not wrapped.
        learner: of its localized region, which must be at rest.
        example: a batch of one image, for its shape, dtype and device.
        num_keys: different images that epochs hand out; None: they do not come back.
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
        num_keys: int | None,
        autocast: AbstractContextManager[None] | None = None,
    ):
        self._max_gib = config.keep_gib
        self._model = model
        self._learner = learner
        self._runtime = runtime
        self._example = example
        self._num_keys = num_keys if config.keep_outputs else None
        self._autocast = autocast or nullcontext()
        self._cut: Cut | None = None
        self._store: OutputStore | None = None
        self._is_channels_last = False
        self._boundary = 0
        self.num_used = 0

    @property
    def num_layers(self) -> int:
        """Layers whose outputs are kept: those before the cut; 0: nothing is kept."""
        return 0 if self._cut is None or self._store is None else self._cut.num_layers

    def refresh(self) -> str | None:
        """Call after the boundary has moved, and after a learner has been restored; all ranks at the same time.

        Returns:
            What there is to tell of it; None where nothing has changed.
        """
        if self._num_keys is None or self._learner.boundary in (0, self._boundary):
            return None
        self._boundary = self._learner.boundary
        name = self._runtime.share_text(f"locsgd-{secrets.token_hex(8)}.outputs")
        path = Path(tempfile.gettempdir()) / name
        message = self._open(path)
        # Once all have it open nobody needs its name: the system gives its room back with the last process.
        self._runtime.barrier()
        path.unlink(missing_ok=True)
        return message

    def around(self, images: Tensor, keys: Tensor | None) -> AbstractContextManager[None]:
        """Around a forward pass of the network on ``images``, in which the layers before the cut do not run: for images
        of which nothing is kept they run here.

        Args:
            keys: int64 [b] on the host, the same for the same image; None: these images do not come back.
        """
        if keys is None or self._cut is None or self._store is None:
            return nullcontext()
        return self._cut.behind(self._outputs(self._cut, self._store, images, keys))

    def take(self) -> int:
        """:attr:`num_used`, which is counted anew from here."""
        num_used, self.num_used = self.num_used, 0
        return num_used

    def _open(self, path: Path) -> str | None:
        assert self._num_keys is not None
        learner, boundary = self._learner, self._learner.boundary
        # Batch norms at rest are in another mode than those that train.
        learner.train()
        with self._autocast:
            cut = find_cut(self._model, learner.layers, boundary, self._example)
            if cut is not None and self._cut is not None and cut.module is self._cut.module:
                return None  # the layers before it were at rest before: what is kept holds
            self._cut = self._store = None
            if cut is None:
                return f"outputs are not kept: the network cannot be cut before layer {boundary}"
            if not is_repeatable(cut, self._example):
                return "outputs are not kept: the layers at rest draw random numbers, or mix the images of a batch"
            outputs = cut.outputs(self._example)
            self._is_channels_last = outputs.dim() == 4 and not outputs.is_contiguous()
            rows = self._in_memory_order(outputs)
        shape, num_bytes = rows.shape[1:], self._num_keys * row_bytes(rows.shape[1:], rows.dtype)
        size = f"{self._num_keys} outputs of {cut.num_layers} layers take {num_bytes / 2**30:.2f} GiB"
        if num_bytes > self._max_gib * 2**30:
            return f"outputs are not kept: {size}, localized.keep_gib is {self._max_gib:g}"
        try:
            self._store = OutputStore(path, self._num_keys, shape, rows.dtype)
        except OSError as error:
            return f"outputs are not kept: {error} (TMPDIR names another folder)"
        self._cut = cut
        return f"outputs are kept: {size} in {path.parent}"

    @torch.no_grad()
    def _outputs(self, cut: Cut, store: OutputStore, images: Tensor, keys: Tensor) -> Tensor:
        is_kept = store.has(keys)
        self.num_used += int(is_kept.sum())
        if is_kept.all():
            rows = store.read(keys).to(images.device)
        else:
            missing = (~is_kept).nonzero().flatten()
            fresh = self._in_memory_order(cut.outputs(images[missing.to(images.device)]))
            store.write(keys[missing], fresh)
            rows = store.read(keys).to(images.device) if is_kept.any() else fresh
        return rows.permute(0, 3, 1, 2) if self._is_channels_last else rows

    def _in_memory_order(self, outputs: Tensor) -> Tensor:
        """Of images in channels-last format, rows in that format."""
        return (outputs.permute(0, 2, 3, 1) if self._is_channels_last else outputs).contiguous()
