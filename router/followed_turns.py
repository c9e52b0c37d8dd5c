"""Turns that are told here without running here: live from their logs, or again from the history."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from seamount.router.log_follower import LogFollower, turn_not_found
from seamount.router.logged_turn import LoggedTurn
from seamount.router.model import ServedModel
from seamount.router.rendering import Rendering
from seamount.router.replay import replayed_events
from seamount.router.session_view import ReplayedTurn
from seamount.router.sessions import Sessions
from seamount.router.turn_stream import TurnStream
from seamount.wire.ids import SessionId, TenantId, TurnId


@dataclass(slots=True, kw_only=True)
class FollowedTurns:
    """Of one router; one stream a turn, whoever follows it. ``stop`` at the end."""

    model: ServedModel
    sessions: Sessions
    rendering: Rendering
    _live: dict[TurnId, TurnStream] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def live(self, tenant: TenantId, session_id: SessionId, turn_id: TurnId) -> TurnStream:
        """The stream of a turn that runs at another router, or at none just now."""
        stream = self._live.get(turn_id)
        return stream or self._follow(tenant, session_id, turn_id, TurnStream(), LoggedTurn())

    def go_on(self, tenant: TenantId, session_id: SessionId, turn_id: TurnId, stream: TurnStream) -> None:
        """A turn of this router is another's now: those who follow its stream here are told the rest all the same."""
        self._follow(tenant, session_id, turn_id, stream, LoggedTurn())

    async def ended(self, tenant: TenantId, session_id: SessionId, turn_id: TurnId) -> TurnStream:
        """The stream of a turn that does not run any more. Raises ``NotFound`` where nothing is known of it."""
        logged = LoggedTurn()
        logged.take(await self.sessions.read_log(tenant, session_id, turn_id))
        if logged.is_over:
            return self._follow(tenant, session_id, turn_id, TurnStream(), logged)
        view, history = await self.sessions.read(tenant, session_id)
        for record in reversed(history.records):
            if record.turn_id == turn_id:
                replayed = ReplayedTurn(turn_id=turn_id, record=record, final_event=record.final_event, view=view)
                return await self.replay(tenant, session_id, replayed)
        raise turn_not_found()

    async def replay(self, tenant: TenantId, session_id: SessionId, replayed: ReplayedTurn) -> TurnStream:
        """The same events as the first time, from the stored ids; nothing is computed. Of a turn that ended without a
        commit, whose log has expired, the last event alone."""
        record, tokenizer = replayed.record, self.model.tokenizer
        if record is None:
            logged = LoggedTurn()
            logged.take(await self.sessions.read_log(tenant, session_id, replayed.turn_id))
            if logged.is_over:
                return self._follow(tenant, session_id, replayed.turn_id, TurnStream(), logged)
            stream = TurnStream(num_forgotten=replayed.final_event.sequence - 1)
            stream.append([replayed.final_event])
        else:
            stream = TurnStream()
            told = await self.rendering.run(
                record.output.ByteSize(), lambda: replayed_events(replayed, record, tokenizer)
            )
            stream.append(told)
        stream.close()
        return stream

    async def stop(self) -> None:
        """End every stream that is still told."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _follow(
        self, tenant: TenantId, session_id: SessionId, turn_id: TurnId, stream: TurnStream, logged: LoggedTurn
    ) -> TurnStream:
        follower = LogFollower(
            sessions=self.sessions,
            tokenizer=self.model.tokenizer,
            tenant=tenant,
            session_id=session_id,
            turn_id=turn_id,
            stream=stream,
            logged=logged,
        )
        self._live[turn_id] = stream
        task = asyncio.create_task(follower.run(), name=f"follow {turn_id}")
        self._tasks.add(task)

        def forget(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            if self._live.get(turn_id) is stream:
                del self._live[turn_id]

        task.add_done_callback(forget)
        return stream
