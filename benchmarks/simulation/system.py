"""Turns of many sessions over some ranks, as a router runs them: placed, reserved, computed, leased, released.

Placement, path, tools' expected waits and leases are the system's own functions and objects. More pools, and gangs that
come and go, are more entries of ``ranks``: whoever scales adds and removes them between events.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from benchmarks.simulation.accounts import TurnAccount
from benchmarks.simulation.clock import Clock
from benchmarks.simulation.rank import Answer, Rank
from benchmarks.simulation.sessions import Session, shared_prefix
from benchmarks.simulation.traffic import SYSTEM_TOKENS, Plan
from seamount.router.history import common_len
from seamount.router.placement import Need, choose_decode_rank
from seamount.router.tool_waits import DEFAULT_WAIT_S, NUM_BUCKETS, bucket_of, quantile_s
from seamount.wire.errors import ResourceExhausted
from seamount.wire.ids import RankId
from seamount.wire.limits import MAX_RESERVATION_S, MAX_TOOL_WAIT_S
from seamount.workers.cache.retention import Importance

SALT = bytes(32)
FORK_DELAY_S = 0.2
KEEP_EVERY_S = 1.0


@dataclass(slots=True, kw_only=True)
class _Turn:
    """One turn at work. slot: the plans that follow its session's."""

    session: Session
    slot: Iterator[Plan]
    prompt: array[int]
    sampled: array[int]
    account: TurnAccount


@dataclass(slots=True, kw_only=True)
class System:
    """slots: plans that run one after the other in each, so that as many sessions live at a time; they start one by one
    within ``start_within_s``. leases: whether turns that end in tool calls ask for one."""

    clock: Clock
    ranks: dict[str, Rank]
    slots: list[Iterable[Plan]]
    start_within_s: float
    leases: bool = True
    turns: list[TurnAccount] = field(default_factory=list)
    sessions: dict[int, Session] = field(default_factory=dict)
    live: set[int] = field(default_factory=set)
    at_work: set[int] = field(default_factory=set)
    comes_at: dict[int, float] = field(default_factory=dict)
    """By session: when its next turn comes; for an order of eviction that knows the future."""
    left_at: dict[int, float] = field(default_factory=dict)
    """By session: when its last turn ended, or it was forked."""
    _waits: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0] * NUM_BUCKETS))
    _known_agents: set[int] = field(default_factory=set)

    def run(self, until_s: float) -> None:
        """Virtual seconds."""
        for number, plans in enumerate(self.slots):
            self.clock.at(self.start_within_s * number / len(self.slots), partial(self._next_session, iter(plans)))
        self._keep()
        self.clock.run(until_s)

    def _keep(self) -> None:
        for rank in self.ranks.values():
            rank.keep()
        self.clock.after(KEEP_EVERY_S, self._keep)

    def _next_session(self, slot: Iterator[Plan]) -> None:
        plan = next(slot, None)
        if plan is not None:
            kept = shared_prefix(plan.agent, SYSTEM_TOKENS[plan.agent])
            session = self._known(Session(number=len(self.sessions) + 1, plan=plan, kept=kept))
            self.clock.after(plan.starts_after_s, partial(self._come, session, slot))

    def _known(self, session: Session) -> Session:
        self.sessions[session.number] = session
        self.live.add(session.number)
        return session

    def _come(self, session: Session, slot: Iterator[Plan]) -> None:
        """The session's next turn has come."""
        self.at_work.add(session.number)
        step = session.step
        if step.tool and session.at:
            self._waits[step.tool][bucket_of(step.wait_s)] += 1
        left = session.context[:-1]  # the last sampled token was never fed back
        prompt, num_fresh = session.prompt()
        num_seen = common_len(left, prompt)
        if step.text is not None:
            num_seen = len(prompt) - num_fresh
        elif not left:
            num_seen = SYSTEM_TOKENS[session.plan.agent] if session.plan.agent in self._known_agents else 0
            num_fresh += SYSTEM_TOKENS[session.plan.agent] - num_seen
            self._known_agents.add(session.plan.agent)
        num_new = num_fresh + (num_seen == len(left) > 0)
        account = TurnAccount(
            session=session.name,
            tool=step.tool,
            came_at=self.clock.now,
            num_prompt=len(prompt),
            num_new=num_new,
            num_forced=max(0, len(prompt) - num_seen - num_new),
            num_seen=min(num_seen, len(prompt) - 1),
        )
        self.turns.append(account)
        sampled = session.fresh(step.num_reasoning + step.num_output)
        self._place(_Turn(session=session, slot=slot, prompt=prompt, sampled=sampled, account=account))

    def _place(self, turn: _Turn) -> None:
        session, account = turn.session, turn.account
        loads = [rank.load() for rank in self.ranks.values()]
        home = RankId(session.rank) if session.rank else None
        placed = choose_decode_rank(
            loads, Need(num_tokens=len(turn.prompt), home=home, num_home=account.num_seen if home is not None else 0)
        )
        assert placed is not None, "there is a rank"
        rank = self.ranks[placed.rank.rank_id]
        try:
            reservation = rank.caches.reserve(
                session_id=session.name,
                turn_id=str(session.at),
                epoch=session.at + 1,
                attempt=account.num_refused,
                salt=SALT,
                token_ids=turn.prompt,
                time_to_live_s=MAX_RESERVATION_S,
            )
        except ResourceExhausted as refusal:
            account.num_refused += 1
            self.clock.after(refusal.retry_after_s or 1.0, partial(self._place, turn))
            return
        session.rank = account.rank = rank.rank_id
        account.num_cached = reservation.cached_len
        account.num_restored = len(reservation.to_restore) * rank.caches.page_size
        answer = Answer(
            token_ids=turn.sampled,
            on_first_token=partial(self._first_token, account),
            on_end=partial(self._end, turn, rank, reservation.id),
        )
        self.clock.after(rank.costs.turn_s, partial(rank.submit, reservation, answer))

    def _first_token(self, account: TurnAccount) -> None:
        account.first_token_s = self.clock.now - account.came_at

    def _end(self, turn: _Turn, rank: Rank, reservation_id: str) -> None:
        session, now = turn.session, self.clock.now
        turn.account.ended_at = now
        self.at_work.discard(session.number)
        forks = session.step.forks
        session.answered(turn.prompt, turn.sampled)
        self.left_at[session.number] = now
        self.comes_at[session.number] = math.inf if session.is_over else now + session.step.wait_s
        if self.leases and not session.is_over and session.step.tool:
            self._wait_for_tool(session, rank)
        rank.caches.release(reservation_id, len(session.context), reuse_len=session.expected_reuse_len())
        if forks:
            child = self._known(session.fork(len(self.sessions) + 1, forks))
            self.left_at[child.number] = now
            self.comes_at[child.number] = now + FORK_DELAY_S
            self.clock.after(FORK_DELAY_S, partial(self._come, child, iter(())))
        if session.is_over:
            self.clock.after(session.plan.lingers_s, partial(self._close, session, turn.slot))
        else:
            self.clock.after(session.step.wait_s, partial(self._come, session, turn.slot))

    def _close(self, session: Session, slot: Iterator[Plan]) -> None:
        """Nobody waits for it any more: its client deletes it."""
        self.live.discard(session.number)
        if session.rank:
            self.ranks[session.rank].caches.sessions.delete(session.name, session.at + 1)
        self._next_session(slot)

    def _wait_for_tool(self, session: Session, rank: Rank) -> None:
        """The automatic lease of a turn that ends in a tool call."""
        expected_s = quantile_s(self._waits[session.step.tool]) or DEFAULT_WAIT_S
        rank.caches.sessions.retain(
            session.name,
            duration_s=min(expected_s, MAX_TOOL_WAIT_S),
            importance=Importance.LOW,
            prefill_tokens_per_s=rank.costs.prefill_tokens_per_s,
        )
