"""Pages that leave the device come back: an engine with too few pages for its sessions says what a roomy one says."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from seamount.kernels.layout import CachePlanes
from seamount.wire.errors import ResourceExhausted
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.cache.retention import Tier
from seamount.workers.engine import Engine
from seamount.workers.gang import Gang
from seamount.workers.model.transformer import Transformer
from seamount.workers.requests import EngineRequest, SamplingParams
from seamount.workers.scheduler import EngineLimits
from seamount.workers.tiers.disk import DiskFile, identity_of
from seamount.workers.tiers.host import HostMemory
from seamount.workers.tiers.images import image_bytes
from seamount.workers.tiers.mover import Mover

from .conftest import NEVER_EOS, SALT, WAIT_S, Client

GREEDY = SamplingParams(temperature=0.0, seed=1, max_output_tokens=9)
FINGERPRINT = "f"


@dataclass
class TieredRank:
    """An engine whose pages may leave the device."""

    engine: Engine
    reservations: Reservations
    mover: Mover
    planes: CachePlanes
    epochs: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def settle(self) -> None:
        """Wait until no page is on its way."""
        until = time.monotonic() + WAIT_S
        while self.reservations.tiers.is_busy:
            assert time.monotonic() < until, "pages are on their way for ever"
            time.sleep(0.002)
        self.reservations.check_invariants()

    def reserve(self, session: str, prompt: Sequence[int]) -> Reservation:
        epoch = next(self.epochs)
        return self.reservations.reserve(
            session_id=session,
            turn_id=f"t{epoch}",
            epoch=epoch,
            attempt=1,
            salt=SALT,
            token_ids=prompt,
            time_to_live_s=WAIT_S,
        )

    def turn(self, session: str, prompt: Sequence[int]) -> tuple[list[int], int, Reservation]:
        """Output, prompt tokens computed for it, and the reservation that it ran in."""
        reservation = self.reserve(session, prompt)
        client = Client(reservation)
        self.engine.submit(EngineRequest(id=reservation.id, reservation=reservation, sampling=GREEDY, sink=client))
        num_computed = client.finished().num_computed
        self.reservations.release(reservation.id, len(prompt) + len(client.token_ids))
        self.settle()
        return client.token_ids, num_computed, reservation

    def press(self, num_tokens: int) -> None:
        """Everything else leaves the device."""
        self.reservations.release(self.reserve("", [7] * num_tokens).id)

    def close(self) -> None:
        self.engine.stop()
        self.mover.stop()
        self.reservations.check_invariants()
        assert self.reservations.state().num_reservations == 0


MakeTiered = Callable[..., TieredRank]


@pytest.fixture
def make_tiered(shared_model: Transformer) -> Iterator[MakeTiered]:
    made: list[TieredRank] = []

    def make(*, num_pages: int, num_host: int = 0, directory: Path | None = None, num_disk: int = 64) -> TieredRank:
        model = shared_model
        planes = model.layout.allocate(model.config.num_hidden_layers, num_pages, model.device)
        for plane in (*planes.latent, *planes.index):
            plane.fill_(0xFF)  # NaN: nobody may depend on what is not written
        size = image_bytes(planes)
        host = HostMemory(num_pages=num_host, image_bytes=size, pinned=False) if num_host else None
        disk = None
        if directory is not None:
            identity = identity_of(fingerprint=FINGERPRINT, layout=model.layout.signature, num_layers=2, page_size=64)
            disk = DiskFile.open(
                directory, identity=identity, image_bytes=size, page_size=64, num_bytes=4096 + num_disk * (size + 5000)
            )
        reservations = Reservations(
            num_pages=num_pages,
            fingerprint=FINGERPRINT,
            layout=model.layout.signature,
            num_below={Tier.HOST: num_host, Tier.DISK: 0 if disk is None else disk.num_pages},
        )
        mover = Mover(reservations.tiers, planes, host=host, disk=disk)
        mover.start()
        engine = Engine(
            model=model,
            planes=planes,
            reservations=reservations,
            gang=Gang.alone(),
            limits=EngineLimits(max_batch_tokens=128, max_running=16, prefill_chunk_tokens=64),
            eos_token_id=NEVER_EOS,
            vocab_limit=model.config.vocab_size,
        )
        engine.start()
        rank = TieredRank(engine, reservations, mover, planes)
        made.append(rank)
        return rank

    yield make
    for rank in made:
        rank.close()


def prompts(rng: random.Random, num_turns: int) -> list[list[int]]:
    """What is appended in each turn."""
    return [[rng.randrange(131) for _ in range(rng.choice([30, 64, 150]))] for _ in range(num_turns)]


@pytest.mark.parametrize("tiers", ["host", "disk", "both"])
def test_sessions_that_do_not_fit_together_go_on_as_if_they_did(
    make_tiered: MakeTiered, rng: random.Random, tmp_path: Path, tiers: str
) -> None:
    appended = {session: prompts(rng, 4) for session in ("a", "b", "c")}
    roomy = make_tiered(num_pages=64)
    tight = make_tiered(
        num_pages=14,
        num_host=0 if tiers == "disk" else 40,
        directory=None if tiers == "host" else tmp_path,
    )
    left: dict[str, list[int]] = {session: [] for session in appended}
    for turn in range(4):
        for session, parts in appended.items():
            prompt = [*left[session], *parts[turn]]
            expected, *_ = roomy.turn(session, prompt)
            output, num_computed, reservation = tight.turn(session, prompt)
            assert output == expected
            assert num_computed <= len(prompt) - len(left[session]) + 63, "more than was new, and a page"
            num_restored = reservation.num_tokens_from(Tier.HOST) + reservation.num_tokens_from(Tier.DISK)
            assert num_restored == len(left[session]) // 64 * 64
            left[session] = [*prompt, *output[:-1]]
            tight.press(14 * 64 - 1)


def test_sessions_at_once_in_too_few_pages_say_what_they_say_alone(
    make_tiered: MakeTiered, rng: random.Random, tmp_path: Path
) -> None:
    """Turns of several threads: pages are evicted, copied and restored while others compute."""
    roomy = make_tiered(num_pages=200)
    tight = make_tiered(num_pages=16, num_host=24, directory=tmp_path)
    appended = {f"s{number}": prompts(rng, 3) for number in range(6)}
    expected: dict[str, list[list[int]]] = {}
    for session, parts in appended.items():
        left, outputs = list[int](), list[list[int]]()
        for part in parts:
            output, *_ = roomy.turn(session, [*left, *part])
            left, outputs = [*left, *part, *output[:-1]], [*outputs, output]
        expected[session] = outputs

    said: dict[str, list[list[int]]] = {session: [] for session in appended}

    def run(session: str) -> None:
        left: list[int] = []
        for part in appended[session]:
            prompt = [*left, *part]
            while True:
                try:
                    reservation = tight.reserve(session, prompt)
                    break
                except ResourceExhausted:
                    time.sleep(0.01)
            client = Client(reservation)
            tight.engine.submit(EngineRequest(id=reservation.id, reservation=reservation, sampling=GREEDY, sink=client))
            client.finished()
            tight.reservations.release(reservation.id, len(prompt) + len(client.token_ids))
            said[session].append(client.token_ids)
            left = [*prompt, *client.token_ids[:-1]]

    threads = [threading.Thread(target=run, args=(session,)) for session in appended]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert said == expected
    assert tight.mover.rates.host > 0 or tight.mover.rates.disk > 0, "nothing was restored"
    tight.settle()


def test_a_rank_that_starts_again_finds_what_it_left_on_disk(
    make_tiered: MakeTiered, rng: random.Random, tmp_path: Path
) -> None:
    first_prompt = [rng.randrange(131) for _ in range(300)]
    first = make_tiered(num_pages=16, num_host=16, directory=tmp_path)
    output, *_ = first.turn("s", first_prompt)
    first.close()
    prompt = [*first_prompt, *output, *[rng.randrange(131) for _ in range(20)]]
    expected, *_ = make_tiered(num_pages=16).turn("s", prompt)
    second = make_tiered(num_pages=16, num_host=16, directory=tmp_path)
    assert second.reservations.sessions.cached() == ["s"]
    again, num_computed, reservation = second.turn("s", prompt)
    assert again == expected
    assert reservation.num_tokens_from(Tier.DISK) == (len(first_prompt) + len(output) - 1) // 64 * 64
    assert num_computed <= 20 + 1 + 63
    assert reservation.common_len == (len(first_prompt) + len(output) - 1) // 64 * 64, "its session is known again"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("num_host", [0, 16])
def test_a_damaged_page_is_found_and_computed_again(
    make_tiered: MakeTiered, rng: random.Random, tmp_path: Path, num_host: int
) -> None:
    prompt = [rng.randrange(131) for _ in range(400)]
    expected, *_ = make_tiered(num_pages=16).turn("s", [*prompt, 1])
    rank = make_tiered(num_pages=8, num_host=num_host, directory=tmp_path)
    rank.turn("s", prompt)
    rank.press(8 * 64 - 1)
    (pages,) = tmp_path.rglob("pages.dat")
    stride = 4096 * -(-image_bytes(rank.planes) // 4096)
    flip(pages, 2 * stride + rng.randrange(image_bytes(rank.planes)))
    if num_host:
        for node in rank.reservations._cache.tree:
            if node.depth == 2:
                assert rank.mover._host is not None
                rank.mover._host.image(node.copies[Tier.HOST].slot)[100] ^= 1
    output, num_computed, _ = rank.turn("s", [*prompt, 1])
    assert output == expected
    assert num_computed == 401 - 2 * 64
    rank.press(8 * 64 - 1)
    output, num_computed, _ = rank.turn("s", [*prompt, 1])
    assert output == expected
    assert num_computed == 401 - 6 * 64, "written again"


def gate_fetches(rank: TieredRank, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Restores of the rank read nothing until the event is set."""
    gate, fetch = threading.Event(), rank.mover._fetch

    def gated(*arguments: Any) -> Any:
        assert gate.wait(WAIT_S)
        return fetch(*arguments)

    monkeypatch.setattr(rank.mover, "_fetch", gated)
    return gate


def test_others_run_while_a_reservation_is_restored(
    make_tiered: MakeTiered, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = make_tiered(num_pages=16, num_host=16)
    prompt = [rng.randrange(131) for _ in range(300)]
    rank.turn("s", prompt)
    rank.press(16 * 64 - 1)
    gate = gate_fetches(rank, monkeypatch)
    waiting = rank.reserve("s", [*prompt, 1])
    assert waiting.cached_len == 256
    assert waiting.computed_len == 0
    first = Client(waiting)
    rank.engine.submit(EngineRequest(id=waiting.id, reservation=waiting, sampling=GREEDY, sink=first))
    other = rank.reserve("o", prompt[1:101])
    second = Client(other)
    rank.engine.submit(EngineRequest(id=other.id, reservation=other, sampling=GREEDY, sink=second))
    assert second.finished().num_computed == 100
    assert not first.done.is_set()
    gate.set()
    assert first.finished().num_computed == 301 - 256
    for reservation in (waiting, other):
        rank.reservations.release(reservation.id)
    rank.settle()


def test_a_reservation_that_ends_while_it_is_restored_gives_all_back(
    make_tiered: MakeTiered, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = make_tiered(num_pages=16, num_host=16)
    prompt = [rng.randrange(131) for _ in range(300)]
    rank.turn("s", prompt)
    rank.press(16 * 64 - 1)
    gate = gate_fetches(rank, monkeypatch)
    reservation = rank.reserve("s", [*prompt, 1])
    rank.reservations.release(reservation.id)
    gate.set()
    rank.settle()
    _, num_computed, again = rank.turn("s", [*prompt, 1])
    assert num_computed == 301 - 256
    assert again.common_len == 256, "what the session left is still its own"
