"""A remote prefill, at the prefill rank: pull what only the decode rank has, compute the rest, push it there.

All but the last prompt token is computed here; the decode rank computes that one, so that sampling lives in one place.
Whatever fails on the way is the router's to answer: what has arrived and verified stays with the decode rank.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from seamount.v1 import worker_pb2
from seamount.wire import limits
from seamount.wire.durations import duration
from seamount.wire.errors import FailedPrecondition, SeamountError
from seamount.wire.hashes import SALT_BYTES
from seamount.wire.ids import RankId
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.cache.waiting import until_restored
from seamount.workers.engine import Engine
from seamount.workers.engine_stream import KEEP_ALIVE_S, run_request
from seamount.workers.events import Finished, Progress
from seamount.workers.requests import EngineRequest
from seamount.workers.spec import RankSpec
from seamount.workers.transfer.sending import PushStream
from seamount.workers.transfer.transfer import Transfer


def check_work(
    request: worker_pb2.ReserveRequest | worker_pb2.PrefillRequest | worker_pb2.PrepareRequest,
) -> None:
    """Raise ``InvalidArgument`` for a salt or ids that no router sends."""
    limits.check_length(request.cache_salt, field="cache_salt", low=SALT_BYTES, high=SALT_BYTES, unit="bytes")
    for field in ("session_id", "turn_id"):
        limits.check_length(getattr(request, field).encode(), field=field, high=limits.MAX_NAME_BYTES, unit="bytes")


@dataclass(slots=True, kw_only=True)
class _Account:
    num_cached: int = 0
    num_pulled: int = 0
    num_computed: int = 0
    num_pushed: int = 0
    in_batch: bool = False
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0

    def progress(self) -> worker_pb2.PrefillResponse:
        return worker_pb2.PrefillResponse(
            progress=worker_pb2.PrefillProgress(
                num_computed_tokens=self.num_computed,
                num_pushed_tokens=self.num_pushed,
                in_batch=self.in_batch,
            )
        )

    def finished(self) -> worker_pb2.PrefillResponse:
        return worker_pb2.PrefillResponse(
            finished=worker_pb2.PrefillFinished(
                num_cached_tokens=self.num_cached,
                num_pulled_tokens=self.num_pulled,
                num_computed_tokens=self.num_computed,
                num_pushed_tokens=self.num_pushed,
                queue_time=duration(self.queue_s),
                prefill_time=duration(self.prefill_s),
                transfer_time=duration(self.transfer_s),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Runs ``WorkerService.Prefill`` on a prefill rank."""

    spec: RankSpec
    reservations: Reservations
    engine: Engine
    transfer: Transfer
    num_layers: int

    async def run(self, request: worker_pb2.PrefillRequest) -> AsyncGenerator[worker_pb2.PrefillResponse, None]:
        """Progress frames, at least one a second, then ``finished``. Raises typed errors; releases its pages always."""
        if self.spec.pool != "prefill":
            raise FailedPrecondition(f"{self.spec.rank_id} is no prefill rank", reason="WRONG_POOL")
        limits.check_length(
            request.token_ids, field="token_ids", low=2, high=self.spec.max_context_tokens, unit="tokens"
        )
        check_work(request)
        limits.check_range(request.cached_len, field="cached_len", low=0, high=len(request.token_ids) - 1)
        reservation = self._reserve(request)
        try:
            async with aclosing(self._run(request, reservation)) as frames:
                async for frame in frames:
                    yield frame
        finally:
            self.engine.abort(reservation.id)
            self.reservations.release(reservation.id)

    def _reserve(self, request: worker_pb2.PrefillRequest) -> Reservation:
        # Without a session: a prefill rank keeps full pages in its tree and no tails.
        return self.reservations.reserve(
            session_id="",
            turn_id=f"{request.session_id}/{request.turn_id}/{request.reservation_id}",
            epoch=request.epoch,
            attempt=request.attempt,
            salt=request.cache_salt,
            token_ids=request.token_ids,
            time_to_live_s=limits.MAX_RESERVATION_S,
            for_session=request.session_id,
        )

    async def _run(
        self, request: worker_pb2.PrefillRequest, reservation: Reservation
    ) -> AsyncGenerator[worker_pb2.PrefillResponse, None]:
        account = _Account()
        async with aclosing(self._waiting(until_restored(reservation), account, reservation)) as frames:
            async for frame in frames:
                yield frame
        account.num_cached = reservation.cached_len
        end = len(request.token_ids) - 1
        if request.cached_len > reservation.cached_len and self._pull_pays(request.cached_len - reservation.cached_len):
            pull = self._pull(request, reservation, account)
            async with aclosing(self._waiting(pull, account, reservation)) as frames:
                async for frame in frames:
                    yield frame
        if request.cached_len >= end:
            yield account.finished()
            return
        stream = await self.transfer.push(
            peer=RankId(request.decode_rank_id),
            address=request.decode_address,
            remote_reservation_id=request.reservation_id,
            remote_epoch=request.epoch,
            reservation=reservation,
            first=request.cached_len,
            end=end,
        )
        try:
            async with aclosing(self._compute(request, reservation, stream, end, account)) as frames:
                async for frame in frames:
                    yield frame
            finish = self._finish(stream, request, account)
            async with aclosing(self._waiting(finish, account, reservation)) as frames:
                async for frame in frames:
                    yield frame
        finally:
            stream.close()
        yield account.finished()

    async def _pull(self, request: worker_pb2.PrefillRequest, reservation: Reservation, account: _Account) -> None:
        first = reservation.cached_len
        with suppress(SeamountError):  # what does not come is computed
            await self.transfer.pull(
                peer=RankId(request.decode_rank_id),
                address=request.decode_address,
                remote_reservation_id=request.reservation_id,
                reservation=reservation,
                first=first,
                end=request.cached_len,
            )
        account.num_pulled = max(0, min(reservation.computed_len, request.cached_len) - first)

    def _pull_pays(self, num_tokens: int) -> bool:
        """Whether moving the cached prefix is cheaper than computing it; yes where either speed is unmeasured."""
        computed_per_s = self.engine.state().prefill_tokens_per_s
        moved_per_s = self.transfer.pull_bytes_per_s / self.transfer.kv_bytes_per_token
        return computed_per_s <= 0 or moved_per_s <= 0 or num_tokens / moved_per_s <= num_tokens / computed_per_s

    async def _compute(
        self,
        request: worker_pb2.PrefillRequest,
        reservation: Reservation,
        stream: PushStream,
        end: int,
        account: _Account,
    ) -> AsyncGenerator[worker_pb2.PrefillResponse, None]:
        present = min(reservation.computed_len, end)
        if present > stream.first:  # cached here, unknown there
            await asyncio.to_thread(self._push_present, stream, present)
        if present >= end:
            return
        events = run_request(
            self.engine,
            lambda sink: EngineRequest(
                id=reservation.id,
                reservation=reservation,
                sampling=None,
                prefill_until=end,
                sink=sink,
                alone=request.alone,
                on_layer=stream.on_layer,
            ),
        )
        async with aclosing(events):
            async for event in events:
                self.reservations.renew(reservation.id)
                if isinstance(event, Progress | Finished):
                    account.num_computed = event.num_computed
                account.in_batch = isinstance(event, Progress) and event.in_batch
                if isinstance(event, Finished):
                    account.queue_s, account.prefill_s = event.queue_s, event.prefill_s
                yield account.progress()

    def _push_present(self, stream: PushStream, end: int) -> None:
        for layer in range(self.num_layers):
            stream.on_layer(layer, stream.first, end)

    async def _finish(self, stream: PushStream, request: worker_pb2.PrefillRequest, account: _Account) -> None:
        verified_len = await stream.finish()
        account.num_pushed = max(0, verified_len - request.cached_len)

    async def _waiting(
        self, work: Coroutine[Any, Any, None], account: _Account, reservation: Reservation
    ) -> AsyncGenerator[worker_pb2.PrefillResponse, None]:
        """Wait for a transfer and say every second that this rank is alive."""
        began = time.monotonic()
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait({task}, timeout=KEEP_ALIVE_S))[0]:
                self.reservations.renew(reservation.id)
                yield account.progress()
            await task
        finally:
            account.transfer_s += time.monotonic() - began
            task.cancel()
            with suppress(asyncio.CancelledError, SeamountError):
                await task
