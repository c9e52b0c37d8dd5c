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


def test_leased_pages_are_not_available() -> None:
    pool = PagePool(3)
    first, second, _ = (pool.take() for _ in range(3))
    pool.lease(first)
    pool.unpin(first, cached=True, now=5.0)
    pool.unpin(second, cached=True, now=6.0)
    assert (pool.num_idle, pool.num_leased_idle, pool.num_available) == (2, 1, 1)
    pool.lease(first)
    pool.pin(first)
    assert (pool.num_leased, pool.num_leased_idle, pool.num_available) == (1, 0, 1)
    pool.unpin(first, cached=True, now=7.0)
    assert pool.idle_since(first) == 7.0
    pool.unlease(first)
    assert (pool.num_leases(first), pool.num_available) == (1, 1)
    with pytest.raises(AssertionError, match="leased"):
        pool.free_idle(first)
    pool.unlease(first)
    assert pool.num_available == 2
    pool.free_idle(first)
    with pytest.raises(AssertionError, match="free"):
        pool.lease(first)


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
