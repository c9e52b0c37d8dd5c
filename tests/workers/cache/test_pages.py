from __future__ import annotations

import pytest

from seamount.workers.cache.pages import PagePool


def test_a_page_goes_free_referenced_idle_free() -> None:
    pool = PagePool(3)
    page = pool.take()
    assert (pool.num_free, pool.num_idle, pool.refcount(page)) == (2, 0, 1)
    pool.pin(page)
    pool.unpin(page, cached=True)
    assert (pool.num_idle, pool.refcount(page)) == (0, 1)
    pool.unpin(page, cached=True)
    assert (pool.num_free, pool.num_idle) == (2, 1)
    pool.free_idle(page)
    assert (pool.num_free, pool.num_idle) == (3, 0)


def test_idle_pages_go_in_the_order_in_which_they_were_given_back() -> None:
    pool = PagePool(3)
    first, second, third = (pool.take() for _ in range(3))
    for page in (second, first, third):
        pool.unpin(page, cached=True)
    assert pool.oldest_idle() == second
    pool.pin(second)
    assert pool.oldest_idle() == first
    pool.unpin(second, cached=True)
    assert pool.idle_pages() == [first, third, second]


def test_defects_are_loud() -> None:
    pool = PagePool(1)
    with pytest.raises(KeyError):
        pool.pin(0)  # free: nobody may take it but through take()
    pool.unpin(pool.take(), cached=False)
    with pytest.raises(AssertionError, match="more often"):
        pool.unpin(0, cached=False)
    pool.take()
    with pytest.raises(IndexError):
        pool.take()
