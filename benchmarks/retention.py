"""What eviction and leases cost and save: sessions of agents in virtual time over the real caches of one rank.

Real: reservations, prefix tree, eviction, leases, and the estimate of tools' waits. Made up: the sessions (appended
tokens, tool waits and pauses are heavy-tailed, a person's message cuts the reasoning before it) and the time of a turn
(a prefill and a decode rate). Nothing is computed. The same sessions run four ways; think time is kept, so a turn that
is refused or late delays what follows it.

recomputed: tokens that the session had left here and that were computed again. Where a rank has no pages for a turn, it
comes again after the time that the refusal names.

    python -m benchmarks.retention                     the table of docs/performance.md
    python -m benchmarks.retention --sessions 20       a quick look
"""

from __future__ import annotations

import heapq
import itertools
import random
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal
from unittest import mock

import typer

from benchmarks._report import Row, load_average, publish
from seamount.router.tool_waits import DEFAULT_WAIT_S, NUM_BUCKETS, bucket_of, quantile_s
from seamount.wire.errors import ResourceExhausted
from seamount.wire.hashes import PAGE_SIZE
from seamount.wire.limits import MAX_RESERVATION_S, MAX_TOOL_WAIT_S
from seamount.workers.cache import eviction_order
from seamount.workers.cache.reservation import common_prefix_len
from seamount.workers.cache.reservations import Reservations
from seamount.workers.cache.retention import Candidate, Importance, LeaseOutcome, eviction_key

PREFILL_TOKENS_PER_S, DECODE_TOKENS_PER_S = 8_000.0, 50.0
SYSTEM_TOKENS = 1_000
MAX_PROMPT_TOKENS = 30_000
TOOLS = {"read": (0.3, 1.0, 0.6), "build": (20.0, 0.8, 0.3), "deploy": (150.0, 0.4, 0.1)}
"""Median wait in seconds, sigma of its logarithm, share of the calls."""
Leases = Literal["none", "estimated", "reported"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One turn. wait_s: before it, since the end of the one before. tool: whose results it brings, '' for a person."""

    tool: str
    wait_s: float
    num_appended: int
    num_reasoning: int
    num_output: int


def steps_of(rng: random.Random) -> list[Step]:
    """A session: requests of a person, each followed by some tool calls."""
    steps: list[Step] = []
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        steps.append(_step(rng, "", rng.lognormvariate(4.5, 1.0)))
        for _ in range(min(40, int(rng.paretovariate(1.2) * 3))):
            (tool,) = rng.choices(list(TOOLS), weights=[share for *_, share in TOOLS.values()])
            median_s, sigma, _ = TOOLS[tool]
            steps.append(_step(rng, tool, min(MAX_TOOL_WAIT_S, median_s * rng.lognormvariate(0.0, sigma))))
    return steps


def _step(rng: random.Random, tool: str, wait_s: float) -> Step:
    return Step(
        tool=tool,
        wait_s=wait_s,
        num_appended=min(8_000, 1 + int(rng.lognormvariate(6.3, 1.1))),
        num_reasoning=rng.randrange(20, 200),
        num_output=rng.randrange(20, 200),
    )


@dataclass(slots=True, kw_only=True)
class Session:
    """kept: what the next prompt begins with; thoughts: the same with the reasoning since the last person's message;
    left: tokens that the caches were given."""

    name: str
    steps: list[Step]
    fresh: Iterator[int]
    kept: list[int]
    thoughts: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    at: int = 0

    def prompt(self) -> list[int]:
        step = self.steps[self.at]
        if not step.tool:
            self.thoughts = self.kept.copy()
        return self.thoughts + list(itertools.islice(self.fresh, step.num_appended))

    def answered(self, prompt: list[int]) -> list[int]:
        """All that the caches hold after the turn."""
        step = self.steps[self.at]
        reasoning = list(itertools.islice(self.fresh, step.num_reasoning))
        output = list(itertools.islice(self.fresh, step.num_output))
        self.kept += prompt[len(self.thoughts) :] + output
        self.thoughts = [*prompt, *reasoning, *output]
        self.at += 1
        return self.thoughts


@dataclass(slots=True, kw_only=True)
class Run:
    """One rank under the sessions; ``now`` moves from event to event."""

    leases: Leases
    num_pages: int
    now: float = 0.0
    num_recomputed: int = 0
    num_new: int = 0
    num_refused: int = 0
    waited_s: float = 0.0
    outcomes: dict[LeaseOutcome, int] = field(default_factory=lambda: defaultdict(int))
    waits: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0] * NUM_BUCKETS))
    caches: Reservations = field(init=False)
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    order: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.caches = Reservations(num_pages=self.num_pages, fingerprint="f", layout="l", clock=lambda: self.now)

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (time_s, next(self.order), event))

    def run(self) -> None:
        while self.events:
            self.now, _, event = heapq.heappop(self.events)
            self.caches.expire()
            event()
        self.caches.check_invariants()

    def begin(self, session: Session, prompt: list[int], came_at: float) -> None:
        step = session.steps[session.at]
        num_room = len(prompt) + step.num_reasoning + step.num_output
        try:
            reservation = self.caches.reserve(
                session_id=session.name,
                turn_id=str(session.at),
                epoch=session.at + 1,
                attempt=next(self.order),
                salt=bytes(32),
                token_ids=prompt,
                time_to_live_s=MAX_RESERVATION_S,
            )
            if not self.caches.ensure_capacity(reservation.id, num_room):
                self.caches.release(reservation.id)
                raise ResourceExhausted("no pages for the answer", reason="NO_PAGES", retry_after_s=1.0)
        except ResourceExhausted as refusal:
            self.num_refused += 1
            self.at(self.now + (refusal.retry_after_s or 1.0), lambda: self.begin(session, prompt, came_at))
            return
        self.waited_s += self.now - came_at
        num_known = common_prefix_len(array("I", session.left), array("I", prompt))
        self.num_recomputed += max(0, num_known - reservation.cached_len)
        self.num_new += len(prompt) - max(num_known, reservation.cached_len)
        self.caches.advance(reservation.id, len(prompt))
        computed_s = (len(prompt) - reservation.cached_len) / PREFILL_TOKENS_PER_S
        ends_at = self.now + computed_s + (step.num_reasoning + step.num_output) / DECODE_TOKENS_PER_S
        self.at(ends_at, lambda: self.end(session, reservation.id, prompt))

    def end(self, session: Session, reservation_id: str, prompt: list[int]) -> None:
        session.left = session.answered(prompt)
        for token_id in session.left[len(prompt) :]:
            self.caches.append_token(reservation_id, token_id)
        self.caches.advance(reservation_id, len(session.left))
        following = session.steps[session.at] if session.at < len(session.steps) else None
        if following is not None and following.tool and self.leases != "none":
            self.retain(session, following)
        self.caches.release(reservation_id, len(session.left))
        if following is None or len(session.left) + following.num_appended > MAX_PROMPT_TOKENS:
            return
        comes_at = self.now + following.wait_s
        if following.tool:
            self.at(comes_at, lambda: self.count(following))
        self.at(comes_at, lambda: self.begin(session, session.prompt(), comes_at))

    def retain(self, session: Session, following: Step) -> None:
        if self.leases == "reported":  # a client that knows its tools
            duration_s, importance = following.wait_s + 0.1, Importance.NORMAL
        else:
            duration_s, importance = quantile_s(self.waits[following.tool]) or DEFAULT_WAIT_S, Importance.LOW
        duration_s = min(duration_s, MAX_TOOL_WAIT_S)
        decision = self.caches.sessions.retain(
            session.name,
            duration_s=duration_s,
            importance=importance,
            prefill_tokens_per_s=PREFILL_TOKENS_PER_S,
        )
        self.outcomes[decision.outcome] += 1

    def count(self, step: Step) -> None:
        self.waits[step.tool][bucket_of(step.wait_s)] += 1


def least_recently_used(page: Candidate) -> tuple[bool, float]:
    """The order that most systems use."""
    return True, -page.idle_s


def measured(way: str, num_sessions: int, num_pages: int, seed: int) -> Row:
    """One way through the sessions of a seed."""
    order = least_recently_used if way == "LRU" else eviction_key
    leases: dict[str, Leases] = {"cost, estimated leases": "estimated", "cost, reported leases": "reported"}
    run = Run(leases=leases.get(way, "none"), num_pages=num_pages)
    rng = random.Random(seed)
    shared, come_s = list(range(SYSTEM_TOKENS)), 0.0
    for number in range(num_sessions):
        fresh = itertools.count(SYSTEM_TOKENS + (number << 17))
        session = Session(name=f"s{number}", steps=steps_of(rng), fresh=fresh, kept=shared.copy())
        come_s += rng.expovariate(1 / 15.0)
        run.at(come_s, lambda one=session, at=come_s: run.begin(one, one.prompt(), at))  # type: ignore[misc]
    with mock.patch.object(eviction_order, "eviction_key", order):
        run.run()
    num_asked = sum(run.outcomes.values())
    return {
        "pages": num_pages,
        "way": way,
        "recomputed": run.num_recomputed,
        "new": run.num_new,
        "amplification": (run.num_recomputed + run.num_new) / run.num_new,
        "refused": run.num_refused,
        "waited s": run.waited_s,
        "leases": num_asked,
        "accepted": run.outcomes[LeaseOutcome.ACCEPTED],
        "clipped": run.outcomes[LeaseOutcome.CLIPPED],
        "denied": run.outcomes[LeaseOutcome.DENIED],
    }


def main(
    sessions: Annotated[int, typer.Option(help="sessions that come one after the other, 15 s apart on average")] = 100,
    pages: Annotated[list[int], typer.Option(help="pages of the rank; once for each size")] = [1_500, 3_000],  # noqa: B006
    seed: Annotated[int, typer.Option(help="of the sessions")] = 1,
    json: Annotated[bool, typer.Option("--json", help="print JSON Lines")] = False,
) -> None:
    """Recomputed tokens by the order of eviction and by leases."""
    load = load_average()
    ways = ("LRU", "cost", "cost, estimated leases", "cost, reported leases")
    rows = [measured(way, sessions, num_pages, seed) for num_pages in pages for way in ways]
    publish("retention", rows, as_json=json, load=load, constants={"page_size": float(PAGE_SIZE)})


if __name__ == "__main__":
    typer.run(main)
