"""An answer's claim on a decode rank: where its caches are to be, and what is reserved for it there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from seamount.router.account import Account
from seamount.router.directory import Role
from seamount.router.fetching import fetched
from seamount.router.placement import Need, PathRules, Placed, RankLoad, choose_decode_rank, is_far_worse
from seamount.router.rank_client import RankClient, Work
from seamount.router.ranks import Ranks
from seamount.v1 import worker_pb2
from seamount.wire.errors import DeadlineExceeded, ResourceExhausted, SeamountError, Unavailable
from seamount.wire.hashes import PAGE_SIZE
from seamount.wire.ids import Epoch, RankId, ReservationId, SessionId, TurnId

PLACEMENT_TIMEOUT_S = 30.0
"""How long a turn waits for a live decode rank: a killed gang is replaced in a few seconds."""
_CLOCK_SLACK_S = 0.05


@dataclass(slots=True, kw_only=True)
class Claim:
    """One rank and one reservation at a time. token_ids: what was sampled so far; ``Generation`` appends to it.
    deadline: by ``time.monotonic()``; the ranks are told.

    preferred, num_left: the decode rank that is believed to have the caches, and of how many tokens; num_below: of
    those, in tiers below its device, as it said when it was asked. excluded: ranks that were lost.
    """

    ranks: Ranks
    rules: PathRules
    session_id: SessionId
    turn_id: TurnId
    epoch: Epoch
    cache_salt: bytes
    prompt: Sequence[int]
    account: Account
    deadline: float
    preferred: RankId | None = None
    num_left: int = 0
    token_ids: list[int] = field(default_factory=list)
    num_below: int = 0
    attempt: int = 0
    rank: RankClient | None = None
    reservation_id: ReservationId | None = None
    excluded: set[RankId] = field(default_factory=set)
    _unclaimed: asyncio.Task[worker_pb2.ReserveResponse] | None = None
    """A Reserve whose answer nobody waited for: what it reserved must be released all the same."""
    _assigned: RankId | None = None

    @property
    def num_tokens(self) -> int:
        """The prompt's, and those sampled so far."""
        return len(self.prompt) + len(self.token_ids)

    def remaining_s(self) -> float:
        """Until the turn's deadline. Raises ``DeadlineExceeded`` where it has passed."""
        remaining_s = self.deadline - time.monotonic()
        if remaining_s < _CLOCK_SLACK_S:
            raise deadline_passed()
        return remaining_s

    def work(self) -> Work:
        return Work(
            session_id=self.session_id,
            turn_id=self.turn_id,
            epoch=self.epoch,
            attempt=self.attempt,
            cache_salt=self.cache_salt,
            token_ids=[*self.prompt, *self.token_ids],
        )

    async def stake(self) -> int:
        """Returns how many tokens' entries are at the decode rank now."""
        full: set[RankId] = set()
        may_choose_again = True
        self._look_for_holder()
        while True:
            placed = await self._place(full)
            rank_id = placed.rank.rank_id
            self.attempt += 1
            self.rank = self.ranks.client(rank_id)
            try:
                reserved = await self.renew()
            except ResourceExhausted:
                full.add(rank_id)
                if self._chosen(full) is None:
                    raise
                continue
            if rank_id == self.preferred and may_choose_again:
                may_choose_again = False
                believed, self.num_left = self._need(), reserved.cached_len
                self.num_below = reserved.num_host_tokens + reserved.num_disk_tokens
                again = self._chosen(full) if is_far_worse(believed, reserved.cached_len, self.rules) else None
                if again is not None and again.rank.rank_id != rank_id:
                    await self.release(None)
                    continue
            source = self.ranks.source(self.preferred) if rank_id != self.preferred else None
            self._note_reservation(placed.rank, reserved)
            if source is not None and placed.moves and self.num_left - reserved.cached_len >= PAGE_SIZE:
                return await self._migrate(source, reserved.cached_len)
            return reserved.cached_len

    async def adopt(self) -> None:
        """Reserve what an earlier epoch left at the preferred rank, for an answer of which nothing is left to compute.
        Best effort: such an answer needs no rank, its session's next turn does."""
        self._look_for_holder()
        load = self.ranks.source(self.preferred)
        if load is None:
            return
        self.attempt += 1
        with suppress(SeamountError):
            self.rank = self.ranks.client(load.rank_id)
            self._note_reservation(load, await self.renew())

    def _look_for_holder(self) -> None:
        """Where the preferred rank is gone, prefer one that says it has the session's caches."""
        if self.preferred is not None and self.ranks.source(self.preferred) is None:
            self.preferred = self.ranks.holder(self.session_id) or self.preferred

    async def _migrate(self, source: RankLoad, cached_len: int) -> int:
        """Let the decode rank fetch what ``source`` has; what does not come is computed. Returns the cached length."""
        assert self.rank is not None
        assert self.reservation_id is not None
        finished = await fetched(
            self.rank,
            source,
            reservation_id=self.reservation_id,
            epoch=self.epoch,
            remaining_s=self.remaining_s(),
        )
        if finished is not None:
            self.account.add_migration(finished)
            return finished.cached_len
        now_cached = (await self.renew()).cached_len
        self.account.num_migrated += max(0, now_cached - cached_len)
        return now_cached

    async def renew(self) -> worker_pb2.ReserveResponse:
        """Reserve at the decode rank, or renew and learn what has arrived. Cancelled: ``release`` sees to the rest."""
        assert self.rank is not None
        task = asyncio.create_task(self.rank.reserve(self.work()))
        try:
            reserved = await asyncio.shield(task)
        except asyncio.CancelledError:
            self._unclaimed = task
            raise
        self.reservation_id = ReservationId(reserved.reservation_id)  # a new one where the old one had ended
        return reserved

    def _note_reservation(self, load: RankLoad, reserved: worker_pb2.ReserveResponse) -> None:
        before = self.account.before
        self.account.add_reservation(
            load.rank_id,
            reserved,
            num_prompt=self.num_tokens,
            kv_bytes_per_token=load.kv_bytes_per_token,
            last_rank_is_alive=before is not None and self.ranks.source(RankId(before.last_rank)) is not None,
        )
        self.ranks.assign(load.rank_id, self.cache_salt)
        self._assigned = self.preferred = load.rank_id

    def _need(self) -> Need:
        return Need(
            num_tokens=self.num_tokens,
            home=self.preferred,
            num_home=min(self.num_left, self.num_tokens),
            num_below=self.num_below,
            tenant_weight=self.ranks.tenant_weight(self.cache_salt),
        )

    def _chosen(self, full: set[RankId]) -> Placed | None:
        return choose_decode_rank(
            self.ranks.loads(Role.DECODE),
            self._need(),
            source=self.ranks.source(self.preferred),
            prefills=self.ranks.loads(Role.PREFILL),
            rules=self.rules,
            excluded=self.excluded | full,
        )

    async def _place(self, full: set[RankId]) -> Placed:
        until = time.monotonic() + min(PLACEMENT_TIMEOUT_S, self.remaining_s())
        while True:
            placed = self._chosen(full)
            if placed is not None:
                return placed
            remaining_s = until - time.monotonic()
            if remaining_s <= 0:
                raise Unavailable("no decode rank is alive", reason="NO_DECODE_RANK", retry_after_s=2.0)
            self.excluded.clear()  # a restarted rank is a new one: its directory entry decides from now on
            await self.ranks.wait_for_change(min(remaining_s, 0.25))

    async def release(self, keep_len: int | None, *, reuse_len: int | None = None) -> None:
        """End the reservation, keeping the first ``keep_len`` cached tokens, of which the session's next prompt can
        begin with ``reuse_len`` at the most. Best effort: a reservation expires."""
        try:
            with suppress(SeamountError):
                if self._unclaimed is not None:
                    self.reservation_id = ReservationId((await self._unclaimed).reservation_id)
                if self.rank is not None and self.reservation_id is not None:
                    await self.rank.release(self.reservation_id, keep_len=keep_len, reuse_len=reuse_len)
        finally:
            self._unclaimed = None
            self.forget()

    def forget(self) -> None:
        """The reservation is over, whoever ended it."""
        if self._assigned is not None:
            self.ranks.unassign(self._assigned, self.cache_salt)
        self._assigned = self.reservation_id = None


def deadline_passed() -> DeadlineExceeded:
    """What a turn ends with when its time is over."""
    return DeadlineExceeded("the turn's deadline passed; set a longer one", reason="TURN_DEADLINE")
