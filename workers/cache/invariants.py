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
    the tree or a tail; every node's parents are in the tree; whoever pins or leases a node does so with its parents;
    every idle page without others behind it is known as such; leases are counted, and cover no free page.
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
    resting = set(idle)
    links = [(node.page, node.parent) for node in tree] + [(tail.page, tail.parent) for tail in tails]
    for page, parent in links:
        if parent is not None:
            assert tree.at(parent.page) is parent, "a cached page cannot be reached: its parent is gone"
            children[parent.page] += 1
            assert page in resting or parent.page not in resting, "a page is in use and the one before it is not"
    for node in tree:
        assert tree.at(node.page) is node, "the tree's two indices differ"
        assert node.num_children == children[node.page], "a node miscounts its children"
    for tail in tails:
        assert tail.page in resting, "a tail is in use"
        assert 0 < len(tail.token_ids) < holdings.page_size, "a tail is empty or full"
        record = holdings.sessions.get(tail.session_id)
        assert record is not None, "a tail has no session"
        assert record.tail is tail, "a session has two tails"
    leaves = resting - {parent.page for _, parent in links if parent is not None}
    assert holdings.leaves() == leaves, "a page that could be evicted is not known, or one that could not is"
    _check_leases(holdings, resting, dict(links))


def _check_leases(holdings: Holdings, idle: set[int], parents: dict[int, PageNode | None]) -> None:
    pool, sessions = holdings.pool, holdings.sessions
    counted: Counter[int] = Counter()
    for session_id, lease in sessions.leases.items():
        assert sessions.get(session_id) is not None, "a lease has no session"
        counted.update(lease.pages)
        assert len(lease.pages) <= lease.max_pages, "a lease grew"
        for page in lease.pages:
            parent = parents[page]  # of a page that holds something
            assert parent is None or parent.page in lease.pages, "a page is leased and the one before it is not"
    assert counted == Counter({page: n for page in range(pool.num_pages) if (n := pool.num_leases(page))})
    assert pool.num_leased == len(counted)
    assert pool.num_leased_idle == len(idle.intersection(counted))
    users: Counter[PageNode] = Counter()
    for record in sessions.records():
        users.update(record.chain)
    for node in holdings.tree:
        assert node.num_sessions == users[node], "a node miscounts its sessions"
