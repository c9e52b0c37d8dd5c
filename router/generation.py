"""The tokens of one answer: placed, reserved, prefilled and sampled, whatever dies on the way.

The router orchestrates, so every failure is handled here: a prefill rank that dies costs time (``Reserve`` again tells
what arrived, another prefill rank or a local append does the rest); a decode rank that dies is replaced by another one,
whose prompt is the prompt and the tokens so far, and whose draws go on at the next output index.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from google.protobuf import duration_pb2

from seamount.router.directory import Role
from seamount.router.placement import PathRules, RankLoad, choose_decode_rank, choose_path
from seamount.router.rank_client import RankClient, RankLost, Work
from seamount.router.ranks import Ranks
from seamount.v1 import common_pb2, events_pb2, worker_pb2
from seamount.wire import limits
from seamount.wire.errors import ResourceExhausted, SeamountError, Unavailable
from seamount.wire.ids import Epoch, RankId, ReservationId, SessionId, TurnId

PLACEMENT_TIMEOUT_S = 30.0
"""How long a turn waits for a live decode rank: a killed gang is replaced in a few seconds."""
RENEW_EVERY_S = limits.MAX_RESERVATION_S / 3


@dataclass(slots=True, kw_only=True)
class Account:
    """What the generation cost so far; becomes the receipt."""

    started: float
    num_cached: int = 0
    num_decode_computed: int = 0
    num_prefill_computed: int = 0
    num_pulled: int = 0
    num_pushed: int = 0
    common_len: int = 0
    decode_rank: str = ""
    prefill_rank: str = ""
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    num_retries: int = 0

    def receipt(self, *, num_prompt: int, num_output: int) -> events_pb2.Receipt:
        """The receipt as of now."""
        remote = bool(self.prefill_rank)
        receipt = events_pb2.Receipt(
            num_prompt_tokens=num_prompt,
            num_cached_tokens=self.num_cached,
            num_decode_computed_tokens=self.num_decode_computed,
            num_prefill_computed_tokens=self.num_prefill_computed,
            num_pulled_tokens=self.num_pulled,
            num_pushed_tokens=self.num_pushed,
            num_output_tokens=num_output,
            path=events_pb2.PREFILL_PATH_REMOTE if remote else events_pb2.PREFILL_PATH_LOCAL,
            decode_rank=self.decode_rank,
            prefill_rank=self.prefill_rank,
            first_differing_position=self.common_len,
            queue_time=_duration(self.queue_s),
            prefill_time=_duration(self.prefill_s),
            time_to_first_token=_duration(self.first_token_s),
            decode_time=_duration(self.decode_s),
            num_retries=self.num_retries,
        )
        receipt.finished_at.GetCurrentTime()
        return receipt


@dataclass(slots=True, kw_only=True)
class Generation:
    """One answer in the making. ``token_ids`` grows as batches are yielded."""

    ranks: Ranks
    rules: PathRules
    session_id: SessionId
    turn_id: TurnId
    epoch: Epoch
    cache_salt: bytes
    prompt: Sequence[int]
    sampling: worker_pb2.ResolvedSampling
    preferred: RankId | None
    account: Account
    max_attempts: int
    forced_token_ids: Sequence[int] = ()
    token_ids: list[int] = field(default_factory=list)
    _attempt: int = 0
    _decode: RankClient | None = None
    _reservation_id: ReservationId | None = None
    _excluded: set[RankId] = field(default_factory=set)

    @property
    def decode_rank(self) -> RankId | None:
        """Where the caches of this answer are."""
        return self._decode.rank_id if self._decode else None

    async def batches(self) -> AsyncGenerator[worker_pb2.TokenBatch | worker_pb2.GenerateFinished, None]:
        """Token batches in order, then ``GenerateFinished``.

        Raises ``Unavailable`` after ``max_attempts`` lost ranks or where no decode rank lives, ``ResourceExhausted``
        where none has room, and a rank's own typed error.
        """
        while True:
            try:
                reserved = await self._reserve_somewhere()
                await self._prefill_remotely(reserved.cached_len)
                async with aclosing(self._sample()) as frames:
                    async for frame in frames:
                        yield frame
                return
            except RankLost as lost:
                self._give_up_rank(lost)

    async def release(self, keep_len: int | None) -> None:
        """End the reservation, keeping the first ``keep_len`` cached tokens. Best effort: a reservation expires."""
        decode, reservation_id = self._decode, self._reservation_id
        if decode is not None and reservation_id is not None:
            self._forget_reservation()
            with suppress(SeamountError):
                await decode.release(reservation_id, keep_len=keep_len)

    def _forget_reservation(self) -> None:
        if self._decode is not None and self._reservation_id is not None:
            self.ranks.unassign(self._decode.rank_id)
        self._reservation_id = None

    def _work(self) -> Work:
        return Work(
            session_id=self.session_id,
            turn_id=self.turn_id,
            epoch=self.epoch,
            attempt=self._attempt,
            cache_salt=self.cache_salt,
            token_ids=[*self.prompt, *self.token_ids],
        )

    async def _reserve_somewhere(self) -> worker_pb2.ReserveResponse:
        full: set[RankId] = set()
        while True:
            load = await self._place(full)
            self._attempt += 1
            self._decode = self.ranks.client(load.rank_id)
            try:
                reserved = await self._decode.reserve(self._work())
            except ResourceExhausted:
                full.add(load.rank_id)
                if choose_decode_rank(self.ranks.loads(Role.DECODE), preferred=None, excluded=full) is None:
                    raise
                continue
            self._note_reservation(load, reserved)
            return reserved

    def _note_reservation(self, load: RankLoad, reserved: worker_pb2.ReserveResponse) -> None:
        self._reservation_id = ReservationId(reserved.reservation_id)
        self.ranks.assign(load.rank_id)
        self.account.decode_rank = load.rank_id
        if self.account.num_retries == 0:
            self.account.num_cached = reserved.cached_len
            self.account.common_len = reserved.common_len

    async def _place(self, full: set[RankId]) -> RankLoad:
        until = time.monotonic() + PLACEMENT_TIMEOUT_S
        while True:
            load = choose_decode_rank(
                self.ranks.loads(Role.DECODE), preferred=self.preferred, excluded=self._excluded | full
            )
            if load is not None:
                return load
            remaining_s = until - time.monotonic()
            if remaining_s <= 0:
                raise Unavailable("no decode rank is alive", reason="NO_DECODE_RANK", retry_after_s=2.0)
            self._excluded.clear()  # a restarted rank is a new one: its directory entry decides from now on
            await self.ranks.wait_for_change(min(remaining_s, 0.25))

    async def _prefill_remotely(self, cached_len: int) -> None:
        """Let prefill ranks compute what pays off there; whatever they leave is the decode rank's to append."""
        assert self._decode is not None
        total = len(self.prompt) + len(self.token_ids)
        failed: set[RankId] = set()
        while True:
            decode = self.ranks.load(self._decode.rank_id)
            if decode is None:
                raise RankLost("the decode rank left", reason="RANK_LOST", retry_after_s=1.0)
            chosen = choose_path(
                decode,
                self.ranks.loads(Role.PREFILL),
                num_cached=cached_len,
                num_missing=total - cached_len,
                rules=self.rules,
                excluded=failed,
            )
            if chosen is None:
                return
            try:
                await self._prefill_at(chosen, cached_len)
                return
            except SeamountError:
                failed.add(chosen.rank_id)
                self.account.num_retries += 1
                cached_len = (await self._decode.reserve(self._work())).cached_len

    async def _prefill_at(self, chosen: RankLoad, cached_len: int) -> None:
        assert self._decode is not None
        work = self._work()
        request = worker_pb2.PrefillRequest(
            session_id=work.session_id,
            turn_id=work.turn_id,
            epoch=work.epoch,
            attempt=work.attempt,
            cache_salt=work.cache_salt,
            token_ids=work.token_ids,
            reservation_id=self._reservation_id or "",
            cached_len=cached_len,
            decode_rank_id=self._decode.rank_id,
            decode_address=self._decode.address,
        )
        renewed = time.monotonic()
        async with aclosing(self.ranks.client(chosen.rank_id).prefill(request)) as frames:
            async for frame in frames:
                if time.monotonic() - renewed > RENEW_EVERY_S:
                    await self._decode.reserve(work)
                    renewed = time.monotonic()
                if frame.WhichOneof("event") == "finished":
                    self._note_prefill(chosen.rank_id, frame.finished)

    def _note_prefill(self, rank_id: RankId, finished: worker_pb2.PrefillFinished) -> None:
        account = self.account
        account.prefill_rank = rank_id
        account.num_prefill_computed += finished.num_computed_tokens
        account.num_pulled += finished.num_pulled_tokens
        account.num_pushed += finished.num_pushed_tokens
        account.queue_s += finished.queue_time.ToTimedelta().total_seconds()
        account.prefill_s += finished.prefill_time.ToTimedelta().total_seconds()

    async def _sample(self) -> AsyncGenerator[worker_pb2.TokenBatch | worker_pb2.GenerateFinished, None]:
        assert self._decode is not None
        first = len(self.token_ids)
        if first >= self.sampling.max_output_tokens:  # the rank died between its last token and its last frame
            yield worker_pb2.GenerateFinished(reason=common_pb2.FINISH_REASON_LENGTH)
            return
        sampling = worker_pb2.ResolvedSampling()
        sampling.CopyFrom(self.sampling)
        sampling.first_output_index = first
        sampling.max_output_tokens = self.sampling.max_output_tokens - first
        request = worker_pb2.WorkerServiceGenerateRequest(
            reservation_id=self._reservation_id or "",
            epoch=self.epoch,
            sampling=sampling,
            forced_token_ids=self.forced_token_ids[first:],
        )
        async with aclosing(self._decode.generate(request)) as frames:
            async for frame in frames:
                match frame.WhichOneof("event"):
                    case "tokens":
                        if not self.token_ids:
                            self.account.first_token_s = time.monotonic() - self.account.started
                        self.token_ids.extend(frame.tokens.token_ids)
                        yield frame.tokens
                    case "finished":
                        self._note_finished(frame.finished)
                        yield frame.finished
                        return
        raise RankLost("the rank ended the stream early", reason="RANK_LOST", retry_after_s=1.0)

    def _note_finished(self, finished: worker_pb2.GenerateFinished) -> None:
        account = self.account
        account.num_decode_computed += finished.num_computed_tokens
        account.queue_s += finished.queue_time.ToTimedelta().total_seconds()
        account.prefill_s += finished.prefill_time.ToTimedelta().total_seconds()
        account.decode_s += finished.decode_time.ToTimedelta().total_seconds()

    def _give_up_rank(self, lost: RankLost) -> None:
        self.account.num_retries += 1
        if self.account.num_retries >= self.max_attempts:
            raise Unavailable(
                f"{self.account.num_retries} ranks were lost in this turn, the last one: {lost.message}",
                reason="TOO_MANY_RANKS_LOST",
                retry_after_s=2.0,
            ) from lost
        if self._decode is not None:
            self._excluded.add(self._decode.rank_id)
            self.ranks.mark_lost(self._decode.rank_id)
        self._forget_reservation()
        self._decode = None


def _duration(seconds: float) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
