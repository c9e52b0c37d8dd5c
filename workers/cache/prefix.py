"""The prefix tree: full pages of tokens, found by the chained hash of themselves and everything before them.

A page is in the tree while any tier has it. In each tier a page is there only with all pages before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from seamount.workers.cache.retention import BELOW, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCopy:
    """A page's bytes in a tier below the device. crc: CRC32C of them."""

    slot: int
    crc: int


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class PageNode:
    """A full page in the tree.

    page: where it is on the device, None if it is not; copies: where else it is.
    token_ids: its ids packed as native uint32: compared on every hit, so that equal hashes alone never serve a page.
    depth: pages before it; num_children: nodes right behind it by tier, session tails counted on the device;
    num_sessions: whose last turn here went through it; last_session: the last of these, empty for none;
    num_leases, leased_in: leases of the page, and the highest tier
    that one of them names; num_wanted: restores that need it and copies being made of it: its copies stay.
    session_id: whose turn here brought it; empty for stateless requests and for work for a turn elsewhere: for_session
    is then that one's. root: root hash of its chain.
    used_at: when it was last given back, seconds of the owner's clock. num_stays: how often it has left the device.
    """

    page: int | None
    digest: bytes
    parent: PageNode | None
    token_ids: bytes
    session_id: str
    root: bytes
    depth: int = 0
    copies: dict[Tier, StoredCopy] = field(default_factory=dict)
    num_children: Counter[Tier] = field(default_factory=Counter)
    num_sessions: int = 0
    last_session: str = ""
    num_leases: int = 0
    leased_in: Tier | None = None
    num_wanted: int = 0
    used_at: float = 0.0
    num_stays: int = 0
    for_session: str = ""

    @property
    def owner_id(self) -> str:
        """With whose deletion it goes; empty for none."""
        return self.session_id or self.for_session

    @property
    def best_copy(self) -> Tier | None:
        """The fastest tier below the device that has it."""
        return next((tier for tier in BELOW if tier in self.copies), None)


class PrefixTree:
    """Nodes by hash and by page. Not thread-safe: its owner holds the lock, and does the counting of references."""

    def __init__(self) -> None:
        self._by_digest: dict[bytes, PageNode] = {}
        self._by_page: dict[int, PageNode] = {}

    def __len__(self) -> int:
        return len(self._by_digest)

    def __iter__(self) -> Iterator[PageNode]:
        return iter(self._by_digest.values())

    def at(self, page: int) -> PageNode | None:
        """The node that owns a physical page."""
        return self._by_page.get(page)

    def match(self, digests: Sequence[bytes], token_ids: memoryview, page_bytes: int, max_pages: int) -> list[PageNode]:
        """The longest chain of cached pages from the root, at most ``max_pages``.

        digests: chained hashes of the full pages; token_ids: the packed ids (bytes) that they were made of,
        ``page_bytes`` a page.
        """
        nodes: list[PageNode] = []
        parent: PageNode | None = None
        for index in range(min(max_pages, len(digests))):
            node = self._by_digest.get(digests[index])
            if node is None or not _is_same(node, parent, token_ids[index * page_bytes : (index + 1) * page_bytes]):
                break
            nodes.append(node)
            parent = node
        return nodes

    def add(
        self,
        *,
        parent: PageNode | None,
        digest: bytes,
        token_ids: bytes,
        page: int,
        session_id: str,
        root: bytes,
        for_session: str = "",
    ) -> PageNode | None:
        """The node of these tokens: the one already here, which takes ``page`` if it is not on the device, else a new
        one that does.

        None if another page's tokens have the same hash: then this page, and all behind it, stay out of the tree.
        """
        node = self._by_digest.get(digest)
        if node is None:
            node = self.insert(parent=parent, digest=digest, token_ids=token_ids, session_id=session_id, root=root)
            node.for_session = for_session
        elif not _is_same(node, parent, memoryview(token_ids)):
            return None
        if node.page is None:
            node.page = page
            self._by_page[page] = node
            if parent is not None:
                parent.num_children[Tier.DEVICE] += 1
        return node

    def insert(
        self, *, parent: PageNode | None, digest: bytes, token_ids: bytes, session_id: str, root: bytes
    ) -> PageNode:
        """A node that no tier has yet: the caller gives it a page or a copy at once. Its hash is not here."""
        depth = 0 if parent is None else parent.depth + 1
        node = PageNode(
            page=None,
            digest=digest,
            parent=parent,
            token_ids=token_ids,
            session_id=session_id,
            root=root,
            depth=depth,
        )
        self._by_digest[digest] = node
        return node

    def find(self, digest: bytes) -> PageNode | None:
        """By its hash alone: for pages that carry their tokens."""
        return self._by_digest.get(digest)

    def leave_device(self, node: PageNode) -> None:
        """Its page is not its own any more; nothing right behind it is on the device."""
        assert node.page is not None
        assert node.num_children[Tier.DEVICE] == 0, "an inner page must not go before those behind it"
        del self._by_page[node.page]
        node.page = None
        node.num_stays += 1
        if node.parent is not None:
            node.parent.num_children[Tier.DEVICE] -= 1

    def remove(self, node: PageNode) -> None:
        """Forget a leaf that no tier has any more."""
        assert node.page is None, "a page on the device would be lost"
        assert not node.copies, "a copy would be lost"
        assert not any(node.num_children.values()), "an inner page must not go before those behind it"
        del self._by_digest[node.digest]


def _is_same(node: PageNode, parent: PageNode | None, token_ids: memoryview) -> bool:
    return node.parent is parent and node.token_ids == token_ids
