"""Two real ranks over gRPC and gloo, in one process; faults of processes are in test_faults.py."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
import torch

from seamount.v1 import transfer_pb2, transfer_pb2_grpc
from seamount.wire.errors import (
    Aborted,
    FailedPrecondition,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    SeamountError,
    Unauthenticated,
    Unavailable,
    from_rpc_error,
)
from seamount.workers.transfer.frames import MAX_FRAME_TOKENS

NewRank = Callable[..., Awaitable[Any]]
IDS = [(7 * i) % 1000 for i in range(2 * MAX_FRAME_TOKENS + 100)]


async def pull(puller: Any, source: Any, theirs: Any, ours: Any, first: int, end: int) -> int:
    return await puller.transfer.pull(
        peer=source.rank_id,
        address=source.address,
        remote_reservation_id=theirs.id,
        reservation=ours,
        first=first,
        end=end,
    )


async def push(source: Any, target: Any, ours: Any, theirs: Any, first: int, end: int) -> Any:
    return await source.transfer.push(
        peer=target.rank_id,
        address=target.address,
        remote_reservation_id=theirs.id,
        remote_epoch=theirs.epoch,
        reservation=ours,
        first=first,
        end=end,
    )


def assert_same_rows(
    left: Any, left_reservation: Any, right: Any, right_reservation: Any, first: int, end: int
) -> None:
    pairs = zip(left.rows(left_reservation, first, end), right.rows(right_reservation, first, end), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def feed_in_chunks(stream: Any, first: int, end: int, chunk: int, num_layers: int = 3) -> None:
    """Calls ``on_layer`` as an engine does: chunk by chunk, each layer in turn."""
    for start in range(first, end, chunk):
        for layer in range(num_layers):
            stream.on_layer(layer, start, min(start + chunk, end))


@pytest.mark.parametrize("name", ["fp8", "bf16", "exact"])
@pytest.mark.parametrize(("first", "end"), [(0, 1), (0, 64), (3, 200), (65, 2 * MAX_FRAME_TOKENS + 99)])
async def test_pulled_entries_equal_byte_for_byte(
    new_rank: NewRank, layouts: Any, seed: int, name: str, first: int, end: int
) -> None:
    prefill = await new_rank("prefill", layout=layouts(name))
    decode = await new_rank("decode", layout=layouts(name))
    decode.fill(seed)
    decode.reserve(IDS[100:400], session_id="other")  # the same positions lie on other pages
    source, target = decode.reserve(IDS), prefill.reserve(IDS)
    assert source.pages != target.pages
    decode.reservations.advance(source.id, end)
    prefill.reservations.advance(target.id, first)
    planes = (*prefill.planes.latent, *prefill.planes.index)
    before = [plane.clone() for plane in planes]
    assert await pull(prefill, decode, source, target, first, end) == end == target.computed_len
    assert_same_rows(prefill, target, decode, source, first, end)
    written = set(target.pages[first // 64 : (end + 63) // 64])
    others = [page for page in range(planes[0].shape[0]) if page not in written]
    assert all(torch.equal(plane[others], old[others]) for plane, old in zip(planes, before, strict=True))
    assert any(row.any() for row in prefill.rows(target, end - 1, end))


@pytest.mark.parametrize(("name", "chunk"), [("fp8", 100), ("bf16", 512), ("exact", 3000)])
async def test_pushed_entries_equal_byte_for_byte(
    new_rank: NewRank, layouts: Any, seed: int, name: str, chunk: int
) -> None:
    first, end = 70, len(IDS) - 1
    prefill = await new_rank("prefill", layout=layouts(name))
    decode = await new_rank("decode", layout=layouts(name))
    prefill.fill(seed)
    decode.reserve(IDS[100:400], session_id="other")
    source, target = prefill.reserve(IDS), decode.reserve(IDS)
    decode.reservations.advance(target.id, first)
    stream = await push(prefill, decode, source, target, first, end)
    await asyncio.to_thread(feed_in_chunks, stream, first, end, chunk)
    assert await stream.finish() == end == target.computed_len
    assert_same_rows(prefill, source, decode, target, first, end)
    assert not any(row.any() for row in decode.rows(target, first - 1, first))
    assert not any(row.any() for row in decode.rows(target, end, end + 1))
    assert prefill.transfer.push_bytes_per_s > 0
    assert prefill.transfer.kv_bytes_per_token == 3 * layouts(name).bytes_per_token


async def test_a_recomputed_stretch_is_sent_once_and_gaps_are_filled(new_rank: NewRank, seed: int) -> None:
    """After a preemption the engine begins earlier again, or later where it found pages cached."""
    prefill, decode = await new_rank("prefill"), await new_rank("decode")
    prefill.fill(seed)
    source, target = prefill.reserve(IDS[:500]), decode.reserve(IDS[:500])
    stream = await push(prefill, decode, source, target, 0, 499)
    for start, stop in ((0, 100), (0, 60), (60, 200), (300, 450), (450, 499)):
        for layer in range(3):
            stream.on_layer(layer, start, stop)
    assert await stream.finish() == 499
    assert_same_rows(prefill, source, decode, target, 0, 499)


async def test_an_unfinished_push_leaves_a_verified_prefix(new_rank: NewRank, seed: int) -> None:
    prefill, decode = await new_rank("prefill"), await new_rank("decode")
    prefill.fill(seed)
    source, target = prefill.reserve(IDS[:500]), decode.reserve(IDS[:500])
    stream = await push(prefill, decode, source, target, 0, 499)
    feed_in_chunks(stream, 0, 300, 100)
    stream.on_layer(0, 300, 400)  # the other layers never come
    assert await stream.finish() == 300 == target.computed_len
    assert_same_rows(prefill, source, decode, target, 0, 300)
    stream.on_layer(1, 300, 400)  # late calls are harmless


async def test_progress_counts_before_the_push_is_over(new_rank: NewRank, seed: int) -> None:
    prefill, decode = await new_rank("prefill"), await new_rank("decode")
    source, target = prefill.reserve(IDS[:500]), decode.reserve(IDS[:500])
    stream = await push(prefill, decode, source, target, 0, 499)
    feed_in_chunks(stream, 0, 130, 130)
    await until(lambda: target.computed_len == 130)
    stream.close()
    await until(lambda: target.receive is None)
    assert target.computed_len == 130
    assert (
        decode.reservations.reserve(
            session_id="session",
            turn_id="turn",
            epoch=1,
            attempt=1,
            salt=bytes(32),
            token_ids=IDS[:500],
            time_to_live_s=9,
        ).cached_len
        == 130
    )


async def test_several_transfers_share_one_link_both_ways(new_rank: NewRank, seed: int) -> None:
    prefill, decode = await new_rank("prefill", num_pages=200), await new_rank("decode", num_pages=200)
    prefill.fill(seed)
    num_tokens = [130 + 61 * i for i in range(8)]

    def reserve(rank: Any, i: int, way: str) -> Any:
        return rank.reservations.reserve(
            session_id=f"{way}{i}",
            turn_id="t",
            epoch=1,
            attempt=1,
            salt=bytes([i]) * 32,
            token_ids=IDS[: num_tokens[i]],
            time_to_live_s=60,
        )

    async def push_one(i: int) -> None:
        source, target = reserve(prefill, i, "push"), reserve(decode, i, "push")
        end = num_tokens[i] - 1
        stream = await push(prefill, decode, source, target, 0, end)
        for start in range(0, end, 40):
            await asyncio.to_thread(feed_in_chunks, stream, start, min(start + 40, end), 40)
        assert await stream.finish() == end
        assert_same_rows(prefill, source, decode, target, 0, end)

    async def pull_one(i: int) -> None:
        source, target = reserve(decode, i, "pull"), reserve(prefill, i, "pull")
        for rows, plane in zip(range(6), (*decode.planes.latent, *decode.planes.index), strict=True):
            plane[source.pages] = rows * 16 + i
        decode.reservations.advance(source.id, num_tokens[i] - 1)
        assert await pull(prefill, decode, source, target, 0, num_tokens[i] - 1) == num_tokens[i] - 1
        assert_same_rows(prefill, target, decode, source, 0, num_tokens[i] - 1)

    await asyncio.gather(*(push_one(i) for i in range(4)), *(pull_one(i) for i in range(4, 8)))
    assert len(prefill.transfer._links._opened) == 1
    assert len(decode.transfer._links._accepted) == 1


async def test_a_full_queue_never_blocks_the_engine(new_rank: NewRank, seed: int, monkeypatch: Any) -> None:
    prefill, decode = await new_rank("prefill"), await new_rank("decode")
    prefill.fill(seed)
    source, target = prefill.reserve(IDS), decode.reserve(IDS)
    stream = await push(prefill, decode, source, target, 0, 2000)
    stream._outbound._max_queued_bytes = 50_000  # room for a frame or two
    released = threading.Event()
    group = link_of(prefill)._group
    monkeypatch.setattr(link_of(prefill), "_group", Slow(group, released))
    loop = asyncio.get_running_loop()
    started = loop.time()
    feed_in_chunks(stream, 0, 2000, 100)
    assert loop.time() - started < 0.5
    assert stream._outbound._num_queued_bytes < 150_000
    released.set()
    assert await stream.finish() == 2000
    assert_same_rows(prefill, source, decode, target, 0, 2000)


class Slow:
    """A group whose sends wait until they are released."""

    def __init__(self, group: Any, released: threading.Event) -> None:
        self._group, self._released = group, released

    def send(self, *arguments: Any) -> Any:
        self._released.wait(3)
        return self._group.send(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


class Flipping:
    """A group that damages one bit of the n-th payload on its way out."""

    def __init__(self, group: Any, number: int, bit: int) -> None:
        self._group, self._left, self._bit = group, number, bit

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
        if tag == 1:
            if self._left == 0:
                tensors = [tensors[0].clone()]
                tensors[0][self._bit // 8 % tensors[0].numel()] ^= 1 << self._bit % 8
            self._left -= 1
        return self._group.send(tensors, peer, tag)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def link_of(rank: Any) -> Any:
    return next(iter(rank.transfer._links._opened.values())).link


async def test_a_damaged_frame_is_seen_and_what_lies_behind_it_not_taken(
    new_rank: NewRank, seed: int, monkeypatch: Any
) -> None:
    """Frame 4 is layer 1 of the second chunk: positions from 100 on lack it, those before it are verified."""
    prefill, decode = await new_rank("prefill"), await new_rank("decode")
    prefill.fill(seed)
    source, target = prefill.reserve(IDS[:500]), decode.reserve(IDS[:500])
    stream = await push(prefill, decode, source, target, 0, 499)
    link = link_of(prefill)
    monkeypatch.setattr(link, "_group", Flipping(link._group, 4, seed))
    feed_in_chunks(stream, 0, 499, 100)
    assert await stream.finish() == 100 == target.computed_len
    assert_same_rows(prefill, source, decode, target, 0, 100)
    assert link.error is None  # the link itself is sound
    again = await push(prefill, decode, source, target, 100, 499)
    feed_in_chunks(again, 100, 499, 100)
    assert await again.finish() == 499
    assert_same_rows(prefill, source, decode, target, 0, 499)


async def test_a_damaged_pull_tells_its_verified_length(new_rank: NewRank, seed: int, monkeypatch: Any) -> None:
    prefill, decode = await new_rank("prefill"), await new_rank("decode")
    decode.fill(seed)
    source, target = decode.reserve(IDS), prefill.reserve(IDS)
    decode.reservations.advance(source.id, 2000)
    assert await pull(prefill, decode, source, target, 0, 64) == 64
    accepted = next(iter(decode.transfer._links._accepted.values())).link
    monkeypatch.setattr(accepted, "_group", Flipping(accepted._group, 5, seed))
    assert await pull(prefill, decode, source, target, 64, 2000) == 64 + MAX_FRAME_TOKENS == target.computed_len


async def test_ranks_that_differ_are_refused_by_name(new_rank: NewRank, layouts: Any) -> None:
    decode = await new_rank("decode")
    theirs = decode.reserve(IDS[:100])
    decode.reservations.advance(theirs.id, 99)
    for options, field in (
        ({"layout": layouts("bf16")}, "layout_signature"),
        ({"fingerprint": "another"}, "fingerprint"),
        ({"num_layers": 4}, "num_layers"),
    ):
        other = await new_rank("other", **options)
        ours = other.reserve(IDS[:100])
        with pytest.raises(FailedPrecondition, match=field) as caught:
            await pull(other, decode, theirs, ours, 0, 99)
        assert caught.value.reason == "LINK_MISMATCH"
        assert caught.value.metadata["caller"] in caught.value.message
        assert caught.value.metadata["callee"] in caught.value.message
        with pytest.raises(FailedPrecondition, match=field):
            await push(other, decode, ours, theirs, 0, 99)
        assert ours.receive is None


async def test_refusals_leave_the_link_and_the_reservations_alone(new_rank: NewRank, seed: int) -> None:
    prefill, decode = await new_rank("prefill"), await new_rank("decode")
    decode.fill(seed)
    theirs, ours = decode.reserve(IDS[:300]), prefill.reserve(IDS[:300])
    decode.reservations.advance(theirs.id, 200)
    assert await pull(prefill, decode, theirs, ours, 0, 10) == 10
    link = link_of(prefill)
    with pytest.raises(OutOfRange, match="200 are present"):
        await pull(prefill, decode, theirs, ours, 10, 201)
    with pytest.raises(OutOfRange):
        await push(prefill, decode, ours, theirs, 250, 299)  # a gap after 200
    with pytest.raises(OutOfRange):
        await push(prefill, decode, ours, theirs, 200, 10_000)
    stale = prefill.transfer.push(
        peer=decode.rank_id,
        address=decode.address,
        remote_reservation_id=theirs.id,
        remote_epoch=2,
        reservation=ours,
        first=200,
        end=299,
    )
    with pytest.raises(Aborted) as caught:
        await stale
    assert caught.value.reason == "STALE_EPOCH"
    decode.reservations.release(theirs.id)
    with pytest.raises(NotFound):
        await pull(prefill, decode, theirs, ours, 10, 200)
    with pytest.raises(NotFound):
        await push(prefill, decode, ours, theirs, 200, 299)
    assert link_of(prefill) is link
    assert link.error is None
    assert ours.receive is None


async def test_a_peer_without_the_token_is_refused(new_rank: NewRank) -> None:
    decode, stranger = await new_rank("decode"), await new_rank("stranger", worker_token=None)
    theirs, ours = decode.reserve(IDS[:100]), stranger.reserve(IDS[:100])
    with pytest.raises(Unauthenticated):
        await pull(stranger, decode, theirs, ours, 0, 99)


async def test_a_strange_address_is_refused_before_the_library_reads_it(new_rank: NewRank) -> None:
    decode = await new_rank("decode")
    links = decode.transfer._links
    for address in (b"", b"\xff" * 8, b"x" * 5000, bytes(170)):
        async with grpc.aio.insecure_channel(decode.address) as channel:
            stub = transfer_pb2_grpc.TransferServiceStub(channel)
            request = transfer_pb2.OpenLinkRequest(
                caller_rank_id="x",
                link_id="y",
                epoch=1,
                address=address,
                protocol_version=1,
                layout_signature=links.agreement.layout_signature,
                num_layers=3,
                fingerprint="model",
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.OpenLink(request, metadata=links.metadata, timeout=5)
        error = from_rpc_error(caught.value)
        assert (error.field, error.code) == ("address", grpc.StatusCode.INVALID_ARGUMENT)
    assert not links._accepted


async def test_idle_links_are_closed_beyond_the_cap_and_opened_again(new_rank: NewRank, seed: int) -> None:
    prefill = await new_rank("prefill", max_links=2)
    decodes = [await new_rank(f"decode-{i}") for i in range(3)]
    ours = prefill.reserve(IDS[:300])
    for i, decode in enumerate((*decodes, decodes[0])):
        theirs = decode.reserve(IDS[:300], turn_id=f"turn-{i}", epoch=i + 1)
        decode.reservations.advance(theirs.id, 299)
        end = 70 * (i + 1)
        assert await pull(prefill, decode, theirs, ours, 70 * i, end) == end
        open_peers = set(prefill.transfer._links._opened)
        assert decode.rank_id in open_peers
        assert len(open_peers) <= 2
    assert decodes[1].rank_id not in open_peers  # the least recently used


async def test_links_in_use_are_never_closed_for_room(new_rank: NewRank) -> None:
    prefill = await new_rank("prefill", max_links=1)
    one, other = await new_rank("one"), await new_rank("other")
    ours, at_one, at_other = prefill.reserve(IDS[:300]), one.reserve(IDS[:300]), other.reserve(IDS[:300])
    stream = await push(prefill, one, ours, at_one, 0, 299)
    with pytest.raises(ResourceExhausted) as caught:
        await push(prefill, other, ours, at_other, 0, 299)
    assert caught.value.reason == "LINKS_BUSY"
    feed_in_chunks(stream, 0, 299, 299)
    assert await stream.finish() == 299
    stream = await push(prefill, other, ours, at_other, 0, 299)
    feed_in_chunks(stream, 0, 299, 299)
    assert await stream.finish() == 299


async def test_a_lost_link_is_built_anew_on_the_next_use(new_rank: NewRank, seed: int) -> None:
    prefill, decode = await new_rank("prefill"), await new_rank("decode")
    decode.fill(seed)
    theirs, ours = decode.reserve(IDS[:500]), prefill.reserve(IDS[:500])
    decode.reservations.advance(theirs.id, 499)
    assert await pull(prefill, decode, theirs, ours, 0, 100) == 100
    first = link_of(prefill)
    next(iter(decode.transfer._links._accepted.values())).link.close()  # the peer lost it; this side does not know
    assert await pull(prefill, decode, theirs, ours, 100, 200) == 200
    second = link_of(prefill)
    assert second is not first
    second.close()  # this side lost it
    assert await pull(prefill, decode, theirs, ours, 200, 499) == 499
    assert link_of(prefill) not in (first, second)
    assert_same_rows(prefill, ours, decode, theirs, 0, 499)
    assert first.join(2)
    assert second.join(2)


async def test_a_superseded_reservation_frees_its_pages_at_once(new_rank: NewRank) -> None:
    prefill, decode = await new_rank("prefill"), await new_rank("decode", num_pages=12)
    ours, theirs = prefill.reserve(IDS[:500]), decode.reserve(IDS[:500])
    stream = await push(prefill, decode, ours, theirs, 0, 499)
    feed_in_chunks(stream, 0, 100, 100)
    await until(lambda: theirs.computed_len == 100)
    with pytest.raises(ResourceExhausted):  # the receive still holds the pages at this moment
        decode.reserve(IDS[:500], epoch=2)
    await until(lambda: decode.reservations.state().num_reservations == 0)
    assert decode.reserve(IDS[:500], epoch=2).cached_len >= 64
    feed_in_chunks(stream, 100, 499, 100)  # goes nowhere, and writes nowhere
    with pytest.raises(SeamountError):
        await stream.finish()


async def test_a_later_push_takes_over_from_one_that_was_given_up(new_rank: NewRank, seed: int) -> None:
    """The first prefill rank hangs with its push open; the router has sent another one."""
    hung, other, decode = await new_rank("hung"), await new_rank("other"), await new_rank("decode")
    hung.fill(seed)
    other.fill(seed + 1)
    theirs = decode.reserve(IDS[:300])
    from_hung, ours = hung.reserve(IDS[:300]), other.reserve(IDS[:300])
    stuck = await push(hung, decode, from_hung, theirs, 0, 299)
    feed_in_chunks(stuck, 0, 100, 100)
    await until(lambda: theirs.computed_len == 100)
    stream = await push(other, decode, ours, theirs, 100, 299)
    feed_in_chunks(stuck, 100, 299, 100)  # it wakes up, and writes nowhere
    feed_in_chunks(stream, 100, 299, 100)
    assert await stream.finish() == 299
    assert theirs.computed_len == 299
    assert_same_rows(other, ours, decode, theirs, 100, 299)
    with pytest.raises(SeamountError):
        await stuck.finish()


async def test_a_receive_can_be_ended_before_its_first_frame(new_rank: NewRank) -> None:
    """What a Generate does where the prefill rank that pushed has died or hangs."""
    prefill, decode = await new_rank("prefill"), await new_rank("decode")
    ours, theirs = prefill.reserve(IDS[:300]), decode.reserve(IDS[:300])
    stream = await push(prefill, decode, ours, theirs, 0, 299)
    assert theirs.receive is not None
    decode.transfer.abort(theirs.id)
    await until(lambda: theirs.receive is None)
    with pytest.raises(SeamountError):
        await stream.finish()


async def test_closing_a_rank_ends_its_transfers(new_rank: NewRank) -> None:
    prefill, decode = await new_rank("prefill"), await new_rank("decode")
    ours, theirs = prefill.reserve(IDS[:500]), decode.reserve(IDS[:500])
    stream = await push(prefill, decode, ours, theirs, 0, 499)
    await decode.transfer.close()
    await until(lambda: theirs.receive is None)
    with pytest.raises(Unavailable):
        await stream.finish()
    assert stream.failed


async def until(condition: Callable[[], bool], timeout_s: float = 3.0) -> None:
    for _ in range(int(timeout_s / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition did not come true in time")
