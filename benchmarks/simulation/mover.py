"""Pages on their way between the tiers in virtual time: the door of the real caches, and the time that bytes take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.simulation.clock import Clock
from benchmarks.simulation.costs import StepCosts
from seamount.workers.cache.copies import Copy
from seamount.workers.cache.reservations import Reservations
from seamount.workers.cache.restores import Restore
from seamount.workers.cache.retention import BELOW, Tier

BATCH_PAGES = 64
"""Of a copy down or a restore: what is asked for at a time."""


@dataclass(slots=True, kw_only=True)
class Mover:
    """One copy down to each tier and one restore at a time, beside each other. on_moved: a sequence may go on."""

    clock: Clock
    costs: StepCosts
    caches: Reservations
    on_moved: Callable[[], None]
    num_restored_pages: int = 0
    _is_copying: dict[Tier, bool]
    _is_restoring: bool = False
    _is_woken: bool = False

    @classmethod
    def of(cls, clock: Clock, costs: StepCosts, caches: Reservations, on_moved: Callable[[], None]) -> Mover:
        mover = cls(
            clock=clock,
            costs=costs,
            caches=caches,
            on_moved=on_moved,
            _is_copying=dict.fromkeys(BELOW, False),
        )
        caches.tiers.on_work = mover.wake
        return mover

    def wake(self) -> None:
        """There may be something to do."""
        if not self._is_woken:
            self._is_woken = True
            self.clock.at(self.clock.now, self._work)

    def _work(self) -> None:
        """Begin what can begin now."""
        self._is_woken = False
        for tier in BELOW:
            for slot in self.caches.tiers.next_erasures(tier, BATCH_PAGES):
                self.caches.tiers.erased(tier, slot, is_done=True)
            copies = [] if self._is_copying[tier] else self.caches.tiers.next_copies(tier, BATCH_PAGES)
            if copies:
                self._is_copying[tier] = True
                took_s = len(copies) * self.caches.page_size / self._tokens_per_s(tier)
                self.clock.after(took_s, lambda tier=tier, copies=copies: self._copied(tier, copies))  # type: ignore[misc]
        restore = None if self._is_restoring else self.caches.tiers.next_restore(BATCH_PAGES)
        if restore is not None:
            self._is_restoring = True
            pages_s = [self.caches.page_size / self._tokens_per_s(fetch.tier) for fetch in restore.fetches]
            self.clock.after(self.costs.restore_s + sum(pages_s), lambda: self._restored(restore))

    def _copied(self, tier: Tier, copies: Sequence[Copy]) -> None:
        self._is_copying[tier] = False
        for copy in copies:
            self.caches.tiers.copied(copy, crc=0)
        self.on_moved()

    def _restored(self, restore: Restore) -> None:
        self._is_restoring = False
        self.num_restored_pages += len(restore.fetches)
        self.caches.tiers.restored(restore, len(restore.fetches))
        self.on_moved()

    def _tokens_per_s(self, tier: Tier) -> float:
        return self.costs.host_tokens_per_s if tier is Tier.HOST else self.costs.disk_tokens_per_s
