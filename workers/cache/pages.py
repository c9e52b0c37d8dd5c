"""The page pool: who holds which physical page, and which unreferenced page goes first when one is needed.

Every page is in exactly one of three states:

    free        refcount 0, holds nothing
    referenced  refcount > 0
    idle        refcount 0, holds a cached prefix (a page of the tree or a session's tail); least recently used first
"""

from __future__ import annotations

from collections import OrderedDict


class PagePool:
    """Refcounts, the free list and the order of eviction. Not thread-safe: its owner holds the lock.

    num_pages: physical pages, numbered from 0; at least 1.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._refcounts = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def refcount(self, page: int) -> int:
        return self._refcounts[page]

    def take(self) -> int:
        """A free page, now with one reference. The caller has made sure that there is one."""
        page = self._free.pop()
        self._refcounts[page] = 1
        return page

    def pin(self, page: int) -> None:
        """One more reference to a page that is referenced or idle."""
        if self._refcounts[page] == 0:
            del self._idle[page]  # a free page is not in there: pinning one is a defect and raises
        self._refcounts[page] += 1

    def unpin(self, page: int, *, cached: bool) -> None:
        """One reference less; with the last one the page becomes idle (most recently used) if ``cached``, else free."""
        count = self._refcounts[page] - 1
        assert count >= 0, f"page {page} was given back more often than taken"
        self._refcounts[page] = count
        if count == 0:
            if cached:
                self._idle[page] = None
            else:
                self._free.append(page)

    def oldest_idle(self) -> int:
        """The idle page that was given back longest ago. The caller has made sure that there is one."""
        return next(iter(self._idle))

    def free_idle(self, page: int) -> None:
        """An idle page whose prefix has been forgotten becomes free."""
        del self._idle[page]
        self._free.append(page)

    def free_pages(self) -> list[int]:
        return list(self._free)

    def idle_pages(self) -> list[int]:
        """Least recently used first."""
        return list(self._idle)
