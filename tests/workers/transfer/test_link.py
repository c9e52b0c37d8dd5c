"""Two ends of a pair link in one process, over a real gloo group."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, ProcessGroupGloo

from seamount.wire.errors import DataLoss, SeamountError, Unavailable
from seamount.workers.transfer.frames import FrameShape, data_frame
from seamount.workers.transfer.link import PairLink

SHAPE = FrameShape(num_layers=2, latent_bytes=12, index_bytes=4)
STALL_S = 0.6


class Rows:
    """A sink that remembers what it got."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, int, int]] = []
        self.num_damaged = 0

    def accept(self, layer: int, first: int, latent: torch.Tensor, index: torch.Tensor) -> None:
        assert (latent.shape[1], index.shape[1]) == (12, 4)
        self.taken.append((layer, first, int(latent.sum()) + int(index.sum())))

    def damaged(self, layer: int, first: int, count: int) -> None:
        self.num_damaged += 1


def frame(transfer_id: int, first: int, value: int = 1) -> Any:
    rows = torch.full((3, 16), value, dtype=torch.uint8)
    return data_frame(transfer_id, 1, first, rows[:, :12], rows[:, 12:])


def groups() -> list[ProcessGroupGloo]:
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: ProcessGroupGloo(store, rank, 2, timedelta(seconds=5)), range(2)))


@pytest.fixture
def pair() -> Iterator[tuple[PairLink, PairLink]]:
    made = groups()
    links = [PairLink("0123456789", made.pop(0), SHAPE, stall_timeout_s=STALL_S) for _ in range(2)]
    yield links[0], links[1]
    for link in links:
        link.close()
    assert all(link.join(STALL_S + 2) for link in links)
    assert all(link._group is None for link in links)


def test_transfers_interleave_in_both_directions(pair: tuple[PairLink, PairLink]) -> None:
    waits = []
    sinks: dict[tuple[int, int], Rows] = {}
    for side, other in ((0, 1), (1, 0)):
        for transfer_id in (1, 2, 3):
            sink = sinks[side, transfer_id] = Rows()
            inbound = pair[other].expect(transfer_id, sink)
            pair[other].start(inbound)
            outbound = pair[side].send(transfer_id)
            for at in range(20):
                outbound.put(frame(transfer_id, at, transfer_id + side), 1.0)
            outbound.end()
            waits += [inbound.ended, outbound.ended]
    for ended in waits:
        ended.result(5)
    for (side, transfer_id), sink in sinks.items():
        assert sink.taken == [(1, at, 48 * (transfer_id + side)) for at in range(20)]
    assert all(link.is_idle and link.error is None for link in pair)


def test_a_silent_open_transfer_outlives_many_stall_times(pair: tuple[PairLink, PairLink]) -> None:
    sink = Rows()
    inbound = pair[1].expect(1, sink)
    pair[1].start(inbound)
    outbound = pair[0].send(1)
    time.sleep(3 * STALL_S)
    outbound.put(frame(1, 0))
    outbound.end()
    inbound.ended.result(5)
    assert sink.taken == [(1, 0, 48)]


@pytest.mark.parametrize("waiting", ["sender", "receiver"])
def test_a_peer_that_does_not_move_is_found_within_the_stall_time(
    pair: tuple[PairLink, PairLink], waiting: str
) -> None:
    started = time.monotonic()
    if waiting == "receiver":
        inbound = pair[1].expect(1, Rows())
        pair[1].start(inbound)
        ended = inbound.ended
    else:
        outbound = pair[0].send(1)
        outbound.put(frame(1, 0))
        ended = outbound.ended
    with pytest.raises(Unavailable) as caught:
        ended.result(STALL_S + 2)
    assert caught.value.reason == "LINK_LOST"
    assert STALL_S * 0.8 < time.monotonic() - started < STALL_S + 1
    with pytest.raises(Unavailable):
        pair[0 if waiting == "sender" else 1].send(2)


def test_closing_wakes_both_sides_at_once(pair: tuple[PairLink, PairLink]) -> None:
    inbound = pair[1].expect(1, Rows())
    pair[1].start(inbound)
    back = pair[0].expect(1, Rows())
    pair[0].start(back)
    time.sleep(0.1)  # both threads wait inside gloo
    started = time.monotonic()
    pair[0].close()
    for ended in (inbound.ended, back.ended):
        with pytest.raises(Unavailable):
            ended.result(2)
    assert all(link.join(1) for link in pair)
    assert time.monotonic() - started < STALL_S / 2


def test_other_groups_are_unharmed_by_a_lost_link(pair: tuple[PairLink, PairLink]) -> None:
    gang = groups()
    pair[0].close()
    results = [torch.full((4,), rank + 1) for rank in range(2)]

    def add(rank: int) -> None:
        gang[rank].allreduce([results[rank]]).wait(timedelta(seconds=5))

    threads = [threading.Thread(target=add, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert all(result.tolist() == [3] * 4 for result in results)


def test_a_frame_that_nobody_awaits_ends_the_link(pair: tuple[PairLink, PairLink]) -> None:
    inbound = pair[1].expect(1, Rows())
    pair[1].start(inbound)
    pair[0].send(2).put(frame(2, 0))
    with pytest.raises(DataLoss):
        inbound.ended.result(2)


def test_detached_transfers_are_drained_not_written(pair: tuple[PairLink, PairLink]) -> None:
    sink, other = Rows(), Rows()
    inbound, second = pair[1].expect(1, sink), pair[1].expect(2, other)
    pair[1].start(inbound)
    pair[1].start(second)
    inbound.detach()
    first_out, second_out = pair[0].send(1), pair[0].send(2)
    for at in range(5):
        first_out.put(frame(1, at))
        second_out.put(frame(2, at))
    first_out.end()
    second_out.end()
    second.ended.result(3)
    inbound.ended.result(3)
    assert sink.taken == []
    assert len(other.taken) == 5


def test_refused_transfers_leave_no_receive_behind(pair: tuple[PairLink, PairLink]) -> None:
    inbound = pair[1].expect(1, Rows())
    with pytest.raises(DataLoss):
        pair[1].expect(1, Rows())
    pair[1].forget(inbound)
    time.sleep(STALL_S * 1.5)
    assert all(link.error is None and link.is_idle for link in pair)


def test_a_full_queue_refuses_and_waits_only_as_told(pair: tuple[PairLink, PairLink]) -> None:
    outbound = pair[0].send(1)  # the peer posts no receive
    outbound._max_queued_bytes = 100
    outbound.put(frame(1, 0))
    assert outbound.has_room()
    outbound.put(frame(1, 1))
    assert not outbound.has_room()
    started = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        outbound.put(frame(1, 2), 0.1)
    assert caught.value.reason == "LINK_STALLED"
    assert 0.08 < time.monotonic() - started < 0.4


def test_a_sink_that_fails_ends_the_link_not_the_process(pair: tuple[PairLink, PairLink]) -> None:
    class Broken(Rows):
        def accept(self, *arguments: Any) -> None:
            raise ValueError("a defect")

    inbound = pair[1].expect(1, Broken())
    pair[1].start(inbound)
    outbound = pair[0].send(1)
    outbound.put(frame(1, 0))
    with pytest.raises(SeamountError):
        inbound.ended.result(2)
