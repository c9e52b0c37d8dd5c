"""What a rank refuses at its door, and what it does before it computes: a real engine behind a real port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from seamount.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from seamount.wire import limits
from seamount.wire.errors import InvalidArgument, SeamountError, from_rpc_error
from seamount.wire.ids import GangId, RankId
from seamount.wire.interceptors import rank_interceptors
from seamount.workers.ahead import Ahead
from seamount.workers.draining import Draining
from seamount.workers.migration import Migration
from seamount.workers.prefill import Prefill
from seamount.workers.service import ORPHAN_TIME_TO_LIVE_S, WorkerService
from seamount.workers.spec import RankSpec

MAX_CONTEXT = 200
SALT = bytes(32)


@dataclass
class Served:
    stub: worker_pb2_grpc.WorkerServiceStub
    rank: Any
    service: WorkerService
    aborted: list[str] = field(default_factory=list)

    def abort(self, reservation_id: str) -> None:
        """In the place of the transfer's: no peer is there."""
        self.aborted.append(reservation_id)


@pytest.fixture
async def served(make_rank: Callable[..., Any], tmp_path: Any, request: Any) -> AsyncIterator[Served]:
    rank = make_rank(max_context_tokens=MAX_CONTEXT)
    spec = RankSpec(
        rank_id=RankId("r"),
        gang_id=GangId("g"),
        pool=getattr(request, "param", "decode"),
        gang_rank=0,
        gang_size=1,
        model_path=tmp_path,
        layout="exact",
        dtype="float64",
        num_pages=64,
        max_batch_tokens=128,
        prefill_chunk_tokens=64,
        max_running=16,
        max_context_tokens=MAX_CONTEXT,
        step_timeout_s=5.0,
    )
    system = Served(stub=None, rank=rank, service=None)  # type: ignore[arg-type]
    prefill = Prefill(
        spec=spec,
        reservations=rank.reservations,
        engine=rank.engine,
        transfer=system,  # type: ignore[arg-type]
        num_layers=2,
    )

    async def watch() -> AsyncIterator[worker_pb2.RankState]:
        yield worker_pb2.RankState()

    system.service = WorkerService(
        spec=spec,
        reservations=rank.reservations,
        engine=rank.engine,
        prefill=prefill,
        transfer=system,  # type: ignore[arg-type]
        migration=Migration(spec=spec, reservations=rank.reservations, transfer=system),  # type: ignore[arg-type]
        ahead=Ahead(reservations=rank.reservations, engine=rank.engine),
        draining=Draining(
            spec=spec, reservations=rank.reservations, active=set(), abort=rank.engine.abort, metadata=()
        ),
        watch=watch,
    )
    system.service.ahead.start()
    server = grpc.aio.server(interceptors=rank_interceptors(None))
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(system.service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        system.stub = worker_pb2_grpc.WorkerServiceStub(channel)
        yield system
    await system.service.ahead.stop()
    await server.stop(0)


def reserve(**changes: Any) -> worker_pb2.ReserveRequest:
    fields = {
        "session_id": "s",
        "turn_id": "t",
        "epoch": 1,
        "attempt": 1,
        "cache_salt": SALT,
        "token_ids": range(1, 20),
        "time_to_live": duration_pb2.Duration(seconds=30),
    }
    return worker_pb2.ReserveRequest(**(fields | changes))


async def refused(call: Any) -> SeamountError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


BAD = [
    ({"cache_salt": b""}, "cache_salt"),
    ({"cache_salt": bytes(31)}, "cache_salt"),
    ({"cache_salt": bytes(33)}, "cache_salt"),
    ({"session_id": "s" * (limits.MAX_NAME_BYTES + 1)}, "session_id"),
    ({"turn_id": "é" * (limits.MAX_NAME_BYTES // 2 + 1)}, "turn_id"),
    ({"token_ids": []}, "token_ids"),
    ({"token_ids": [5] * (MAX_CONTEXT + 1)}, "token_ids"),
    ({"time_to_live": duration_pb2.Duration(seconds=0)}, "time_to_live"),
    ({"time_to_live": duration_pb2.Duration(seconds=int(limits.MAX_RESERVATION_S) + 1)}, "time_to_live"),
]


@pytest.mark.parametrize(("changes", "field"), BAD)
async def test_a_bad_reserve_names_the_field_and_reserves_nothing(served: Served, changes: Any, field: str) -> None:
    error = await refused(served.stub.Reserve(reserve(**changes), timeout=5))
    assert isinstance(error, InvalidArgument)
    assert error.field == field
    assert served.rank.reservations.state().num_reservations == 0


async def test_the_longest_of_everything_is_taken(served: Served) -> None:
    name = "n" * limits.MAX_NAME_BYTES
    asked = reserve(session_id=name, turn_id=name, token_ids=[5] * MAX_CONTEXT)
    reserved = await served.stub.Reserve(asked, timeout=5)
    await served.stub.Release(worker_pb2.ReleaseRequest(reservation_id=reserved.reservation_id), timeout=5)


async def test_retain_leases_what_a_session_left(served: Served) -> None:
    asked = worker_pb2.RetainRequest(session_id="s", epoch=1, duration=duration_pb2.Duration(seconds=20))
    assert (await served.stub.Retain(asked, timeout=5)).outcome == common_pb2.LEASE_OUTCOME_DENIED
    reserved = await served.stub.Reserve(reserve(), timeout=5)
    assert not reserved.is_leased
    served.rank.reservations.advance(reserved.reservation_id, 19)
    await served.stub.Release(worker_pb2.ReleaseRequest(reservation_id=reserved.reservation_id, keep_len=19), timeout=5)
    lease = await served.stub.Retain(asked, timeout=5)
    assert (lease.outcome, lease.tier) == (common_pb2.LEASE_OUTCOME_ACCEPTED, common_pb2.CACHE_TIER_DEVICE)
    assert (lease.duration.seconds, lease.num_rebuild_tokens) == (20, 19)
    again = await served.stub.Reserve(reserve(epoch=2), timeout=5)
    assert again.is_leased
    late = await served.stub.Retain(asked, timeout=5)
    assert late.outcome == common_pb2.LEASE_OUTCOME_DENIED, "the session has gone on"
    untold = worker_pb2.RetainRequest(session_id="s", duration=duration_pb2.Duration(seconds=20))
    assert (await served.stub.Retain(untold, timeout=5)).outcome == common_pb2.LEASE_OUTCOME_ACCEPTED
    await served.stub.Release(worker_pb2.ReleaseRequest(reservation_id=again.reservation_id), timeout=5)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"duration": duration_pb2.Duration()}, "duration"),
        ({"duration": duration_pb2.Duration(seconds=int(limits.MAX_TOOL_WAIT_S) + 1)}, "duration"),
        ({"duration": duration_pb2.Duration(seconds=1 << 62)}, "duration"),
        ({"importance": 9}, "importance"),
    ],
)
async def test_a_bad_retain_names_the_field(served: Served, changes: Any, field: str) -> None:
    fields = {"session_id": "s", "duration": duration_pb2.Duration(seconds=20)}
    error = await refused(served.stub.Retain(worker_pb2.RetainRequest(**(fields | changes)), timeout=5))
    assert isinstance(error, InvalidArgument)
    assert error.field == field


@pytest.mark.parametrize("served", ["prefill"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cache_salt": bytes(16)}, "cache_salt"),
        ({"turn_id": "t" * 129}, "turn_id"),
        ({"token_ids": [5]}, "token_ids"),
        ({"token_ids": [5] * (MAX_CONTEXT + 1)}, "token_ids"),
        ({"cached_len": 19}, "cached_len"),
    ],
)
async def test_a_bad_prefill_names_the_field(served: Served, changes: Any, field: str) -> None:
    fields = {"session_id": "s", "turn_id": "t", "epoch": 1, "cache_salt": SALT, "token_ids": range(1, 20)}
    call = served.stub.Prefill(worker_pb2.PrefillRequest(**(fields | changes)), timeout=5)
    error = await refused(call.read())
    assert isinstance(error, InvalidArgument)
    assert error.field == field
    assert served.rank.reservations.state().num_reservations == 0


async def test_generate_first_ends_a_push_that_was_given_up(served: Served) -> None:
    reserved = await served.stub.Reserve(reserve(), timeout=5)
    served.rank.reservations.uses.begin_receive(reserved.reservation_id, 0, 18)
    sampling = worker_pb2.ResolvedSampling(max_output_tokens=3, top_p=1.0, num_logprobs=-1)
    asked = worker_pb2.WorkerServiceGenerateRequest(reservation_id=reserved.reservation_id, epoch=1, sampling=sampling)
    frames = [frame async for frame in served.stub.Generate(asked, timeout=20)]
    assert served.aborted == [reserved.reservation_id]
    assert frames[-1].finished.num_computed_tokens == 19
    served.rank.reservations.uses.end_receive(reserved.reservation_id, 0)
    await served.stub.Release(worker_pb2.ReleaseRequest(reservation_id=reserved.reservation_id), timeout=5)


async def test_a_call_that_goes_away_or_runs_out_of_time_is_counted_out(served: Served) -> None:
    """A rank that drains waits for ``num_streams`` to fall to 0."""
    reserved = await served.stub.Reserve(reserve(), timeout=5)
    sampling = worker_pb2.ResolvedSampling(max_output_tokens=150, top_p=1.0, num_logprobs=-1)
    asked = worker_pb2.WorkerServiceGenerateRequest(reservation_id=reserved.reservation_id, epoch=1, sampling=sampling)
    call = served.stub.Generate(asked, timeout=20)
    await call.read()
    assert served.service.num_streams == 1
    call.cancel()
    async with asyncio.timeout(5):
        while served.service.num_streams or served.service.active:  # noqa: ASYNC110 - at the other end of a socket
            await asyncio.sleep(0.01)
    orphan = served.rank.reservations.get(reserved.reservation_id)
    assert orphan.time_to_live_s == ORPHAN_TIME_TO_LIVE_S, "whoever held it may be dead"
    await served.stub.Release(worker_pb2.ReleaseRequest(reservation_id=reserved.reservation_id), timeout=5)
