"""Migrate between two real ranks over gRPC and gloo: what arrives, and what the source keeps where it does not."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from seamount.v1 import transfer_pb2, transfer_pb2_grpc, worker_pb2
from seamount.wire.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, SeamountError, from_rpc_error
from seamount.wire.ids import GangId, RankId
from seamount.workers.migration import Migration
from seamount.workers.spec import RankSpec
from seamount.workers.transfer.frames import MAX_FRAME_TOKENS

NewRank = Callable[..., Awaitable[Any]]
PAGE = 64
IDS = [(7 * i) % 1000 for i in range(2 * MAX_FRAME_TOKENS + 100)]
END = len(IDS) // PAGE * PAGE


def migration(rank: Any, pool: str = "decode") -> Migration:
    spec = RankSpec(
        rank_id=rank.rank_id,
        gang_id=GangId("g"),
        pool=pool,  # type: ignore[arg-type]
        gang_rank=0,
        gang_size=1,
        model_path=Path(),
        layout="fp8",
        dtype="float32",
        num_pages=64,
        max_batch_tokens=128,
        prefill_chunk_tokens=64,
        max_running=16,
        max_context_tokens=4096,
        step_timeout_s=5.0,
    )
    return Migration(spec=spec, reservations=rank.reservations, transfer=rank.transfer)


async def moved(at: Migration, source: Any, reservation: Any, *, epoch: int | None = None) -> Any:
    request = worker_pb2.MigrateRequest(
        reservation_id=reservation.id,
        epoch=reservation.epoch if epoch is None else epoch,
        source_rank_id=source.rank_id,
        source_address=source.address,
    )
    async with aclosing(at.run(request)) as frames:
        async for frame in frames:
            if frame.WhichOneof("event") == "finished":
                return frame.finished
    raise AssertionError("no end")


def left(rank: Any, token_ids: list[int], seed: int) -> list[Any]:
    """The session leaves these tokens at the rank; returns the bytes of the full pages."""
    rank.fill(seed)
    reservation = rank.reserve(token_ids)
    rank.reservations.advance(reservation.id, len(token_ids))
    rows = rank.rows(reservation, 0, len(token_ids) // PAGE * PAGE)
    rank.reservations.release(reservation.id, len(token_ids))
    return rows


def assert_untouched(source: Any) -> None:
    """The source holds the session, tail and all, and nothing is pinned."""
    assert source.reservations.sessions.cached() == ["session"]
    assert source.reservations.state().num_reservations == 0
    again = source.reserve([*IDS, 1], epoch=9)
    assert again.cached_len == len(IDS)
    source.reservations.release(again.id)


async def test_a_session_moves_with_every_plane_and_the_source_is_free(new_rank: NewRank, seed: int) -> None:
    source, target = await new_rank("source"), await new_rank("target")
    rows = left(source, IDS, seed)
    ours = target.reserve([*IDS, 5, 6], epoch=2)
    finished = await moved(migration(target), source, ours)
    assert (finished.num_migrated_tokens, finished.cached_len, finished.is_complete) == (END, END, True)
    assert all(one.equal(other) for one, other in zip(rows, target.rows(ours, 0, END), strict=True))
    assert source.reservations.sessions.cached() == []
    assert source.reservations.state().num_free == source.reservations.num_pages
    target.reservations.release(ours.id)
    shared = target.reserve(IDS, session_id="another")
    assert shared.cached_len == END, "the pages are in the tree"


async def test_the_source_waits_for_its_own_sender_before_it_gives_up(
    new_rank: NewRank, seed: int, monkeypatch: Any
) -> None:
    source, target = await new_rank("source"), await new_rank("target")
    left(source, IDS, seed)
    end_use = source.reservations.uses.end
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(source.reservations.uses, "end", lambda one: loop.call_later(0.2, end_use, one))
    ours = target.reserve([*IDS, 5], epoch=2)
    assert (await moved(migration(target), source, ours)).is_complete
    assert source.reservations.state().num_free == source.reservations.num_pages


async def test_it_is_idempotent_alone_and_together(new_rank: NewRank, seed: int) -> None:
    source, target = await new_rank("source"), await new_rank("target")
    left(source, IDS, seed)
    ours, at = target.reserve([*IDS, 5], epoch=2), migration(target)
    first, second = await asyncio.gather(moved(at, source, ours), moved(at, source, ours))
    assert first == second, "one move for both callers"
    again = await moved(at, source, ours)
    assert (again.num_migrated_tokens, again.cached_len) == (0, END)


async def test_what_is_here_is_not_moved_again(new_rank: NewRank, seed: int) -> None:
    source, target = await new_rank("source"), await new_rank("target")
    left(source, IDS, seed)
    ours = target.reserve([*IDS, 5], epoch=2)
    target.reservations.advance(ours.id, 100)
    finished = await moved(migration(target), source, ours)
    assert (finished.num_migrated_tokens, finished.is_complete) == (END - 100, True)


async def test_a_damaged_frame_leaves_the_source_as_it_was(new_rank: NewRank, seed: int, monkeypatch: Any) -> None:
    source, target = await new_rank("source"), await new_rank("target")
    left(source, IDS, seed)
    scout = target.reserve([1] * 70, session_id="scout")
    await moved(migration(target), source, scout)  # the link is built
    accepted = next(iter(source.transfer._links._accepted.values())).link
    monkeypatch.setattr(accepted, "_group", Flipping(accepted._group, 5, seed))
    ours, at = target.reserve([*IDS, 5], epoch=2), migration(target)
    finished = await moved(at, source, ours)
    assert (finished.cached_len, finished.is_complete) == (MAX_FRAME_TOKENS, False)
    assert source.reservations.sessions.cached() == ["session"]
    again = await moved(at, source, ours)
    assert (again.num_migrated_tokens, again.is_complete) == (END - MAX_FRAME_TOKENS, True)


async def test_a_source_that_knows_better_refuses_and_is_as_it_was(new_rank: NewRank, seed: int) -> None:
    source, target = await new_rank("source"), await new_rank("target")
    left(source, IDS, seed)
    later = source.reserve([*IDS, 1], epoch=5)
    source.reservations.release(later.id)
    ours = target.reserve([*IDS, 5], epoch=4)
    with pytest.raises(Aborted) as caught:
        await moved(migration(target), source, ours)
    assert caught.value.reason == "STALE_EPOCH"
    assert ours.computed_len == 0
    assert_untouched(source)


async def test_a_caller_that_leaves_ends_the_move_and_the_source_is_as_it_was(
    new_rank: NewRank, seed: int, monkeypatch: Any
) -> None:
    source, target = await new_rank("source"), await new_rank("target")
    left(source, IDS, seed)
    ours, at = target.reserve([*IDS, 5], epoch=2), migration(target)
    began = asyncio.Event()

    async def never(**arguments: Any) -> int:
        began.set()
        await asyncio.Event().wait()
        return 0

    monkeypatch.setattr(target.transfer, "pull", never)
    task = asyncio.create_task(moved(at, source, ours))
    await began.wait()
    assert source.reservations.state().num_reservations == 1, "the source holds its pages"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_untouched(source)


async def test_a_source_that_dies_or_hangs_fails_the_move_in_time(new_peer: Any, new_rank: NewRank, seed: int) -> None:
    target = await new_rank("target", timeout_s=1.0)
    peer = await new_peer(300, present=200, seed=seed)
    ours = target.reserve(IDS[:300], epoch=2)
    peer.signal(signal.SIGSTOP)
    with pytest.raises(SeamountError):
        async with asyncio.timeout(8):
            await moved(migration(target), peer, ours)
    peer.signal(signal.SIGKILL)
    with pytest.raises(SeamountError):
        async with asyncio.timeout(8):
            await moved(migration(target), peer, ours)
    assert ours.receive is None


async def test_what_is_refused_before_anything_is_asked(new_rank: NewRank) -> None:
    target = await new_rank("target")
    ours = target.reserve(IDS[:100], epoch=2)
    at = migration(target)

    class Nobody:
        rank_id, address = RankId("nobody"), "127.0.0.1:1"

    with pytest.raises(Aborted):
        await moved(at, Nobody, ours, epoch=1)
    with pytest.raises(FailedPrecondition):
        await moved(migration(target, "prefill"), Nobody, ours)
    with pytest.raises(InvalidArgument) as caught:
        await moved(at, target, ours)
    assert caught.value.field == "source_rank_id"
    target.reservations.release(ours.id)
    with pytest.raises(NotFound):
        await moved(at, Nobody, ours)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"session_id": "s" * 129}, "session_id"),
        ({"token_ids": []}, "token_ids"),
        ({"cache_root": bytes(31)}, "cache_root"),
        ({"time_to_live": None}, "time_to_live"),
    ],
)
async def test_a_bad_hold_names_the_field(new_rank: NewRank, changes: dict[str, Any], field: str) -> None:
    source = await new_rank("source")
    fields = {
        "session_id": "s",
        "epoch": 1,
        "cache_root": bytes(32),
        "token_ids": [1, 2],
        "time_to_live": duration_pb2.Duration(seconds=5),
    }
    async with grpc.aio.insecure_channel(source.address) as channel:
        stub = transfer_pb2_grpc.TransferServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Hold(
                transfer_pb2.HoldRequest(**(fields | changes)),
                metadata=(("authorization", "Bearer a-token-of-the-tests"),),
                timeout=5,
            )
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidArgument)
    assert error.field == field


class Flipping:
    """A group that damages one bit of the n-th payload on its way out."""

    def __init__(self, group: Any, number: int, bit: int) -> None:
        self._group, self._left, self._bit = group, number, bit

    def send(self, tensors: list[Any], peer: int, tag: int) -> Any:
        if tag == 1:
            if self._left == 0:
                tensors = [tensors[0].clone()]
                tensors[0][self._bit // 8 % tensors[0].numel()] ^= 1 << self._bit % 8
            self._left -= 1
        return self._group.send(tensors, peer, tag)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)
