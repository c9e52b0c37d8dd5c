"""``AsyncClient``: typed calls of a router, each with a deadline, repeated where that is safe."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from seamount.router.client_calls import Calls
from seamount.router.client_routers import Tls
from seamount.router.client_turn import Frame, Retries, Seen, TurnStream
from seamount.router.client_values import History, Sampling
from seamount.router.context_policy import ContextPolicy
from seamount.router.messages import Message, ThinkingMode, message_to_proto, messages_from_proto
from seamount.v1 import admin_pb2, common_pb2, events_pb2, inference_pb2, session_pb2, worker_pb2
from seamount.wire.durations import duration

DEFAULT_TIMEOUT_S = 10.0
"""Of a call that answers once."""
DEFAULT_STREAM_TIMEOUT_S = 900.0
"""Of a stream whose turn names no deadline of its own."""
_STREAM_SLACK_S = 5.0


class AsyncClient:
    """Belongs to one event loop. Close it, or use it in ``async with``.

    address: host:port of a router, or several, separated by commas: where one does not answer, the next one is asked,
    and a turn's stream goes on there. api_key: None where the deployment has no key file. tls: None = plain text.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: Retries | None = None,
    ) -> None:
        self.address = address
        self._calls = Calls(address, api_key=api_key, tls=tls, timeout_s=timeout_s, retries=retries or Retries())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End every call and the connections."""
        await self._calls.close()

    # --- sessions

    async def create_session(
        self,
        *,
        model: str = "",
        thinking_mode: ThinkingMode = ThinkingMode.THINKING,
        defaults: Sampling | None = None,
        context_policy: ContextPolicy = ContextPolicy.ERROR,
        idempotency_key: str | None = None,
    ) -> session_pb2.Session:
        """A new session, or the one that this key made before. model: empty = the deployment's. context_policy: what
        prompts leave out once they fill more than 80% of the context."""
        request = session_pb2.CreateSessionRequest(
            idempotency_key=_key(idempotency_key),
            model=model,
            thinking_mode=common_pb2.ThinkingMode.Name(thinking_mode.value),
            defaults=_proto(defaults),
            context_policy=context_policy.to_proto(),
        )
        return (await self._calls.once(lambda to: to.sessions.CreateSession, request)).session

    async def update_session(
        self, session_id: str, *, context_policy: ContextPolicy, idempotency_key: str | None = None
    ) -> session_pb2.Session:
        """Change the session from its next turn on. Raises ``Aborted`` while a turn runs."""
        request = session_pb2.UpdateSessionRequest(
            session_id=session_id,
            idempotency_key=_key(idempotency_key),
            context_policy=context_policy.to_proto(),
        )
        return (await self._calls.once(lambda to: to.sessions.UpdateSession, request)).session

    async def get_session(self, session_id: str) -> session_pb2.Session:
        """Raises ``NotFound``, also for another tenant's session."""
        request = session_pb2.GetSessionRequest(session_id=session_id)
        return (await self._calls.once(lambda to: to.sessions.GetSession, request)).session

    async def get_history(self, session_id: str) -> History:
        """The session with the messages of every committed turn. Raises as ``get_session`` does."""
        request = session_pb2.GetSessionRequest(session_id=session_id, include_messages=True)
        answer = await self._calls.once(lambda to: to.sessions.GetSession, request)
        return History(
            session=answer.session, messages=messages_from_proto(answer.messages), receipts=tuple(answer.receipts)
        )

    async def list_sessions(self, *, page_size: int = 0, page_token: str = "") -> tuple[list[session_pb2.Session], str]:
        """One page and the token of the next one (empty at the end). page_size: 0 = the server's choice."""
        request = session_pb2.ListSessionsRequest(page_size=page_size, page_token=page_token)
        answer = await self._calls.once(lambda to: to.sessions.ListSessions, request)
        return list(answer.sessions), answer.next_page_token

    async def delete_session(self, session_id: str) -> None:
        """Repeating it is harmless."""
        await self._calls.once(
            lambda to: to.sessions.DeleteSession, session_pb2.DeleteSessionRequest(session_id=session_id)
        )

    async def fork_session(
        self, session_id: str, *, at_turn: int | None = None, idempotency_key: str | None = None
    ) -> session_pb2.Session:
        """A new session that begins with another one's first turns. at_turn: how many; None = all committed ones.

        The two share what is cached of them, and nothing else from then on.
        """
        request = session_pb2.ForkSessionRequest(
            idempotency_key=_key(idempotency_key), session_id=session_id, at_turn=at_turn
        )
        return (await self._calls.once(lambda to: to.sessions.ForkSession, request)).session

    def run_turn(
        self,
        session_id: str,
        messages: Sequence[Message],
        *,
        sampling: Sampling | None = None,
        expected_head: int | None = None,
        deadline_s: float | None = None,
        idempotency_key: str | None = None,
        cancel_on_disconnect: bool = False,
    ) -> TurnStream:
        """Append messages and, unless the last one is the assistant's, generate the answer.

        deadline_s: of the turn, on the server; None = the deployment's. idempotency_key: the same one again, with the
        same messages, gets the first result; None = a fresh one for this stream and its own retries.
        cancel_on_disconnect: the turn ends with its last stream, instead of finishing for whoever resumes it.
        """
        request = session_pb2.RunTurnRequest(
            session_id=session_id,
            idempotency_key=_key(idempotency_key),
            messages=[message_to_proto(message) for message in messages],
            sampling=_proto(sampling),
            expected_head=expected_head,
            on_disconnect=session_pb2.DISCONNECT_POLICY_CANCEL
            if cancel_on_disconnect
            else session_pb2.DISCONNECT_POLICY_FINISH,
        )
        timeout_s = DEFAULT_STREAM_TIMEOUT_S
        if deadline_s is not None:
            request.deadline.CopyFrom(duration(deadline_s))
            timeout_s = deadline_s + _STREAM_SLACK_S

        return TurnStream(self._session_frames(session_id, timeout_s, request), self._calls.retries)

    def resume_turn(
        self,
        session_id: str,
        turn_id: str,
        *,
        after_sequence: int = 0,
        timeout_s: float = DEFAULT_STREAM_TIMEOUT_S,
    ) -> TurnStream:
        """The events of a turn after one that was seen, then those to come; ``result()`` sums up these alone.

        Raises ``NotFound`` for an unknown turn, and for one that ended without a result when its log had expired.
        """

        seen = Seen(turn_id=turn_id, sequence=after_sequence)
        return TurnStream(self._session_frames(session_id, timeout_s), self._calls.retries, seen=seen)

    def _session_frames(
        self, session_id: str, timeout_s: float, run: session_pb2.RunTurnRequest | None = None
    ) -> Callable[[Seen], AsyncGenerator[Frame, None]]:
        """Run, and from the first event on resume; all calls together take at most ``timeout_s``."""
        until = time.monotonic() + timeout_s

        async def frames(seen: Seen) -> AsyncGenerator[Frame, None]:
            left_s = max(0.0, until - time.monotonic())
            if run is None or seen.turn_id:
                async with aclosing(self._resumed(session_id, seen, left_s)) as resumed:
                    async for told in resumed:
                        yield told.events, ()
                return
            calls = self._calls.stream(
                lambda to: to.sessions.RunTurn(run, metadata=self._calls.metadata, timeout=left_s)
            )
            async with aclosing(calls) as answers:
                async for answer in answers:
                    yield answer.events, ()

        return frames

    def _resumed(
        self, session_id: str, seen: Seen, timeout_s: float
    ) -> AsyncGenerator[session_pb2.ResumeTurnResponse, None]:
        request = session_pb2.ResumeTurnRequest(
            session_id=session_id, turn_id=seen.turn_id, after_sequence=seen.sequence
        )
        return self._calls.stream(
            lambda to: to.sessions.ResumeTurn(request, metadata=self._calls.metadata, timeout=timeout_s)
        )

    async def cancel_turn(self, session_id: str, turn_id: str = "") -> bool:
        """Whether such a turn was running. turn_id: empty = whichever runs, and then not retried."""
        request = session_pb2.CancelTurnRequest(session_id=session_id, turn_id=turn_id)
        answer = await self._calls.once(lambda to: to.sessions.CancelTurn, request, repeatable=bool(turn_id))
        return answer.cancelled

    async def report_tool_wait(
        self,
        session_id: str,
        expected_s: float,
        *,
        importance: common_pb2.LeaseImportance = common_pb2.LEASE_IMPORTANCE_NORMAL,
    ) -> events_pb2.Lease:
        """Ask that the caches are kept until the tools' results come, ``expected_s`` from now; at most an hour."""
        request = session_pb2.ReportToolWaitRequest(
            session_id=session_id, expected=duration(expected_s), importance=importance
        )
        return (await self._calls.once(lambda to: to.sessions.ReportToolWait, request)).lease

    # --- stateless

    def generate(
        self,
        prompt: Sequence[Message] | Sequence[int],
        *,
        model: str = "",
        thinking_mode: ThinkingMode = ThinkingMode.THINKING,
        sampling: Sampling | None = None,
        timeout_s: float = DEFAULT_STREAM_TIMEOUT_S,
    ) -> TurnStream:
        """Answer messages, or continue token ids, without a session. Never retried; ends with its stream."""
        request = inference_pb2.GenerateRequest(model=model, sampling=_proto(sampling))
        if prompt and all(isinstance(part, int) for part in prompt):
            request.token_ids.token_ids.extend(part for part in prompt if isinstance(part, int))
        else:
            request.messages.CopyFrom(_messages(prompt, thinking_mode))

        async def frames(_: Seen) -> AsyncGenerator[Frame, None]:
            calls = self._calls.stream(
                lambda to: to.inference.Generate(request, metadata=self._calls.metadata, timeout=timeout_s)
            )
            async with aclosing(calls) as answers:
                async for answer in answers:
                    yield answer.events, answer.token_ids

        return TurnStream(frames, Retries(max_attempts=1, resume_for_s=0.0))

    async def tokenize(
        self,
        text: str | Sequence[Message],
        *,
        model: str = "",
        thinking_mode: ThinkingMode = ThinkingMode.THINKING,
    ) -> list[int]:
        """Ids of plain text (control literals in it stay text), or of messages as the model would see them."""
        request = inference_pb2.TokenizeRequest(model=model)
        if isinstance(text, str):
            request.text = text
        else:
            request.messages.CopyFrom(_messages(text, thinking_mode))
        return list((await self._calls.once(lambda to: to.inference.Tokenize, request)).token_ids)

    async def list_models(self) -> list[inference_pb2.Model]:
        return list(
            (await self._calls.once(lambda to: to.inference.ListModels, inference_pb2.ListModelsRequest())).models
        )

    # --- operators

    async def list_pools(self) -> list[admin_pb2.PoolState]:
        return list((await self._calls.once(lambda to: to.admin.ListPools, admin_pb2.ListPoolsRequest())).pools)

    async def list_ranks(self, pool: worker_pb2.Pool = worker_pb2.POOL_UNSPECIFIED) -> list[admin_pb2.Rank]:
        """pool: unspecified = all."""
        return list(
            (await self._calls.once(lambda to: to.admin.ListRanks, admin_pb2.ListRanksRequest(pool=pool))).ranks
        )

    async def list_rank_sessions(self, rank_id: str) -> list[str]:
        request = admin_pb2.ListRankSessionsRequest(rank_id=rank_id)
        return list((await self._calls.once(lambda to: to.admin.ListRankSessions, request)).session_ids)

    async def drain_rank(self, rank_id: str, *, timeout_s: float) -> admin_pb2.DrainRankResponse:
        """Empty a decode rank, for at most ``timeout_s``; repeating it goes on."""
        request = admin_pb2.DrainRankRequest(rank_id=rank_id)
        return await self._calls.once(lambda to: to.admin.DrainRank, request, timeout_s=timeout_s)


def _key(given: str | None) -> str:
    return uuid.uuid4().hex if given is None else given


def _proto(sampling: Sampling | None) -> common_pb2.SamplingParameters | None:
    return None if sampling is None else sampling.to_proto()


def _messages(messages: Sequence[Any], thinking_mode: ThinkingMode) -> inference_pb2.Messages:
    return inference_pb2.Messages(
        messages=[message_to_proto(message) for message in messages],
        thinking_mode=common_pb2.ThinkingMode.Name(thinking_mode.value),
    )
