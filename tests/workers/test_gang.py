"""The gang over loopback: threads where timing is measured, processes where a rank dies or stalls."""

import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from seamount.wire.errors import InvalidArgument, Unavailable
from seamount.workers.gang import Gang, StepHeader

TIMEOUT_S = 2.0

PEER = """
import sys, time
import torch
from seamount.workers.gang import Gang, StepHeader
torch.set_num_threads(1)
gang = Gang.join(store_host="127.0.0.1", store_port=int(sys.argv[1]), gang_id="g", rank=1, size=2, timeout_s=60,
                 host_store=False)
for _ in range(3):
    gang.agree(StepHeader(num_decode_tokens=1))
print("three", flush=True)
time.sleep(60)
"""


def on_all(gangs: list[Gang], act: Callable[[Gang], object]) -> list[object]:
    with ThreadPoolExecutor(len(gangs)) as pool:
        return list(pool.map(act, gangs))


@pytest.fixture
def pair(form_gang: Callable[..., list[Gang]]) -> Iterator[list[Gang]]:
    gangs = form_gang(2, TIMEOUT_S)
    yield gangs
    for gang in reversed(gangs):
        gang.close()


def test_gang_of_one_is_local() -> None:
    gang = Gang.join(
        store_host="192.0.2.1", store_port=1, gang_id="g", rank=0, size=1, timeout_s=0.01, host_store=False
    )
    header = StepHeader(num_decode_tokens=3)
    assert gang.group is None
    assert gang.agree(header) == [header]
    assert not gang.wait_for_work(0.0)
    gang.ring()
    assert gang.wait_for_work(0.0)
    assert not gang.wait_for_work(0.01)
    gang.ring()
    gang.hush()
    assert not gang.wait_for_work(0.0)
    gang.close()
    gang.close()


@pytest.mark.parametrize("rank", [-1, 2])
def test_rank_outside_the_gang_is_refused(rank: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Gang.join(store_host="127.0.0.1", store_port=1, gang_id="g", rank=rank, size=2, timeout_s=1, host_store=False)
    assert caught.value.field == "rank"


def test_missing_ranks_are_unavailable() -> None:
    start = time.monotonic()
    with pytest.raises(Unavailable):
        Gang.join(
            store_host="127.0.0.1",
            store_port=0,
            gang_id="g",
            rank=0,
            size=2,
            timeout_s=5,
            host_store=True,
            join_timeout_s=0.5,
        )
    assert time.monotonic() - start < 5


def test_agree_returns_every_header_in_rank_order(form_gang: Callable[..., list[Gang]]) -> None:
    gangs = form_gang(3, TIMEOUT_S)
    for round_number in range(5):
        headers = [StepHeader(num_decode_tokens=r, num_prefill_tokens=round_number, stop=r == 1) for r in range(3)]
        answers = on_all(gangs, lambda gang, headers=headers: gang.agree(headers[gang.rank]))
        assert answers == [headers] * 3
    for gang in gangs:
        gang.close()
        with pytest.raises(Unavailable):
            gang.agree(StepHeader())


def test_the_store_listens_on_the_given_address_only(pair: list[Gang]) -> None:
    listening = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    # gRPC servers that other tests left to the garbage collector listen on loopback, too, in its mapped form.
    own = {connection.laddr.ip.removeprefix("::ffff:") for connection in listening}
    assert own == {"127.0.0.1"}


def test_ring_wakes_every_rank_once_per_idle_period(form_gang: Callable[..., list[Gang]]) -> None:
    gangs = form_gang(3, TIMEOUT_S)
    for number in range(20):
        ringers = [gangs[number % 3]] if number % 4 else gangs  # sometimes all at once
        for gang in ringers:
            gang.ring()
        assert on_all(gangs, lambda gang: gang.wait_for_work(5.0)) == [True] * 3
        on_all(gangs, lambda gang: gang.agree(StepHeader()))
    for gang in gangs:
        gang.hush()
    assert on_all(gangs, lambda gang: gang.wait_for_work(0.1)) == [False] * 3
    for gang in reversed(gangs):
        gang.close()


def test_wake_latency(pair: list[Gang]) -> None:
    latencies = []

    def wait(gang: Gang) -> float:
        assert gang.wait_for_work(5.0)
        return time.perf_counter()

    with ThreadPoolExecutor(2) as pool:
        for _ in range(50):
            woken = [pool.submit(wait, gang) for gang in pair]
            time.sleep(0.005)
            rung = time.perf_counter()
            pair[0].ring()
            latencies.append(woken[1].result() - rung)
            woken[0].result()
            for gang in pair:
                pool.submit(gang.agree, StepHeader())
    print(f"peer woken {statistics.median(latencies) * 1e3:.2f} ms after ring (median), {max(latencies) * 1e3:.2f} max")
    assert statistics.median(latencies) < 0.1


def test_close_is_idempotent_and_quick(pair: list[Gang]) -> None:
    start = time.monotonic()
    for gang in (pair[1], pair[0], pair[1]):
        gang.close()
    assert time.monotonic() - start < 2
    assert all(gang.group is None for gang in pair)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gang-watch")]


def test_losing_the_store_ends_the_idle_wait(pair: list[Gang]) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(pair[1].wait_for_work, 10.0)
        pair[0].close()
        with pytest.raises(Unavailable):
            waiting.result(timeout=5)


@pytest.mark.parametrize(("signal_number", "limit_s"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, TIMEOUT_S + 1)])
def test_dead_or_stalled_peer(signal_number: signal.Signals, limit_s: float) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    peer = subprocess.Popen([sys.executable, "-c", PEER, str(port)], stdout=subprocess.PIPE, text=True)
    try:
        gang = Gang.join(
            store_host="127.0.0.1", store_port=port, gang_id="g", rank=0, size=2, timeout_s=TIMEOUT_S, host_store=True
        )
        for _ in range(3):
            gang.agree(StepHeader())
        assert peer.stdout is not None
        assert peer.stdout.readline() == "three\n"
        os.kill(peer.pid, signal_number)
        start = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            gang.agree(StepHeader())
        took_s = time.monotonic() - start
        print(f"{signal_number.name}: noticed after {took_s:.3f} s")
        assert caught.value.reason == "GANG_LOST"
        assert took_s < limit_s
        gang.close()
    finally:
        peer.kill()
        peer.wait()
