"""A turn that another router runs, told here from its log: live, and to the same end."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from seamount.router.logged_turn import LogEvents, LoggedTurn
from seamount.router.replay import replayed_events
from seamount.router.session_view import ReplayedTurn
from seamount.router.sessions import Sessions
from seamount.router.stored import LogEntry
from seamount.router.tokenizer import Tokenizer
from seamount.router.turn_stream import TurnStream, router_leaving
from seamount.wire.errors import DataLoss, NotFound, SeamountError, Unavailable, defect
from seamount.wire.ids import SessionId, TenantId, TurnId

_LOG = logging.getLogger(__name__)
MIN_POLL_S = 0.01
MAX_POLL_S = 0.16
"""Between looks at a log: doubled while nothing comes."""
LOOK_AT_SESSION_S = 1.0
"""A log that stands still for so long may belong to a session that was deleted."""


@dataclass(slots=True, kw_only=True)
class LogFollower:
    """Tells one turn's events into a stream until the turn is over, or nobody follows the stream any more."""

    sessions: Sessions
    tokenizer: Tokenizer
    tenant: TenantId
    session_id: SessionId
    turn_id: TurnId
    stream: TurnStream
    logged: LoggedTurn

    async def run(self) -> None:
        """Never raises; however it ends, the stream is closed."""
        failure: SeamountError | None = None
        try:
            failure = await self._follow()
        except SeamountError as error:
            failure = error
        except asyncio.CancelledError:
            failure = router_leaving()
        except Exception:
            _LOG.exception("log_follower_failed", extra={"turn_id": self.turn_id})
            failure = defect()
        finally:
            self.stream.close(failure)

    async def _follow(self) -> SeamountError | None:
        session = (await self.sessions.get(self.tenant, self.session_id)).session
        if not self.logged.is_known:
            self.logged.take(await self._read())
            if not self.logged.is_known:
                return turn_not_found()
        events = LogEvents(self.turn_id, session, self.tokenizer, self.logged)
        pause_s, still_s = MIN_POLL_S, 0.0
        while True:
            self.stream.append(events.news())
            if self.logged.is_over:
                await self._tell_end()
                return None
            await asyncio.sleep(pause_s)
            if not self.stream.num_followers:
                return Unavailable("nobody followed; resume again", reason="NOT_FOLLOWED", retry_after_s=0)
            still_s += pause_s
            entries = await self._read()
            self.logged.take(entries)
            if entries:
                pause_s, still_s = MIN_POLL_S, 0.0
                continue
            pause_s = min(2 * pause_s, MAX_POLL_S)
            if still_s > LOOK_AT_SESSION_S:
                still_s = 0.0
                if await self._is_gone():
                    return turn_not_found()

    async def _read(self) -> list[LogEntry]:
        """What is new, whenever Redis answers again: the turn stalls as well while it is away."""
        while True:
            try:
                return await self.sessions.read_log(self.tenant, self.session_id, self.turn_id, after=self.logged.end)
            except Unavailable:
                await asyncio.sleep(MAX_POLL_S)

    async def _is_gone(self) -> bool:
        """Whether the turn neither runs nor has left its end in the log. Raises ``NotFound`` with its session."""
        try:
            running = (await self.sessions.get(self.tenant, self.session_id)).running
        except Unavailable:
            return False
        if running is not None and running.turn_id == self.turn_id:
            return False
        self.logged.take(await self._read())
        return not self.logged.is_over

    async def _tell_end(self) -> None:
        if self.logged.committed_index is not None:
            view, history = await self.sessions.read(self.tenant, self.session_id)
            if self.logged.committed_index >= history.head:  # deleted, and made anew under its key
                raise turn_not_found()
            record = history.records[self.logged.committed_index]
            if record.turn_id != self.turn_id:
                raise DataLoss("a turn's log names another turn's record", reason="LOG_DAMAGED")
            replayed = ReplayedTurn(turn_id=self.turn_id, record=record, final_event=record.final_event, view=view)
            self.stream.append(replayed_events(replayed, record, self.tokenizer))


def turn_not_found() -> NotFound:
    """The one answer for a turn that nothing is known of (any more)."""
    return NotFound(
        "there is no such turn in this session: its id is wrong, or it ended without a result and its log has expired",
        reason="TURN_NOT_FOUND",
    )
