"""Pages of deleted sessions: they go from every tier, each as soon as nobody uses it and nothing is left behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from seamount.workers.cache.pages import PagePool
from seamount.workers.cache.prefix import PageNode


class DeletedPages:
    """Not thread-safe: its owner holds the lock. erase: takes a page that nobody uses out of every tier."""

    def __init__(self, pool: PagePool, *, erase: Callable[[PageNode], None]) -> None:
        self._pool, self._erase = pool, erase
        self._waiting: dict[PageNode, None] = {}

    def add(self, nodes: Iterable[PageNode]) -> None:
        self._waiting.update(dict.fromkeys(nodes))

    def sweep(self) -> None:
        """Erase what may go by now. What another session's last turn went through, or a lease keeps, is that one's."""
        for node in sorted(self._waiting, key=lambda one: -one.depth):
            is_gone = node.page is None and not node.copies
            if is_gone or node.num_sessions or node.num_leases:
                del self._waiting[node]
            elif self._may_go(node):
                self._erase(node)
                del self._waiting[node]

    def _may_go(self, node: PageNode) -> bool:
        page = node.page
        is_used = page is not None and (not self._pool.is_idle(page) or self._pool.num_leases(page) > 0)
        return not is_used and node.num_wanted == 0 and not any(node.num_children.values())
