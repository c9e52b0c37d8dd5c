"""A small cache with a clock that the test moves, and the check that every page comes back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.reservations import Reservations
from seamount.workers.cache.retention import Tier

SALT = b"a" * 32


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class SmallCache:
    """Pages of 4 tokens; ``reserve`` with defaults for what a test does not care about."""

    caches: Reservations
    clock: Clock
    aborted: list[str] = field(default_factory=list)

    def reserve(
        self,
        token_ids: Sequence[int],
        *,
        session: str = "s",
        turn: str = "t",
        epoch: int = 1,
        attempt: int = 0,
        salt: bytes = SALT,
        ttl: float = 10.0,
    ) -> Reservation:
        reservation = self.caches.reserve(
            session_id=session,
            turn_id=turn,
            epoch=epoch,
            attempt=attempt,
            salt=salt,
            token_ids=token_ids,
            time_to_live_s=ttl,
        )
        self.caches.check_invariants()
        return reservation

    def leave(self, token_ids: Sequence[int], *, keep_len: int | None = None, **named: object) -> None:
        """Reserve, compute all, release."""
        reservation = self.reserve(token_ids, **named)  # type: ignore[arg-type]
        self.caches.advance(reservation.id, len(token_ids))
        self.caches.check_invariants()
        self.release(reservation, keep_len)

    def release(self, reservation: Reservation, keep_len: int | None = None) -> None:
        self.caches.release(reservation.id, keep_len)
        self.caches.check_invariants()

    def assert_all_back(self) -> None:
        self.caches.check_invariants()
        state = self.caches.state()
        assert state.num_reservations == 0
        assert state.num_free + state.num_cached == state.num_pages


@dataclass
class TieredCache(SmallCache):
    """Pages of 4 tokens; ``settle`` moves all that is to be moved."""

    def settle(self) -> None:
        tiers = self.caches.tiers
        while tiers.is_busy:
            for tier in (Tier.HOST, Tier.DISK):
                for copy in tiers.next_copies(tier, 3):
                    tiers.copied(copy, 0)
                for slot in tiers.next_erasures(tier, 3):
                    tiers.erased(tier, slot, is_done=True)
            restore = tiers.next_restore(2)
            if restore is not None:
                tiers.restored(restore, len(restore.fetches))
            self.caches.check_invariants()

    def press(self) -> None:
        """Everything that may goes from the device."""
        self.caches.state()  # what has waited for its copy for long enough waits no more
        held = self.reserve([9] * (4 * self.caches._cache.pool.num_available - 1), session="", turn=str(id(self)))
        self.release(held, keep_len=0)

    def nodes(self, tier: Tier) -> list[PageNode]:
        return sorted(self.caches._cache.copies.tiers[tier], key=lambda node: (node.token_ids, node.depth))


MakeTiered = Callable[..., TieredCache]


@pytest.fixture
def make_cache() -> Iterator[Callable[[int], SmallCache]]:
    made: list[SmallCache] = []

    def make(num_pages: int) -> SmallCache:
        clock = Clock()
        caches = Reservations(num_pages=num_pages, page_size=4, fingerprint="f", layout="exact", clock=clock)
        cache = SmallCache(caches, clock)
        caches.on_abort = cache.aborted.append
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.assert_all_back()


@pytest.fixture
def cache(make_cache: Callable[[int], SmallCache]) -> SmallCache:
    return make_cache(16)


@pytest.fixture
def make_tiered() -> MakeTiered:
    def make(num_pages: int, *, host: int = 0, disk: int = 0) -> TieredCache:
        clock, below = Clock(), {Tier.HOST: host, Tier.DISK: disk}
        caches = Reservations(
            num_pages=num_pages, page_size=4, fingerprint="f", layout="l", clock=clock, num_below=below
        )
        return TieredCache(caches, clock)

    return make


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)
