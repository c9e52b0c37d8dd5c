"""Decode steps of a fixed shape, captured as a CUDA graph.

A step of so small a model is 500 launches that take the host 20 ms and the GPU 3. A graph launches them all at once.
Its shapes, addresses and host decisions are those of the capture: every conversation has a row in every step, those
that do not run with a token whose entries nobody will read; every row is scored by the indexer, also where it would
select all; and every expert computes every row (``EveryExpert``), because who chose it is known to the GPU alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seamount.kernels.layout import PAGE_SIZE, CachePlanes
from seamount.workers.experts.dispatch import Dispatched
from seamount.workers.experts.mapping import ExpertMap
from seamount.workers.model.batch import AttentionPlan, DecodeRows, ForwardBatch
from seamount.workers.model.transformer import Transformer


class EveryExpert:
    """``LocalExperts`` with shapes that do not depend on the gate: all rows go to all experts, the chosen are added.

    The same products and the same order of sums, so the same result; E / K times the arithmetic.
    """

    def __init__(self, num_experts: int) -> None:
        self.rank, self.size = 0, 1
        self.map = ExpertMap(num_experts=num_experts, size=1)

    def dispatch(self, x: Tensor, expert_ids: Tensor) -> Dispatched:
        """x: [T, H]; expert_ids: [T, K]. Returns E copies of x, one after the other; ``order``: [T K], the row of each
        choice."""
        num_tokens, count = x.shape[0], self.map.num_experts
        rows = expert_ids * num_tokens + torch.arange(num_tokens, device=x.device).unsqueeze(1)
        return Dispatched(
            x=x.repeat(count, 1),
            local_expert=torch.arange(count, device=x.device).repeat_interleave(num_tokens),
            rows_per_expert=(num_tokens,) * count,
            order=rows.flatten(),
            arrival=None,
            sent_rows=(num_tokens * count,),
            received_rows=(num_tokens * count,),
        )

    def combine(self, y: Tensor, dispatched: Dispatched, weights: Tensor) -> Tensor:
        """See ``ExpertParallel``."""
        wide = torch.promote_types(y.dtype, torch.float32)
        chosen = y[dispatched.order].view(*weights.shape, y.shape[1])
        out = torch.zeros((weights.shape[0], y.shape[1]), dtype=wide, device=y.device)
        for k in range(weights.shape[1]):
            out += weights[:, k, None].to(wide) * chosen[:, k].to(wide)
        return out


class CapturedDecode:
    """One token of each conversation. On a CPU the same step runs as it is.

    model: with ``EveryExpert``; its tensors stay where they are, their values may change. planes: conversation i has
    the ``num_pages`` pages from i * num_pages on.
    """

    def __init__(self, model: Transformer, planes: CachePlanes, *, num_conversations: int, num_pages: int) -> None:
        self._model, self._planes = model, planes
        device = model.device
        self._rows = torch.arange(num_conversations, device=device)
        self._tables = self._rows.unsqueeze(1) * num_pages + torch.arange(num_pages, device=device)
        self._input = torch.zeros((2, num_conversations), dtype=torch.int64, device=device)
        self._logits: Tensor | None = None
        if device.type == "cuda":
            self._host = torch.zeros((2, num_conversations), dtype=torch.int64).pin_memory()
            self._capture()

    def forward(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Of every conversation a token and its place in the context; what lies there is overwritten.

        Returns logits [conversations, vocab] float32, valid until the next call.
        """
        values = torch.tensor([token_ids, positions])
        if self._logits is None:
            self._input.copy_(values)
            return self._step()
        self._host.copy_(values)
        self._input.copy_(self._host, non_blocking=True)
        self._graph.replay()
        return self._logits

    @torch.inference_mode()
    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step()

    @torch.inference_mode()
    def _step(self) -> Tensor:
        token_ids, positions = self._input
        pages = self._tables.shape[1]
        decode = DecodeRows(
            rows=self._rows,
            lengths=positions + 1,
            page_tables=self._tables,
            slots=self._tables,  # the indexer's choice replaces them
            scored=self._rows,
        )
        batch = ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slots=self._rows * (pages * PAGE_SIZE) + positions,
            query_starts=[],
            context_lens=[],
            page_tables=[],
            logit_rows=self._rows,
        )
        plan = AttentionPlan(decode=decode, chunks=[], scored_rows=self._rows)
        return self._model.forward_planned(batch, plan, self._planes)


def copy_weights(source: object, target: object) -> None:
    """Copy every tensor of an object made like ``target`` into the tensor at the same place of it."""
    if isinstance(source, Tensor):
        assert isinstance(target, Tensor), "made alike"
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError(f"{source.dtype} {list(source.shape)} instead of {target.dtype} {list(target.shape)}")
        target.copy_(source)
    elif isinstance(source, (list, tuple)) and isinstance(target, (list, tuple)):
        for one, other in zip(source, target, strict=True):
            copy_weights(one, other)
    elif type(source).__module__.startswith("seamount.workers.model"):
        for name in _names(source):
            copy_weights(getattr(source, name), getattr(target, name))


def _names(value: object) -> list[str]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return slots or list(vars(value))
