"""Moves token rows to the ranks that own their experts, and the results back.

Every (token, choice) pair is one row. ``dispatch`` takes two collectives (rows for each expert, then the rows
themselves), ``combine`` one. The number of rows for each expert also tells the receiver which expert a row is for, so
no ids travel. Results return to their source before they are added, always in gate order k = 0..K-1: a sum does not
depend on how many ranks there are or whose rows arrive first.

Rows travel as bytes, because gloo does not know every dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from seamount.workers.experts.mapping import ExpertMap


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """The rows for this rank's experts, grouped by expert in ascending order.

    x: [R, H] in the source's dtype; R may be 0.
    local_expert: [R] int64, ascending, in [0, map.num_local).
    rows_per_expert: num_local counts that sum to R: expert e's rows are one contiguous slice of ``x``.
    """

    x: Tensor
    local_expert: Tensor
    rows_per_expert: tuple[int, ...]
    order: Tensor
    """[T*K] int64: pair sent at position i is ``order[i] = token * K + k``."""
    arrival: Tensor | None
    """[R] int64: row i of ``x`` arrived at position ``arrival[i]``; None where nothing travelled."""
    sent_rows: tuple[int, ...]
    """Rows sent to each rank."""
    received_rows: tuple[int, ...]
    """Rows received from each rank."""


class ExpertParallel(Protocol):
    """What a MoE layer needs of its gang. Every rank must make the same calls in the same order, with T = 0 as well."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def map(self) -> ExpertMap: ...

    def dispatch(self, x: Tensor, expert_ids: Tensor) -> Dispatched:
        """Send each token to the owners of its experts.

        x: [T, H], any dtype. expert_ids: [T, K] int64, global ids in [0, num_experts). T may be 0.
        Returns what this rank's experts must compute, from all ranks.
        """
        ...

    def combine(self, y: Tensor, dispatched: Dispatched, weights: Tensor) -> Tensor:
        """out[t] = sum over k = 0..K-1, in this order, of weights[t, k] * expert_{ids[t, k]}(x[t]).

        y: [R, H], the experts' outputs in the row order of ``dispatched.x``; the same dtype on every rank.
        weights: [T, K] of this rank's own tokens.
        Returns [T, H] in the accumulation dtype: float64 for float64 ``y``, else float32.
        """
        ...


class LocalExperts:
    """Every expert on this rank: no collective."""

    def __init__(self, num_experts: int) -> None:
        self.rank = 0
        self.size = 1
        self.map = ExpertMap(num_experts=num_experts, size=1)

    def dispatch(self, x: Tensor, expert_ids: Tensor) -> Dispatched:
        order, counts = _sort_by_expert(expert_ids, self.map.num_experts)
        rows = (order.numel(),)
        return Dispatched(
            x=x[order // max(expert_ids.shape[1], 1)],
            local_expert=expert_ids.reshape(-1)[order],
            rows_per_expert=tuple(counts.tolist()),
            order=order,
            arrival=None,
            sent_rows=rows,
            received_rows=rows,
        )

    def combine(self, y: Tensor, dispatched: Dispatched, weights: Tensor) -> Tensor:
        return _sum_in_gate_order(y, dispatched.order, weights)


class GangExperts:
    """Experts split over the ranks of a gang, which share one gloo group.

    group: the gang's process group, whose timeout bounds every wait here; its rank and size give this rank's experts.
    A member that died or stalls past the timeout shows as gloo's ``RuntimeError``: the gang is lost as a whole.
    """

    def __init__(self, group: ProcessGroupGloo, num_experts: int) -> None:
        self.rank = group.rank()
        self.size = group.size()
        self.map = ExpertMap(num_experts=num_experts, size=self.size)
        self._group = group

    def dispatch(self, x: Tensor, expert_ids: Tensor) -> Dispatched:
        order, counts = _sort_by_expert(expert_ids, self.map.num_experts)
        shares = torch.empty_like(counts)  # [size * num_local]: rows that each rank sends to each of my experts
        self._all_to_all(shares, counts, (), ())
        by_source = shares.view(self.size, self.map.num_local)
        sent = tuple(counts.view(self.size, self.map.num_local).sum(1).tolist())
        received = tuple(by_source.sum(1).tolist())
        rows = self._exchange(x[order // max(expert_ids.shape[1], 1)], sent, received)
        experts = torch.arange(self.map.num_local, device=x.device).repeat(self.size)
        arrived = torch.repeat_interleave(experts, shares)  # the rows come by source rank, then by expert
        arrival = torch.argsort(arrived, stable=True)
        return Dispatched(
            x=rows[arrival],
            local_expert=arrived[arrival],
            rows_per_expert=tuple(by_source.sum(0).tolist()),
            order=order,
            arrival=arrival,
            sent_rows=sent,
            received_rows=received,
        )

    def combine(self, y: Tensor, dispatched: Dispatched, weights: Tensor) -> Tensor:
        assert dispatched.arrival is not None, "rows of another kind of ExpertParallel"
        as_arrived = torch.empty_like(y)
        as_arrived[dispatched.arrival] = y
        returned = self._exchange(as_arrived, dispatched.received_rows, dispatched.sent_rows)
        return _sum_in_gate_order(returned, dispatched.order, weights)

    def _exchange(self, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
        incoming = torch.empty((sum(received), rows.shape[1]), dtype=rows.dtype, device=rows.device)
        self._all_to_all(incoming.view(torch.uint8), rows.contiguous().view(torch.uint8), received, sent)
        return incoming

    def _all_to_all(self, output: Tensor, rows: Tensor, received: Sequence[int], sent: Sequence[int]) -> None:
        # gloo reads and writes host memory; torch's stubs lack this method of the group object.
        host = output if output.device.type == "cpu" else torch.empty_like(output, device="cpu")
        self._group.alltoall_base(host, rows.cpu(), list(received), list(sent)).wait()  # type: ignore[attr-defined]
        if host is not output:
            output.copy_(host)


def _sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The stable order of the T*K pairs by expert ([T*K] int64) and the pairs of each expert ([num_experts] int64)."""
    flat = expert_ids.reshape(-1)
    counts = torch.bincount(flat, minlength=num_experts)
    assert counts.numel() == num_experts, "an expert id is out of range"
    return torch.argsort(flat, stable=True), counts


def _sum_in_gate_order(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    num_tokens, top_k = weights.shape
    accumulate = torch.float64 if rows.dtype == torch.float64 else torch.float32
    pairs = torch.empty_like(rows)
    pairs[order] = rows
    by_choice = pairs.view(num_tokens, top_k, rows.shape[1])
    out = torch.zeros((num_tokens, rows.shape[1]), dtype=accumulate, device=rows.device)
    for k in range(top_k):
        out += weights[:, k, None].to(accumulate) * by_choice[:, k].to(accumulate)
    return out
