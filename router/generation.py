"""The tokens of one answer: placed, reserved, prefilled and sampled, whatever dies on the way.

The router orchestrates, so every failure is handled here: a prefill rank that dies costs time (``Reserve`` again tells
what arrived, another prefill rank or a local append does the rest); a decode rank that dies is replaced by another one,
whose prompt is the prompt and the tokens so far, and whose draws go on at the next output index.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from seamount.router.account import Account
from seamount.router.claim import Claim
from seamount.router.directory import Role
from seamount.router.placement import RankLoad, choose_path
from seamount.router.quarantine import NODE_WINDOW_S, Suspicion, quarantined
from seamount.router.rank_client import RESERVED_FOR_S, RankLost, ReservationGone
from seamount.v1 import common_pb2, worker_pb2
from seamount.wire.errors import Internal, SeamountError, Unavailable
from seamount.wire.ids import RankId

PREFILL_STALL_S = 60.0
"""How long a prefill rank may queue or stand still, alive, before the work goes elsewhere."""
RENEW_EVERY_S = RESERVED_FOR_S / 3


@dataclass(slots=True, kw_only=True)
class Generation:
    """One answer in the making: what is asked of ranks, and what has come of it. claim: where, for whom and by when.

    max_attempts: decode ranks, and prefill ranks for each. eos_token_id: ends a message.
    """

    claim: Claim
    sampling: worker_pb2.ResolvedSampling
    max_attempts: int
    eos_token_id: int
    forced_token_ids: Sequence[int] = ()
    _num_lost: int = 0
    _is_accounted: bool = False
    _suspicion: Suspicion = field(init=False)

    def __post_init__(self) -> None:
        self._suspicion = Suspicion(deaths=self.claim.ranks.deaths)

    @property
    def prompt(self) -> Sequence[int]:
        return self.claim.prompt

    @property
    def token_ids(self) -> list[int]:
        """Sampled so far; grows as batches are yielded."""
        return self.claim.token_ids

    @property
    def account(self) -> Account:
        return self.claim.account

    @property
    def decode_rank(self) -> RankId | None:
        """Where the caches of this answer are, or are believed to be while it has no rank."""
        return self.claim.rank.rank_id if self.claim.rank else self.claim.preferred

    @property
    def is_full(self) -> bool:
        """Whether the answer is as long as it may be."""
        return len(self.token_ids) >= self.sampling.max_output_tokens

    async def batches(self) -> AsyncGenerator[worker_pb2.TokenBatch | worker_pb2.GenerateFinished, None]:
        """Token batches in order, then ``GenerateFinished``.

        Raises ``Unavailable`` after ``max_attempts`` lost ranks or where no decode rank lives, ``ResourceExhausted``
        where none has room, ``DeadlineExceeded``, ``Internal`` (REQUEST_QUARANTINED) where ranks died of this turn, and
        a rank's own typed error.
        """
        while True:
            try:
                cached_len = await self._prefill_remotely(await self.claim.stake())
                async with aclosing(self._sample(cached_len)) as frames:
                    async for frame in frames:
                        yield frame
                return
            except RankLost as lost:
                await self._suspect(lost)
                self._count_loss(lost)
                await self._give_up_rank(lost)
            except ReservationGone as gone:
                self._count_loss(gone)
                self.claim.num_left = self.claim.num_tokens
                await self.release(None)

    async def release(self, keep_len: int | None, *, reuse_len: int | None = None) -> None:
        """``Claim.release``."""
        await self.claim.release(keep_len, reuse_len=reuse_len)

    async def _prefill_remotely(self, cached_len: int) -> int:
        """Let prefill ranks compute what pays off there; the rest is the decode rank's to append. Returns the new
        cached length."""
        assert self.claim.rank is not None
        failed: set[RankId] = set()
        while len(failed) < self.max_attempts:
            # A rank that has begun to leave since then ends what it has.
            decode = self.claim.ranks.source(self.claim.rank.rank_id)
            if decode is None:
                raise RankLost("the decode rank left", reason="RANK_LOST", retry_after_s=1.0)
            chosen = choose_path(
                decode,
                self.claim.ranks.loads(Role.PREFILL),
                num_cached=cached_len,
                num_missing=self.claim.num_tokens - cached_len,
                rules=self.claim.rules,
                excluded=failed,
                tenant_weight=self.claim.ranks.tenant_weight(self.claim.cache_salt),
            )
            if chosen is None:
                break
            try:
                return cached_len + await self._prefill_at(chosen, cached_len)
            except SeamountError as error:
                if isinstance(error, RankLost):
                    await self._suspect(error)
                failed.add(chosen.rank_id)
                self.account.num_retries += 1
                cached_len = (await self.claim.renew()).cached_len
        return cached_len

    async def _prefill_at(self, chosen: RankLoad, cached_len: int) -> int:
        """Returns how many tokens arrived at the decode rank."""
        assert self.claim.rank is not None
        work = self.claim.work()
        request = worker_pb2.PrefillRequest(
            session_id=work.session_id,
            turn_id=work.turn_id,
            epoch=work.epoch,
            attempt=work.attempt,
            cache_salt=work.cache_salt,
            token_ids=work.token_ids,
            reservation_id=self.claim.reservation_id or "",
            cached_len=cached_len,
            decode_rank_id=self.claim.rank.rank_id,
            decode_address=self.claim.rank.address,
            alone=self._suspicion.is_suspect,
        )
        renewed = moved = time.monotonic()
        progress = worker_pb2.PrefillProgress()
        frames = self.claim.ranks.client(chosen.rank_id).prefill(request, timeout_s=self.claim.remaining_s())
        async with aclosing(frames):
            async for frame in frames:
                now = time.monotonic()
                if frame.WhichOneof("event") == "finished":
                    self.account.add_prefill(chosen.rank_id, frame.finished)
                    return frame.finished.num_pushed_tokens
                self._suspicion.in_batch_of = chosen.rank_id if frame.progress.in_batch else None
                if frame.progress != progress:
                    progress, moved = frame.progress, now
                elif now - moved > PREFILL_STALL_S:  # alive, but it gets nowhere
                    break
                if now - renewed > RENEW_EVERY_S:
                    await self.claim.renew()
                    renewed = now
        raise RankLost("the prefill rank ended early or got nowhere", reason="RANK_LOST", retry_after_s=1.0)

    async def _sample(
        self, cached_len: int
    ) -> AsyncGenerator[worker_pb2.TokenBatch | worker_pb2.GenerateFinished, None]:
        if self.is_full:  # the rank died between its last token and frame
            yield worker_pb2.GenerateFinished(reason=common_pb2.FINISH_REASON_LENGTH)
            return
        num_missing = self.claim.num_tokens - cached_len
        began = time.monotonic()
        first_token = None
        try:
            async with aclosing(self._frames()) as frames:
                async for frame in frames:
                    if isinstance(frame, worker_pb2.TokenBatch):
                        first_token = first_token or time.monotonic()
                        if not self.token_ids:
                            self.account.first_token_s = first_token - self.account.started
                        self.token_ids.extend(frame.token_ids)
                    yield frame
        except GeneratorExit:  # the output was over before the rank knew
            if first_token is not None and not self._is_accounted:
                self.account.add_cut_decode(
                    num_computed=num_missing, prefill_s=first_token - began, decode_s=time.monotonic() - first_token
                )
            raise

    async def _frames(self) -> AsyncGenerator[worker_pb2.TokenBatch | worker_pb2.GenerateFinished, None]:
        """What the decode rank sends. Its last batch is held back until its account is there."""
        assert self.claim.rank is not None
        call = self.claim.rank.generate(self._generate_request(), timeout_s=self.claim.remaining_s())
        last = {self.eos_token_id, *self.sampling.stop_token_ids}
        held: worker_pb2.TokenBatch | None = None
        async with aclosing(call):
            async for frame in call:
                event = frame.WhichOneof("event")
                in_batch = event == "tokens" or frame.progress.in_batch
                self._suspicion.in_batch_of = self.claim.rank.rank_id if in_batch else None
                if event == "finished":
                    if frame.finished.reason == common_pb2.FINISH_REASON_CANCELLED:
                        raise ReservationGone("the rank ended the request", reason="REQUEST_ENDED", retry_after_s=0.1)
                    self.account.add_decode(frame.finished)
                    self._is_accounted = True
                if held is not None:
                    yield held
                    held = None
                if event == "finished":
                    yield frame.finished
                    return
                if event == "tokens" and last.intersection(frame.tokens.token_ids[-1:]):
                    held = frame.tokens
                elif event == "tokens":
                    yield frame.tokens
        raise RankLost("the rank ended the stream early", reason="RANK_LOST", retry_after_s=1.0)

    def _generate_request(self) -> worker_pb2.WorkerServiceGenerateRequest:
        first = len(self.token_ids)
        sampling = worker_pb2.ResolvedSampling()
        sampling.CopyFrom(self.sampling)
        sampling.first_output_index = first
        sampling.max_output_tokens = self.sampling.max_output_tokens - first
        return worker_pb2.WorkerServiceGenerateRequest(
            reservation_id=self.claim.reservation_id or "",
            epoch=self.claim.epoch,
            sampling=sampling,
            forced_token_ids=self.forced_token_ids[first:],
            alone=self._suspicion.is_suspect,
        )

    async def _suspect(self, lost: RankLost) -> None:
        """A rank that died may have died of this turn. Raises what such a turn ends with."""
        if not lost.died:
            self._suspicion.in_batch_of = None
            return
        rank_id = RankId(lost.metadata["rank"])
        self.claim.ranks.note_death(rank_id)
        self._suspicion.rank_died(rank_id)
        if self._suspicion.may_be_proven:
            await asyncio.sleep(NODE_WINDOW_S)  # others of its node may be seen to die, too
            if self._suspicion.is_proven():
                raise quarantined()

    def _count_loss(self, lost: RankLost | ReservationGone) -> None:
        self.claim.remaining_s()  # a call that ended with the turn's time says nothing about the rank
        self.account.num_retries += 1
        self._num_lost += 1
        if self._num_lost < self.max_attempts:
            return
        if isinstance(lost, RankLost) and isinstance(lost.cause, Internal):
            raise lost.cause  # ranks that are well fail at this very turn: a retry would, too
        raise Unavailable(
            f"{self._num_lost} ranks were lost in this turn, the last one: {lost.message}",
            reason="TOO_MANY_RANKS_LOST",
            retry_after_s=2.0,
        ) from lost

    async def _give_up_rank(self, lost: RankLost) -> None:
        if self.claim.rank is not None:
            self.claim.excluded.add(self.claim.rank.rank_id)
            if lost.cause is None:
                self.claim.ranks.mark_lost(self.claim.rank.rank_id)
            else:
                await self.release(None)
        self.claim.forget()
        self.claim.rank = None
