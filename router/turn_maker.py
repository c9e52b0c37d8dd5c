"""From a turn that holds its session to one that can run: prompt, parameters, generation, events, log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from seamount.router.account import Account
from seamount.router.begun_turn import BegunTurn
from seamount.router.claim import Claim
from seamount.router.context_policy import (
    TRIGGER_SHARE,
    Discards,
    context_policy_from_proto,
    discards_of,
    next_discards,
)
from seamount.router.events import TurnEvents, turn_events
from seamount.router.generation import Generation
from seamount.router.logged_turn import LoggedTurn, started_event
from seamount.router.messages import (
    ASKING_ROLES,
    Message,
    ThinkingMode,
    check_turn,
    thinking_mode_from_proto,
    tool_calls_from_proto,
)
from seamount.router.model import ServedModel
from seamount.router.moves import Moves
from seamount.router.parameters import fit_context
from seamount.router.parsing import OutputMode
from seamount.router.ranks import Ranks
from seamount.router.receipts import SessionBefore
from seamount.router.rendering import Rendering
from seamount.router.spec import RouterSpec
from seamount.router.token_log import START_ID, TokenLog
from seamount.router.turn import Turn
from seamount.router.turn_stream import TurnStream
from seamount.v1 import record_pb2
from seamount.wire.hashes import tenant_salt
from seamount.wire.ids import RankId


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """discarded_from: first position that differs for what this turn discarded, None where it discarded nothing;
    num_discarded: tokens by which it is shorter for that."""

    token_ids: list[int]
    discards: Discards
    discarded_from: int | None = None
    num_discarded: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnMaker:
    """What every turn of a router is made with."""

    spec: RouterSpec
    model: ServedModel
    ranks: Ranks
    rendering: Rendering
    token_log: TokenLog
    secret: bytes
    moves: Moves

    async def make(
        self,
        begun: BegunTurn,
        start: record_pb2.TurnStart,
        messages: Sequence[Message],
        *,
        deadline: float,
        logged: LoggedTurn | None = None,
    ) -> Turn:
        """deadline: by ``time.monotonic()``. logged: of a turn that is taken over: it goes on behind these tokens, and
        their events stand in its stream. Raises ``FailedPrecondition`` and ``InvalidArgument`` as ``check_turn`` and
        ``fit_context`` do."""
        session = begun.view.session
        mode, sampling = thinking_mode_from_proto(session.thinking_mode), start.sampling
        plan = check_turn(tool_calls_from_proto(session.pending_tool_calls), messages)
        if plan.generates and begun.view.last_rank:
            self.ranks.announce(RankId(begun.view.last_rank), begun.session_id)
        prompt = await self._prompt(begun, messages, mode, num_bytes=start.ByteSize(), generates=plan.generates)
        num_prompt = len(prompt.token_ids)
        room = fit_context(sampling, num_prompt_tokens=num_prompt, max_context_tokens=self.spec.max_context_tokens)
        logged = logged or LoggedTurn(start=start, end=START_ID)
        home = await self._home(begun, logged)
        generation = None
        if plan.generates:
            generation = Generation(
                claim=Claim(
                    ranks=self.ranks,
                    rules=self.spec.rules,
                    session_id=begun.session_id,
                    turn_id=begun.turn_id,
                    epoch=begun.epoch,
                    cache_salt=tenant_salt(self.secret, begun.tenant),
                    prompt=prompt.token_ids,
                    token_ids=list(logged.token_ids),
                    account=Account(started=time.monotonic(), before=self._before(begun, messages, prompt, home)),
                    deadline=deadline,
                    preferred=home,
                    num_left=num_prompt + len(logged.token_ids) if logged.decode_rank else session.num_context_tokens,
                ),
                sampling=room,
                max_attempts=self.spec.max_attempts,
                eos_token_id=self.model.tokenizer.eos_token_id,
                forced_token_ids=start.forced_token_ids,
            )
        events = TurnEvents(begun.turn_id, None)
        if plan.generates:
            events = turn_events(begun.turn_id, OutputMode.of(mode), sampling, self.model.tokenizer)
        stream = TurnStream()
        if logged.num_prompt_tokens:
            stream.append([started_event(events, session, logged)])
            stream.append(events.tokens(logged.token_ids, logged.logprobs) if logged.token_ids else ())
        return Turn(
            begun=begun,
            input=list(start.input),
            plan=plan,
            mode=mode,
            model=self.model.name,
            sampling=sampling,
            num_prompt_tokens=logged.num_prompt_tokens or num_prompt,
            discards=prompt.discards,
            generation=generation,
            events=events,
            deadline=deadline,
            log=self.token_log.open(begun, stream.append, end=logged.end, num_tokens=len(logged.token_ids)),
            stream=stream,
            logprobs=list(logged.logprobs),
        )

    async def _prompt(
        self, begun: BegunTurn, messages: Sequence[Message], mode: ThinkingMode, *, num_bytes: int, generates: bool
    ) -> _Prompt:
        """The prompt, shortened by the session's context policy where it fills too much of the context."""
        whole = await self.rendering.prompt(begun.records, messages, mode, num_bytes=num_bytes)
        kept = _Prompt(token_ids=whole, discards=discards_of(begun.records))
        if not generates or len(whole) <= TRIGGER_SHARE * self.spec.max_context_tokens:
            return kept
        policy = context_policy_from_proto(begun.view.session.context_policy)
        discards = next_discards(policy, begun.records, messages)
        if discards is None:
            return kept
        shorter = await self.rendering.prompt(begun.records, messages, mode, num_bytes=num_bytes, discards=discards)
        if len(shorter) >= len(whole):
            return kept
        return _Prompt(
            token_ids=shorter,
            discards=discards,
            discarded_from=next((i for i, one in enumerate(shorter) if one != whole[i]), len(shorter)),
            num_discarded=len(whole) - len(shorter),
        )

    async def _home(self, begun: BegunTurn, logged: LoggedTurn) -> RankId | None:
        """The decode rank that is believed to have the session's caches; None where it never had any."""
        rank_id = RankId(logged.decode_rank or begun.view.last_rank)
        if rank_id and (self.ranks.source(rank_id) is None or self.ranks.is_leaving(rank_id)):
            return await self.moves.find(begun.session_id) or rank_id
        return rank_id or None

    def _before(
        self, begun: BegunTurn, messages: Sequence[Message], prompt: _Prompt, home: RankId | None
    ) -> SessionBefore:
        session = begun.view.session
        outputs = [record for record in begun.records if record.HasField("output")]
        asks = any(message.role in ASKING_ROLES for message in messages)
        return SessionBefore(
            is_new=not begun.records,
            is_fork=session.HasField("forked_from") and session.head == session.forked_from.at_turn,
            last_rank=home or "",
            is_reencoded=any(record.fingerprint != self.model.fingerprint for record in outputs),
            cuts_reasoning=asks and any(record.output.num_reasoning_tokens for record in outputs),
            discarded_from=prompt.discarded_from,
            num_discarded=prompt.num_discarded,
            lease=begun.view.lease.lease if begun.view.lease is not None else None,
        )
