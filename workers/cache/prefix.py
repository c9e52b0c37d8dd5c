"""The prefix tree: full pages of tokens, found by the chained hash of themselves and everything before them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class PageNode:
    """A full page in the tree.

    token_ids: its ids packed as native uint32: compared on every hit, so that equal hashes alone never serve a page.
    depth: pages before it; num_children: nodes and session tails right behind it; num_sessions: whose last turn here
    went through it.
    session_id: who brought it here; empty for stateless requests.
    """

    page: int
    digest: bytes
    parent: PageNode | None
    token_ids: bytes
    session_id: str
    depth: int = 0
    num_children: int = 0
    num_sessions: int = 0


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
        self, *, parent: PageNode | None, digest: bytes, token_ids: bytes, page: int, session_id: str
    ) -> PageNode | None:
        """The node of these tokens: the one already here, else a new one that owns ``page``.

        None if another page's tokens have the same hash: then this page, and all behind it, stay out of the tree.
        """
        node = self._by_digest.get(digest)
        if node is not None:
            return node if _is_same(node, parent, memoryview(token_ids)) else None
        depth = 0 if parent is None else parent.depth + 1
        node = PageNode(
            page=page, digest=digest, parent=parent, token_ids=token_ids, session_id=session_id, depth=depth
        )
        self._by_digest[digest] = node
        self._by_page[page] = node
        if parent is not None:
            parent.num_children += 1
        return node

    def remove(self, node: PageNode) -> None:
        """Forget a leaf."""
        assert node.num_children == 0, "an inner page must not go before those behind it"
        del self._by_digest[node.digest]
        del self._by_page[node.page]
        if node.parent is not None:
            node.parent.num_children -= 1


def _is_same(node: PageNode, parent: PageNode | None, token_ids: memoryview) -> bool:
    return node.parent is parent and node.token_ids == token_ids
