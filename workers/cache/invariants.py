"""What must hold of a rank's pages after every step; tests check it, and nothing else calls it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from seamount.workers.cache.holdings import Holdings
from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.reservation import Reservation


def check_holdings(holdings: Holdings, reservations: Sequence[Reservation]) -> None:
    """Raise AssertionError unless the pages are in order. ``reservations``: all that hold pages.

    Every page is free, referenced or idle, and only one of them; references equal holders; every idle page is a node of
    the tree or a tail; every node's parents are in the tree; whoever pins a node pins its parents; least recently used
    order never puts a page before those behind it.
    """
    pool = holdings.pool
    free, idle = pool.free_pages(), pool.idle_pages()
    referenced = [page for page in range(pool.num_pages) if pool.refcount(page) > 0]
    assert sorted([*free, *idle, *referenced]) == list(range(pool.num_pages)), "a page is lost or counted twice"

    holders: Counter[int] = Counter()
    writers: Counter[int] = Counter()
    for reservation in reservations:
        _check_reservation(reservation)
        holders.update(node.page for node in reservation.nodes)
        own = [page for index, page in enumerate(reservation.pages) if reservation.is_own(index)]
        holders.update(own)
        writers.update(own)
    for page in range(pool.num_pages):
        assert pool.refcount(page) == holders[page], (
            f"page {page}: refcount {pool.refcount(page)}, {holders[page]} holders"
        )
    for page, count in writers.items():
        assert count == 1, f"page {page} is written by {count} reservations"
        assert holdings.tree.at(page) is None, f"page {page} is in the tree and may still be written"

    _check_tree(holdings, set(free), idle)


def _check_reservation(reservation: Reservation) -> None:
    parent: PageNode | None = None
    for node in reservation.nodes:
        assert node.parent is parent, "a reservation's pinned pages are not one chain"
        parent = node
    assert len(set(reservation.pages)) == len(reservation.pages), "a reservation holds a page twice"
    assert len(reservation.nodes) * reservation.page_size <= reservation.computed_len <= reservation.capacity
    assert reservation.computed_len <= len(reservation.token_ids), "entries of tokens that do not exist"


def _check_tree(holdings: Holdings, free: set[int], idle: Sequence[int]) -> None:
    tree, tails = holdings.tree, list(holdings.sessions.tails())
    owned = [node.page for node in tree] + [tail.page for tail in tails]
    assert len(set(owned)) == len(owned), "two prefixes share a page"
    assert not free.intersection(owned), "a free page holds a prefix"
    assert set(idle) <= set(owned), "an idle page holds nothing"
    children: Counter[int] = Counter()
    rank = {page: order for order, page in enumerate(idle)}
    links = [(node.page, node.parent) for node in tree] + [(tail.page, tail.parent) for tail in tails]
    for page, parent in links:
        if parent is not None:
            assert tree.at(parent.page) is parent, "a cached page cannot be reached: its parent is gone"
            children[parent.page] += 1
            if page not in rank:
                assert parent.page not in rank, "a page is in use and the one before it is not"
            elif parent.page in rank:
                assert rank[page] < rank[parent.page], "a page would be evicted before one behind it"
    for node in tree:
        assert tree.at(node.page) is node, "the tree's two indices differ"
        assert node.num_children == children[node.page], "a node miscounts its children"
    for tail in tails:
        assert tail.page in rank, "a tail is in use"
        assert 0 < len(tail.token_ids) < holdings.page_size, "a tail is empty or full"
        record = holdings.sessions.get(tail.session_id)
        assert record is not None, "a tail has no session"
        assert record.tail is tail, "a session has two tails"
