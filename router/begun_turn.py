"""A turn that this router runs."""

from __future__ import annotations

from dataclasses import dataclass

from seamount.router.chain import History
from seamount.router.session_view import SessionView
from seamount.v1 import record_pb2
from seamount.wire.ids import Epoch, SessionId, TenantId, TurnId


@dataclass(frozen=True, slots=True, kw_only=True)
class BegunTurn:
    """This router holds the session under ``epoch``. ``view``: as the turn began."""

    tenant: TenantId
    session_id: SessionId
    key: str
    turn_id: TurnId
    epoch: Epoch
    view: SessionView
    history: History

    @property
    def head(self) -> int:
        return self.history.head

    @property
    def records(self) -> tuple[record_pb2.TurnRecord, ...]:
        return self.history.records
