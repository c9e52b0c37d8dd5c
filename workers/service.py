"""``WorkerService``: what routers ask of a rank. Thin: the caches answer Reserve and Release, the engine computes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field

import grpc
from google.protobuf import duration_pb2

from seamount.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from seamount.wire import failpoints, limits
from seamount.wire.durations import duration
from seamount.wire.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from seamount.workers.ahead import Ahead
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.cache.retention import Importance, LeaseOutcome, Tier
from seamount.workers.cache.waiting import until_restored
from seamount.workers.draining import Draining
from seamount.workers.engine import Engine
from seamount.workers.engine_stream import run_request
from seamount.workers.events import EngineEvent, Failed, Finished, FinishReason, Progress, TokenLogprobs, Tokens
from seamount.workers.migration import Migration
from seamount.workers.prefill import Prefill, check_work
from seamount.workers.requests import EngineRequest, SamplingParams
from seamount.workers.spec import RankSpec
from seamount.workers.tiers.mover import RestoreRates
from seamount.workers.transfer.transfer import Transfer

RESTORE_ANSWER_S = 0.5
"""How long Reserve waits for pages from the tiers below: an answer before that tells what has really come. What takes
longer is restored while the router goes on, and the engine waits for it."""
ORPHAN_TIME_TO_LIVE_S = 1.0
"""Of a reservation whose Generate was broken off, or failed."""

_REASONS: dict[FinishReason, common_pb2.FinishReason] = {
    "stop": common_pb2.FINISH_REASON_STOP,
    "stop_sequence": common_pb2.FINISH_REASON_STOP_SEQUENCE,
    "length": common_pb2.FINISH_REASON_LENGTH,
    "cancelled": common_pb2.FINISH_REASON_CANCELLED,
}

_IMPORTANCE = {
    common_pb2.LEASE_IMPORTANCE_UNSPECIFIED: Importance.NORMAL,
    common_pb2.LEASE_IMPORTANCE_LOW: Importance.LOW,
    common_pb2.LEASE_IMPORTANCE_NORMAL: Importance.NORMAL,
    common_pb2.LEASE_IMPORTANCE_HIGH: Importance.HIGH,
}
_OUTCOMES = {
    LeaseOutcome.ACCEPTED: common_pb2.LEASE_OUTCOME_ACCEPTED,
    LeaseOutcome.CLIPPED: common_pb2.LEASE_OUTCOME_CLIPPED,
    LeaseOutcome.DENIED: common_pb2.LEASE_OUTCOME_DENIED,
}
_TIERS = {
    None: common_pb2.CACHE_TIER_UNSPECIFIED,
    Tier.DEVICE: common_pb2.CACHE_TIER_DEVICE,
    Tier.HOST: common_pb2.CACHE_TIER_HOST,
    Tier.DISK: common_pb2.CACHE_TIER_DISK,
}

Context = grpc.aio.ServicerContext[object, object]


@dataclass(slots=True, kw_only=True)
class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """One rank's service. ``watch`` yields its state, now and at every change; all else belongs to other parts."""

    spec: RankSpec
    reservations: Reservations
    engine: Engine
    prefill: Prefill
    transfer: Transfer
    migration: Migration
    ahead: Ahead
    draining: Draining
    watch: Callable[[], AsyncIterator[worker_pb2.RankState]]
    active: set[str] = field(default_factory=set)
    """Reservations with a Generate in progress here; they are renewed while it lasts."""

    rates: RestoreRates = field(default_factory=RestoreRates)
    """At which pages come from the tiers below."""

    num_streams: int = 0
    """Calls of Prefill and Generate in progress."""

    async def Reserve(self, request: worker_pb2.ReserveRequest, context: Context) -> worker_pb2.ReserveResponse:
        limits.check_length(
            request.token_ids, field="token_ids", low=1, high=self.spec.max_context_tokens, unit="tokens"
        )
        check_work(request)
        try:
            reservation = self._reserve(request)
        except ResourceExhausted:
            if not await self.ahead.yield_pages():
                raise
            reservation = self._reserve(request)
        await until_restored(reservation, RESTORE_ANSWER_S)
        reservation.num_prepared += self.ahead.came(request.session_id)
        return worker_pb2.ReserveResponse(
            reservation_id=reservation.id,
            cached_len=reservation.cached_len,
            common_len=reservation.common_len,
            left_len=reservation.left_len,
            idle_time=duration(reservation.idle_s),
            is_leased=reservation.is_leased,
            num_host_tokens=reservation.num_tokens_from(Tier.HOST),
            num_disk_tokens=reservation.num_tokens_from(Tier.DISK),
            restore_time=self._restore_time(reservation),
            num_prepared_tokens=reservation.num_prepared,
        )

    async def Prefill(
        self, request: worker_pb2.PrefillRequest, context: Context
    ) -> AsyncIterator[worker_pb2.PrefillResponse]:
        with self._stream():
            async with aclosing(self.prefill.run(request)) as frames:
                async for frame in frames:
                    yield frame

    async def Generate(
        self, request: worker_pb2.WorkerServiceGenerateRequest, context: Context
    ) -> AsyncIterator[worker_pb2.WorkerServiceGenerateResponse]:
        reservation = self.reservations.get(request.reservation_id)
        self._check_generate(reservation, request)
        # Whoever pushed into it has been given up: two must not write the same entries.
        self.transfer.abort(reservation.id)
        events = run_request(
            self.engine,
            lambda sink: EngineRequest(
                id=reservation.id,
                reservation=reservation,
                sampling=_sampling(request.sampling),
                forced_token_ids=tuple(request.forced_token_ids),
                alone=request.alone,
                sink=sink,
            ),
            active=self.active,
        )
        with self._stream(), self._orphaned(reservation.id):
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Finished):
                        failpoints.reached("rank.finished")
                    yield _frame(event)

    async def Release(self, request: worker_pb2.ReleaseRequest, context: Context) -> worker_pb2.ReleaseResponse:
        self.engine.abort(request.reservation_id)
        self.reservations.release(
            request.reservation_id,
            request.keep_len if request.HasField("keep_len") else None,
            reuse_len=request.reuse_len if request.HasField("reuse_len") else None,
        )
        return worker_pb2.ReleaseResponse()

    async def Retain(self, request: worker_pb2.RetainRequest, context: Context) -> worker_pb2.RetainResponse:
        if request.importance not in _IMPORTANCE:
            raise InvalidArgument("importance is not known; use low, normal or high", field="importance")
        decision = self.reservations.sessions.retain(
            request.session_id,
            duration_s=request.duration.ToNanoseconds() / 1e9,
            importance=_IMPORTANCE[request.importance],
            epoch=request.epoch if request.HasField("epoch") else None,
            prefill_tokens_per_s=self.engine.state().prefill_tokens_per_s,
        )
        return worker_pb2.RetainResponse(
            outcome=_OUTCOMES[decision.outcome],
            tier=_TIERS[decision.tier],
            duration=duration(decision.duration_s),
            num_rebuild_tokens=decision.rebuild_tokens,
            rebuild_time=duration(decision.rebuild_s),
        )

    async def Restore(self, request: worker_pb2.RestoreRequest, context: Context) -> worker_pb2.RestoreResponse:
        self.reservations.sessions.restore_ahead(request.session_id)
        return worker_pb2.RestoreResponse()

    async def Migrate(
        self, request: worker_pb2.MigrateRequest, context: Context
    ) -> AsyncIterator[worker_pb2.MigrateResponse]:
        with self._stream():
            async with aclosing(self.migration.run(request)) as frames:
                async for frame in frames:
                    yield frame

    async def Prepare(self, request: worker_pb2.PrepareRequest, context: Context) -> worker_pb2.PrepareResponse:
        limits.check_length(request.session_id.encode(), field="session_id", low=1, high=limits.MAX_NAME_BYTES)
        limits.check_length(
            request.token_ids, field="token_ids", low=1, high=self.spec.max_context_tokens, unit="tokens"
        )
        check_work(request)
        if self.spec.pool == "decode" and not self.draining.has_begun:
            self.ahead.want(request)
        return worker_pb2.PrepareResponse()

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: Context
    ) -> AsyncIterator[worker_pb2.DrainResponse]:
        async with aclosing(self.draining.run(request)) as frames:
            async for frame in frames:
                yield frame

    async def WatchState(
        self, request: worker_pb2.WatchStateRequest, context: Context
    ) -> AsyncIterator[worker_pb2.WatchStateResponse]:
        async for state in self.watch():
            yield worker_pb2.WatchStateResponse(state=state)

    async def CheckCaches(
        self, request: worker_pb2.CheckCachesRequest, context: Context
    ) -> worker_pb2.CheckCachesResponse:
        if not self.spec.allow_forced_tokens:
            raise FailedPrecondition("this rank was not started for tests", reason="NOT_FOR_TESTS")
        try:
            self.reservations.check_invariants()
        except AssertionError as violation:
            return worker_pb2.CheckCachesResponse(violation=str(violation))
        return worker_pb2.CheckCachesResponse()

    def _reserve(self, request: worker_pb2.ReserveRequest) -> Reservation:
        return self.reservations.reserve(
            session_id=request.session_id,
            turn_id=request.turn_id,
            epoch=request.epoch,
            attempt=request.attempt,
            salt=request.cache_salt,
            token_ids=request.token_ids,
            time_to_live_s=request.time_to_live.ToTimedelta().total_seconds(),
        )

    @contextmanager
    def _orphaned(self, reservation_id: str) -> Iterator[None]:
        """Who hears of a Generate that does not end well releases the reservation, or reserves again, soon: or is dead,
        or has stopped listening."""
        try:
            yield
        except BaseException:
            with suppress(NotFound):
                self.reservations.renew(reservation_id, ORPHAN_TIME_TO_LIVE_S)
            raise

    @contextmanager
    def _stream(self) -> Iterator[None]:
        self.num_streams += 1
        try:
            yield
        finally:
            self.num_streams -= 1

    def _restore_time(self, reservation: Reservation) -> duration_pb2.Duration | None:
        """What bringing up its tokens takes at the rates that were measured here; None: nothing to tell."""
        seconds = 0.0
        for tier, bytes_per_s in ((Tier.HOST, self.rates.host), (Tier.DISK, self.rates.disk)):
            num_tokens = reservation.num_tokens_from(tier)
            if num_tokens and bytes_per_s <= 0:
                return None
            if num_tokens:
                seconds += num_tokens * self.transfer.kv_bytes_per_token / bytes_per_s
        return duration(seconds) if seconds else None

    def _check_generate(self, reservation: Reservation, request: worker_pb2.WorkerServiceGenerateRequest) -> None:
        if request.epoch != reservation.epoch:
            raise Aborted(
                f"epoch {request.epoch} does not own reservation {reservation.id}",
                reason="STALE_EPOCH",
                metadata={"epoch": str(reservation.epoch)},
            )
        if reservation.id in self.active:
            raise FailedPrecondition("this reservation generates already", reason="ALREADY_GENERATING")
        limits.check_length(
            request.forced_token_ids, field="forced_token_ids", high=limits.MAX_OUTPUT_TOKENS, unit="tokens"
        )
        if request.forced_token_ids and not self.spec.allow_forced_tokens:
            raise InvalidArgument(
                "forced_token_ids are for tests: this rank was not started for them", field="forced_token_ids"
            )


def _sampling(resolved: worker_pb2.ResolvedSampling) -> SamplingParams:
    return SamplingParams(
        temperature=resolved.temperature,
        top_p=resolved.top_p,
        top_k=resolved.top_k,
        seed=resolved.seed,
        max_output_tokens=resolved.max_output_tokens,
        stop_token_ids=frozenset(resolved.stop_token_ids),
        num_logprobs=resolved.num_logprobs,
        first_output_index=resolved.first_output_index,
    )


def _frame(event: EngineEvent) -> worker_pb2.WorkerServiceGenerateResponse:
    match event:
        case Progress():
            return worker_pb2.WorkerServiceGenerateResponse(
                progress=worker_pb2.GenerateProgress(num_computed_tokens=event.num_computed, in_batch=event.in_batch)
            )
        case Tokens():
            return worker_pb2.WorkerServiceGenerateResponse(
                tokens=worker_pb2.TokenBatch(
                    first_index=event.first_index,
                    token_ids=event.token_ids,
                    logprobs=[_logprobs(item) for item in event.logprobs],
                )
            )
        case Finished():
            return worker_pb2.WorkerServiceGenerateResponse(
                finished=worker_pb2.GenerateFinished(
                    reason=_REASONS[event.reason],
                    num_computed_tokens=event.num_computed,
                    num_preemptions=event.num_preemptions,
                    queue_time=duration(event.queue_s),
                    prefill_time=duration(event.prefill_s),
                    decode_time=duration(event.decode_s),
                )
            )
        case Failed():
            raise event.error


def _logprobs(item: TokenLogprobs) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        sampled=item.sampled,
        top=[common_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in item.top],
    )
