from __future__ import annotations

import random
from array import array

import pytest

from seamount.wire.hashes import page_hashes, root_hash
from seamount.workers.cache.prefix import PageNode, PrefixTree, StoredCopy
from seamount.workers.cache.retention import Tier

SIZE = 4
ROOT = root_hash(b"s", "f", "l")


def _insert(tree: PrefixTree, token_ids: list[int], first_page: int) -> list[PageNode]:
    nodes: list[PageNode] = []
    for index, digest in enumerate(page_hashes(ROOT, token_ids, SIZE)):
        packed = array("I", token_ids[index * SIZE : (index + 1) * SIZE]).tobytes()
        parent = nodes[-1] if nodes else None
        node = tree.add(
            parent=parent, digest=digest, token_ids=packed, page=first_page + index, session_id="", root=ROOT
        )
        assert node is not None
        nodes.append(node)
    return nodes


def _match(tree: PrefixTree, token_ids: list[int], max_pages: int = 1 << 20) -> list[int | None]:
    packed = memoryview(array("I", token_ids)).cast("B")
    return [node.page for node in tree.match(page_hashes(ROOT, token_ids, SIZE), packed, SIZE * 4, max_pages)]


def test_match_ends_at_the_first_page_that_differs(rng: random.Random) -> None:
    tree = PrefixTree()
    token_ids = [rng.randrange(1 << 17) for _ in range(4 * SIZE + 3)]
    _insert(tree, token_ids, first_page=10)
    assert _match(tree, token_ids) == [10, 11, 12, 13]
    assert _match(tree, token_ids, max_pages=2) == [10, 11]
    assert _match(tree, token_ids, max_pages=-1) == []
    assert _match(tree, token_ids[: 2 * SIZE - 1]) == [10]
    assert _match(tree, []) == []
    changed = rng.randrange(4 * SIZE)
    other = token_ids.copy()
    other[changed] += 1
    assert _match(tree, other) == [10 + index for index in range(changed // SIZE)]


def test_the_same_ids_behind_another_prefix_are_another_page() -> None:
    tree = PrefixTree()
    _insert(tree, [1, 2, 3, 4, 5, 6, 7, 8], first_page=0)
    assert _match(tree, [5, 6, 7, 8]) == []


def test_adding_what_is_there_returns_what_is_there() -> None:
    tree = PrefixTree()
    first = _insert(tree, [1, 2, 3, 4, 5, 6, 7, 8], first_page=0)
    second = _insert(tree, [1, 2, 3, 4, 9, 9, 9, 9], first_page=20)
    assert second[0] is first[0]
    assert first[0].num_children[Tier.DEVICE] == 2
    assert tree.at(20) is None
    assert tree.at(21) is second[1]
    assert len(tree) == 3


def test_equal_hashes_of_other_tokens_never_match() -> None:
    tree = PrefixTree()
    digest = b"x" * 32
    one, two = array("I", [1] * SIZE), array("I", [2] * SIZE)
    node = tree.add(parent=None, digest=digest, token_ids=one.tobytes(), page=0, session_id="", root=ROOT)
    assert tree.add(parent=None, digest=digest, token_ids=two.tobytes(), page=1, session_id="", root=ROOT) is None
    assert tree.add(parent=node, digest=digest, token_ids=one.tobytes(), page=1, session_id="", root=ROOT) is None
    assert tree.match([digest], memoryview(two).cast("B"), SIZE * 4, 1) == []
    assert tree.match([digest], memoryview(one).cast("B"), SIZE * 4, 1) == [node]


def test_only_leaves_can_be_removed() -> None:
    tree = PrefixTree()
    inner, leaf = _insert(tree, [1, 2, 3, 4, 5, 6, 7, 8], first_page=0)
    with pytest.raises(AssertionError, match="inner"):
        tree.leave_device(inner)
    with pytest.raises(AssertionError, match="on the device"):
        tree.remove(leaf)
    for node in (leaf, inner):
        tree.leave_device(node)
        tree.remove(node)
    assert len(tree) == 0
    assert tree.at(0) is None


def test_a_page_below_the_device_is_matched_and_takes_a_new_page() -> None:
    tree = PrefixTree()
    token_ids = [1, 2, 3, 4, 5, 6, 7, 8]
    inner, leaf = _insert(tree, token_ids, first_page=0)
    leaf.copies[Tier.DISK] = StoredCopy(slot=5, crc=0)
    tree.leave_device(leaf)
    assert _match(tree, token_ids) == [0, None]
    assert (leaf.best_copy, tree.at(1), inner.num_children[Tier.DEVICE]) == (Tier.DISK, None, 0)
    with pytest.raises(AssertionError, match="copy"):
        tree.remove(leaf)
    assert _insert(tree, token_ids, first_page=7)[1] is leaf
    assert (leaf.page, leaf.num_stays, inner.num_children[Tier.DEVICE]) == (8, 1, 1)
