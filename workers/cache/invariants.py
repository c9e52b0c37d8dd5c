"""What must hold of a rank's pages after every step; tests check it, and nothing else calls it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from seamount.workers.cache.lower import LowerTier
from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.prefix_cache import PrefixCache
from seamount.workers.cache.reservation import Reservation
from seamount.workers.cache.retention import Tier


def check_cache(cache: PrefixCache, reservations: Sequence[Reservation]) -> None:
    """Raise AssertionError unless the pages are in order. ``reservations``: all that hold pages.

    Every page is free, referenced or idle, and only one of them; references equal holders; every idle page is a node of
    the tree or a tail; every node is in some tier, and its parents are in each tier that it is in; whoever pins or
    leases a node does so with its parents; every idle page without others behind it is known as such; leases are
    counted, and cover no free page; every slot of a tier is free, promised, to be erased or holds a copy; superseded
    pages are counted.
    """
    pool = cache.pool
    free, idle = pool.free_pages(), pool.idle_pages()
    referenced = [page for page in range(pool.num_pages) if pool.refcount(page) > 0]
    assert sorted([*free, *idle, *referenced]) == list(range(pool.num_pages)), "a page is lost or counted twice"

    holders: Counter[int] = Counter()
    writers: Counter[int] = Counter()
    for reservation in reservations:
        _check_reservation(reservation)
        holders.update(_page(node) for node in reservation.nodes)
        own = [page for index, page in enumerate(reservation.pages) if reservation.is_own(index)]
        holders.update(own)
        writers.update(own)
    for page in range(pool.num_pages):
        assert pool.refcount(page) == holders[page], (
            f"page {page}: refcount {pool.refcount(page)}, {holders[page]} holders"
        )
    for page, count in writers.items():
        assert count == 1, f"page {page} is written by {count} reservations"
        assert cache.tree.at(page) is None, f"page {page} is in the tree and may still be written"

    _check_tree(cache, set(free), idle)
    for lower in cache.copies.tiers.values():
        _check_tier(cache, lower)
    _check_wanted(cache, reservations)
    superseded = Counter(tier for node in cache.tree for tier in cache.superseded.tiers(node))
    assert +cache.superseded.num_pages == superseded, "superseded pages are miscounted"
    assert superseded[Tier.DEVICE] + pool.num_leased_idle <= pool.num_idle, "a page may go and may not"
    assert not any(cache.superseded.holds(node) and node.num_leases for node in cache.tree), "nobody's lease"


def _page(node: PageNode) -> int:
    assert node.page is not None, "a pinned page is not on the device"
    return node.page


def _check_reservation(reservation: Reservation) -> None:
    parent: PageNode | None = None
    for node in [*reservation.nodes, *reservation.to_restore]:
        assert node.parent is parent, "a reservation's pinned pages are not one chain"
        parent = node
    assert len(set(reservation.pages)) == len(reservation.pages), "a reservation holds a page twice"
    assert len(reservation.nodes) * reservation.page_size <= reservation.computed_len <= reservation.capacity
    assert reservation.present_len <= reservation.capacity, "nowhere to restore to"
    assert reservation.computed_len <= len(reservation.token_ids), "entries of tokens that do not exist"


def _check_tree(cache: PrefixCache, free: set[int], idle: Sequence[int]) -> None:
    tree, tails = cache.tree, list(cache.sessions.tails())
    on_device = [node for node in tree if node.page is not None]
    owned = [_page(node) for node in on_device] + [tail.page for tail in tails]
    assert len(set(owned)) == len(owned), "two prefixes share a page"
    assert not free.intersection(owned), "a free page holds a prefix"
    assert set(idle) <= set(owned), "an idle page holds nothing"
    children: Counter[PageNode] = Counter()
    resting = set(idle)
    links = [(_page(node), node.parent) for node in on_device] + [(tail.page, tail.parent) for tail in tails]
    for page, parent in links:
        if parent is not None:
            assert tree.at(_page(parent)) is parent, "a cached page cannot be reached: its parent is gone"
            children[parent] += 1
            assert page in resting or parent.page not in resting, "a page is in use and the one before it is not"
    for node in tree:
        assert tree.find(node.digest) is node, "the tree's two indices differ"
        assert node.page is None or tree.at(node.page) is node, "the tree's two indices differ"
        assert node.page is not None or node.copies, "a page of the tree is nowhere"
        assert node.num_children[Tier.DEVICE] == children[node], "a node miscounts its children"
    for tail in tails:
        assert tail.page in resting, "a tail is in use"
        assert 0 < len(tail.token_ids) < cache.page_size, "a tail is empty or full"
        record = cache.sessions.get(tail.session_id)
        assert record is not None, "a tail has no session"
        assert record.tail is tail, "a session has two tails"
    leaves = resting - {parent.page for _, parent in links if parent is not None}
    assert cache.eviction.leaves() == leaves, "a page that could be evicted is not known, or one that could not is"
    _check_leases(cache, resting, dict(links))


def _check_leases(cache: PrefixCache, idle: set[int], parents: dict[int, PageNode | None]) -> None:
    pool, sessions = cache.pool, cache.sessions
    held = Counter(cache.first_copies.pages)
    counted: Counter[PageNode] = Counter()
    num_tails: Counter[Tier] = Counter()
    for session_id, lease in sessions.leases.items():
        assert sessions.get(session_id) is not None, "a lease has no session"
        held.update(lease.pages)
        counted.update(lease.nodes)
        num_tails[lease.tier] += lease.num_tail_pages
        assert len(lease.nodes) + lease.num_tail_pages <= lease.max_pages, "a lease grew"
        assert not lease.nodes or lease.nodes[-1].copies or set(lease.pages) >= set(map(_page, lease.nodes)), (
            "a leased page has no copy and may leave the device"
        )
        for page in lease.pages:
            parent = parents[page]  # of a page that holds something
            assert parent is None or parent.page in lease.pages, "a page is leased and the one before it is not"
    assert held == Counter({page: n for page in range(pool.num_pages) if (n := pool.num_leases(page))})
    assert pool.num_leased == len(held)
    assert pool.num_leased_idle == len(idle.intersection(held))
    users: Counter[PageNode] = Counter()
    for record in sessions.records():
        users.update(record.chain)
    for node in cache.tree:
        assert node.num_sessions == users[node], "a node miscounts its sessions"
        assert node.num_leases == counted[node], "a node miscounts its leases"
        assert (node.leased_in is not None) == (node.num_leases > 0), "a leased page has no tier, or a free one has"
    by_tier = Counter(node.leased_in for node in counted if node.leased_in is not None) + num_tails
    assert +cache.leases.num_pages == by_tier, "leased pages are miscounted"


def _check_tier(cache: PrefixCache, lower: LowerTier) -> None:
    tier, nodes = lower.tier, set(lower)
    assert nodes == {node for node in cache.tree if tier in node.copies}, "a tier does not know what it holds"
    slots = [node.copies[tier].slot for node in nodes]
    promised = [copy.slot for copy in cache.copies.making() if copy.tier is tier]
    used = [*slots, *promised, *lower.free_slots(), *lower.to_erase]
    assert len(set(used)) == len(used) == lower.num_pages, "a slot is lost or used twice"
    children = Counter(node.parent for node in nodes)
    for node in nodes:
        assert node.parent is None or node.parent in nodes, "a copy cannot be reached: the page before it is not there"
        assert node.num_children[tier] == children[node], "a node miscounts its copies' children"
    assert lower.leaves() == {node for node in nodes if not children[node]}, "a copy that could go is not known"


def _check_wanted(cache: PrefixCache, reservations: Sequence[Reservation]) -> None:
    wanted: Counter[PageNode] = Counter()
    for reservation in reservations:
        wanted.update(reservation.to_restore)
    for copy in cache.copies.making():
        wanted.update(copy.kept)
    for node in cache.tree:
        assert node.num_wanted == wanted[node], "a node miscounts who wants its copies"
