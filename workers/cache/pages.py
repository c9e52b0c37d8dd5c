"""The page pool: who holds which physical page.

Every page is in exactly one of three states:

    free        refcount 0, holds nothing
    referenced  refcount > 0
    idle        refcount 0, holds a cached prefix (a page of the tree or a session's tail)

A referenced or idle page may be leased besides: while it is, it is not freed.
"""

from __future__ import annotations

from collections.abc import Callable


class PagePool:
    """Refcounts, leases and the free list. Not thread-safe: its owner holds the lock.

    num_pages: physical pages, numbered from 0; at least 1. on_use: called after a page that holds a cached prefix came
    into use or became idle, or was leased or is no more.
    """

    def __init__(self, num_pages: int, *, on_use: Callable[[int], None] = lambda page: None) -> None:
        self.num_pages = num_pages
        self._on_use = on_use
        self._refcounts = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: dict[int, float] = {}
        self._num_leases: dict[int, int] = {}
        self._num_leased_idle = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_leased(self) -> int:
        """Pages that a lease holds, used or not."""
        return len(self._num_leases)

    @property
    def num_leased_idle(self) -> int:
        return self._num_leased_idle

    @property
    def num_available(self) -> int:
        """Pages that are free or can be evicted."""
        return len(self._free) + len(self._idle) - self._num_leased_idle

    def refcount(self, page: int) -> int:
        return self._refcounts[page]

    def take(self) -> int:
        """A free page, now with one reference. The caller has made sure that there is one."""
        page = self._free.pop()
        self._refcounts[page] = 1
        return page

    def pin(self, page: int) -> None:
        """One more reference to a page that is referenced or idle."""
        was_idle = self._refcounts[page] == 0
        if was_idle:
            del self._idle[page]  # a free page is not in there: pinning one is a defect and raises
            self._num_leased_idle -= page in self._num_leases
        self._refcounts[page] += 1
        if was_idle:
            self._on_use(page)

    def unpin(self, page: int, *, cached: bool, now: float = 0.0) -> None:
        """One reference less; with the last one the page becomes idle, since ``now``, if ``cached``, else free."""
        count = self._refcounts[page] - 1
        assert count >= 0, f"page {page} was given back more often than taken"
        self._refcounts[page] = count
        if count == 0:
            if cached:
                self._idle[page] = now
                self._num_leased_idle += page in self._num_leases
                self._on_use(page)
            else:
                assert page not in self._num_leases, f"page {page} is leased and would become free"
                self._free.append(page)

    def free_idle(self, page: int) -> None:
        """An idle page whose prefix has been forgotten becomes free; it is not leased."""
        assert page not in self._num_leases, f"page {page} is leased and would become free"
        del self._idle[page]
        self._free.append(page)

    def lease(self, page: int) -> None:
        """One more lease on a page that is referenced or idle."""
        assert self._refcounts[page] > 0 or page in self._idle, f"page {page} is free and cannot be leased"
        is_first = page not in self._num_leases
        if is_first and self._refcounts[page] == 0:
            self._num_leased_idle += 1
        self._num_leases[page] = self._num_leases.get(page, 0) + 1
        if is_first:
            self._on_use(page)

    def unlease(self, page: int) -> None:
        """One lease less."""
        self._num_leases[page] -= 1
        if self._num_leases[page] == 0:
            del self._num_leases[page]
            self._num_leased_idle -= self._refcounts[page] == 0
            self._on_use(page)

    def num_leases(self, page: int) -> int:
        """Leases of the one page."""
        return self._num_leases.get(page, 0)

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def idle_since(self, page: int) -> float:
        """When the idle page was last given back."""
        return self._idle[page]

    def free_pages(self) -> list[int]:
        return list(self._free)

    def idle_pages(self) -> list[int]:
        return list(self._idle)
