"""A peer in a process of its own that is killed or stopped in mid-transfer."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from seamount.wire.errors import SeamountError, Unavailable

NewRank = Callable[..., Awaitable[Any]]
NUM_TOKENS = 16_000


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_pull_from_a_peer_that_dies_keeps_what_arrived(
    new_rank: NewRank, new_peer: Any, seed: int, number: signal.Signals
) -> None:
    timeout_s = 1.5
    rank = await new_rank("here", num_pages=NUM_TOKENS // 64 + 8, timeout_s=timeout_s)
    peer = await new_peer(NUM_TOKENS, present=NUM_TOKENS - 1, seed=seed)
    ours = rank.reserve(list(range(NUM_TOKENS)))
    pulling = asyncio.create_task(
        rank.transfer.pull(
            peer=peer.rank_id,
            address=peer.address,
            remote_reservation_id=peer.reservation_id,
            reservation=ours,
            first=0,
            end=NUM_TOKENS - 1,
        )
    )
    while ours.computed_len == 0:
        assert not pulling.done()
        await asyncio.sleep(0.001)
    peer.signal(number)
    started = time.monotonic()
    with pytest.raises(Unavailable):
        await pulling
    elapsed_s = time.monotonic() - started
    assert elapsed_s < (0.5 if number is signal.SIGKILL else timeout_s + 1), elapsed_s
    arrived = ours.computed_len
    assert 0 < arrived < NUM_TOKENS - 1
    assert ours.receive is None
    rank.reservations.release(ours.id)
    rank.reservations.check_invariants()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_push_to_a_peer_that_dies_never_blocks_the_engine(
    new_rank: NewRank, new_peer: Any, seed: int, number: signal.Signals
) -> None:
    timeout_s = 1.5
    rank = await new_rank("here", num_pages=NUM_TOKENS // 64 + 8, timeout_s=timeout_s)
    peer = await new_peer(NUM_TOKENS, present=0, seed=seed)
    ours = rank.reserve(list(range(NUM_TOKENS)))
    stream = await rank.transfer.push(
        peer=peer.rank_id,
        address=peer.address,
        remote_reservation_id=peer.reservation_id,
        remote_epoch=1,
        reservation=ours,
        first=0,
        end=NUM_TOKENS - 1,
    )
    stream._outbound._max_queued_bytes = 1 << 20
    longest_s = 0.0
    for start in range(0, NUM_TOKENS, 1000):
        if start == 3000:
            peer.signal(number)
        for layer in range(3):
            before = time.monotonic()
            stream.on_layer(layer, start, start + 1000)
            longest_s = max(longest_s, time.monotonic() - before)
        await asyncio.sleep(0.001)
    assert longest_s < 0.4, longest_s
    started = time.monotonic()
    with pytest.raises(SeamountError):
        await stream.finish()
    assert time.monotonic() - started < timeout_s + 1
    assert ours.num_uses == 0


async def test_a_push_goes_on_to_another_rank_after_the_first_died(new_rank: NewRank, new_peer: Any, seed: int) -> None:
    rank, spare = await new_rank("here"), await new_rank("spare")
    rank.fill(seed)
    peer = await new_peer(500, present=0, seed=seed)
    ids = list(range(500))
    ours, theirs = rank.reserve(ids), spare.reserve(ids)
    for target, address, reservation_id in (
        (peer.rank_id, peer.address, peer.reservation_id),
        (spare.rank_id, spare.address, theirs.id),
    ):
        stream = await rank.transfer.push(
            peer=target,
            address=address,
            remote_reservation_id=reservation_id,
            remote_epoch=1,
            reservation=ours,
            first=0,
            end=499,
        )
        if target == peer.rank_id:
            peer.signal(signal.SIGKILL)
            peer.process.wait()
        for layer in range(3):
            stream.on_layer(layer, 0, 499)
        if target == peer.rank_id:
            with pytest.raises(SeamountError):
                await stream.finish()
        else:
            assert await stream.finish() == 499
    pairs = zip(rank.rows(ours, 0, 499), spare.rows(theirs, 0, 499), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


async def test_a_dead_peer_is_unavailable(new_rank: NewRank, new_peer: Any, seed: int) -> None:
    rank = await new_rank("here", timeout_s=1.0)
    peer = await new_peer(100, present=99, seed=seed)
    ours = rank.reserve(list(range(100)))
    for number in (signal.SIGSTOP, signal.SIGKILL):
        peer.signal(number)
        started = time.monotonic()
        with pytest.raises(SeamountError) as caught:
            await rank.transfer.pull(
                peer=peer.rank_id,
                address=peer.address,
                remote_reservation_id=peer.reservation_id,
                reservation=ours,
                first=0,
                end=99,
            )
        assert caught.value.code.name in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
        assert time.monotonic() - started < 3
        assert ours.receive is None
