"""From a schedule to logits: lays the chunks out as one ``ForwardBatch`` and calls the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from seamount.kernels.layout import PAGE_SIZE, CachePlanes
from seamount.workers.model.batch import ForwardBatch
from seamount.workers.schedule import Chunk


class Model(Protocol):
    """What the engine needs of a ``Transformer``."""

    def forward(
        self, batch: ForwardBatch, planes: CachePlanes, *, on_layer: Callable[[int], None] | None = None
    ) -> Tensor: ...


class Runner:
    """Owns the planes' use: only the engine's thread calls it."""

    def __init__(self, *, model: Model, planes: CachePlanes) -> None:
        self._model = model
        self._planes = planes

    def lay_out(self, chunks: Sequence[Chunk]) -> ForwardBatch:
        """Token rows in the order of ``chunks``; logits wanted of the last row of each chunk that samples.

        Empty for no chunks: the batch with which an idle rank joins its gang's collectives.
        """
        sequences: list[tuple[list[int], int, list[int]]] = []
        logit_rows: list[int] = []
        num_rows = 0
        for chunk in chunks:
            reservation = chunk.sequence.request.reservation
            num_pages = -(-chunk.end // PAGE_SIZE)
            sequences.append(
                (reservation.token_ids[chunk.first : chunk.end], chunk.first, reservation.pages[:num_pages])
            )
            num_rows += len(chunk)
            if chunk.samples:
                logit_rows.append(num_rows - 1)
        return ForwardBatch.create(sequences, logit_rows)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, chunks: Sequence[Chunk]) -> tuple[Tensor, dict[str, Exception]]:
        """Run the model over what ``lay_out`` made of ``chunks``.

        Returns logits [N, V] of the chunks that sample, in order, on the CPU; and by request id what its ``on_layer``
        raised: that request alone has failed then, and its hook is not called again.
        """
        hooked = [chunk for chunk in chunks if chunk.sequence.request.on_layer is not None]
        raised: dict[str, Exception] = {}

        def on_layer(layer: int) -> None:
            for chunk in hooked:
                request = chunk.sequence.request
                if request.on_layer is None or request.id in raised:
                    continue
                try:
                    request.on_layer(layer, chunk.first, chunk.end)
                except Exception as error:
                    raised[request.id] = error

        logits = self._model.forward(batch, self._planes, on_layer=on_layer if hooked else None)
        return logits.cpu(), raised
