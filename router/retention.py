"""Leases as routers see them: asked of the rank that holds a session's caches, stored with the session.

A turn that ends in tool calls asks for one by itself, for as long as these tools usually take; ``ReportToolWait`` asks
for another in its place.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from seamount.router.metrics import RouterMetrics
from seamount.router.rank_client import RankLost
from seamount.router.ranks import Ranks
from seamount.router.receipts import lease_state
from seamount.router.session_view import SessionView
from seamount.router.sessions import Sessions
from seamount.router.tool_waits import ToolWaits
from seamount.v1 import common_pb2, events_pb2, record_pb2, session_pb2, worker_pb2
from seamount.wire import limits
from seamount.wire.errors import FailedPrecondition, InvalidArgument, SeamountError
from seamount.wire.ids import Epoch, RankId, SessionId, TenantId

_LOG = logging.getLogger(__name__)
AUTOMATIC_BUDGET_S = 0.5
"""How long a commit waits for its lease at the most: with none, it is committed all the same."""


@dataclass(slots=True, kw_only=True)
class Retention:
    """Of one router. ``close`` at the end."""

    sessions: Sessions
    ranks: Ranks
    waits: ToolWaits
    metrics: RouterMetrics
    _noting: set[asyncio.Task[None]] = field(default_factory=set)

    async def report_tool_wait(self, tenant: TenantId, request: session_pb2.ReportToolWaitRequest) -> events_pb2.Lease:
        """Ask for a lease until the tools' results are expected.

        Denied where the rank is lost. Raises ``InvalidArgument`` that names the field, ``NotFound``,
        ``FailedPrecondition`` (NO_PENDING_TOOL_CALLS), ``Aborted`` (HEAD_MOVED) where the session has gone on
        meanwhile, ``Unavailable`` where the store is away.
        """
        if request.importance not in common_pb2.LeaseImportance.values():
            raise InvalidArgument("importance is not known; use low, normal or high", field="importance")
        expected_s = request.expected.ToNanoseconds() / 1e9
        limits.check_range(expected_s, field="expected", low=0, low_open=True, high=limits.MAX_TOOL_WAIT_S)
        view = await self.sessions.get(tenant, SessionId(request.session_id))
        if view.session.state != session_pb2.SESSION_STATE_WAITING_FOR_TOOLS:
            raise FailedPrecondition(
                "the session waits for no tool results; report a wait after a turn that ends in tool calls",
                reason="NO_PENDING_TOOL_CALLS",
            )
        return await self.ask(tenant, view, duration_s=expected_s, importance=request.importance)

    async def ask(
        self, tenant: TenantId, view: SessionView, *, duration_s: float, importance: common_pb2.LeaseImportance
    ) -> events_pb2.Lease:
        """Ask the rank that served the session's last turn, and store its answer. Raises as above."""
        rank_id, session_id = RankId(view.last_rank), SessionId(view.session.id)
        try:
            stored = await self._retain(rank_id, session_id, view.epoch, duration_s, importance)
        except RankLost:  # what it may have answered before stays noted: the next receipt says that it is lost
            return events_pb2.Lease(
                outcome=common_pb2.LEASE_OUTCOME_DENIED,
                num_rebuild_tokens=view.session.num_context_tokens,
                decode_rank=rank_id,
            )
        await self.sessions.note_lease(tenant, session_id, head=view.session.head, lease=stored)
        return stored.lease

    async def while_tools_run(
        self, tenant: TenantId, session_id: SessionId, epoch: Epoch, rank_id: RankId, tools: Sequence[str]
    ) -> record_pb2.StoredLease | None:
        """Ask for a lease for as long as the results of these calls usually take; None where nobody answers in time.

        To be asked before the commit, which stores it: a report by the client, who hears of the commit, comes after it.
        It asks for little importance: what clients ask for themselves gets more room.
        """
        with suppress(SeamountError, TimeoutError):
            async with asyncio.timeout(AUTOMATIC_BUDGET_S):
                expected_s = await self.waits.expected_s(tenant, tools)
                return await self._retain(rank_id, session_id, epoch, expected_s, common_pb2.LEASE_IMPORTANCE_LOW)
        return None

    def note_wait(self, tenant: TenantId, before: record_pb2.TurnRecord, came_at: float) -> None:
        """The turn after ``before`` is committed; it came at ``came_at`` (``time.monotonic()``), perhaps with the
        results of tools. Counted with nobody waiting."""
        if not before.pending_tool_calls or not before.HasField("receipt"):
            return
        names = [call.name for call in before.pending_tool_calls]
        wait_s = time.time() - (time.monotonic() - came_at) - before.receipt.finished_at.ToNanoseconds() / 1e9

        async def note() -> None:
            try:
                await self.waits.note(tenant, names, wait_s)
            except SeamountError as error:
                _LOG.info("tool_wait_not_noted", extra={"reason": error.reason})

        self._later(note())

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._noting.add(task)
        task.add_done_callback(self._noting.discard)

    async def close(self) -> None:
        """Wait for what is being noted; bounded by the store's budget."""
        await asyncio.gather(*self._noting)

    async def _retain(
        self,
        rank_id: RankId,
        session_id: SessionId,
        epoch: Epoch,
        duration_s: float,
        importance: common_pb2.LeaseImportance,
    ) -> record_pb2.StoredLease:
        instance, asked_at = self.ranks.instance(rank_id), time.time()
        client = self.ranks.client(rank_id)
        answer = await client.retain(session_id, epoch=epoch, duration_s=duration_s, importance=importance)
        self.metrics.leased(answer.outcome)
        return record_pb2.StoredLease(lease=_lease(answer, rank_id, asked_at), rank_instance=instance or "")

    def lease_of(self, view: SessionView) -> events_pb2.Lease | None:
        """The session's lease with its state as of now; None where none was asked for since its last turn."""
        if view.lease is None:
            return None
        lease = events_pb2.Lease()
        lease.CopyFrom(view.lease.lease)
        is_lost = self.ranks.instance(RankId(lease.decode_rank)) != view.lease.rank_instance
        lease.state = lease_state(lease, is_lost=is_lost, now_s=time.time())
        return lease


def _lease(answer: worker_pb2.RetainResponse, rank_id: RankId, asked_at: float) -> events_pb2.Lease:
    lease = events_pb2.Lease(
        outcome=answer.outcome,
        tier=answer.tier,
        num_rebuild_tokens=answer.num_rebuild_tokens,
        decode_rank=rank_id,
    )
    if answer.rebuild_time.ToNanoseconds():
        lease.rebuild_time.CopyFrom(answer.rebuild_time)
    if answer.outcome != common_pb2.LEASE_OUTCOME_DENIED:
        lease.state = events_pb2.LEASE_STATE_HELD
        lease.expires_at.FromNanoseconds(int(asked_at * 1e9) + answer.duration.ToNanoseconds())
    return lease
