from __future__ import annotations

from array import array

import pytest

from seamount.workers.cache import sessions
from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.retention import PERSON, person_wait, tool_wait
from seamount.workers.cache.sessions import SessionBook, SessionRecord, Tail


def _ids(count: int) -> array[int]:
    return array("I", range(count))


def _leave(book: SessionBook, session_id: str, count: int, page: int | None = None) -> None:
    book.remember(session_id, _ids(count), b"root")
    if page is not None:
        book.keep_tail(Tail(session_id=session_id, page=page, root=b"root", parent=None, token_ids=_ids(1)))


def page_of(session_id: str) -> PageNode:
    return PageNode(page=None, digest=b"d", parent=None, token_ids=b"", session_id=session_id, root=b"root")


def test_the_bound_on_remembered_tokens_drops_the_least_recent_and_names_their_tails() -> None:
    book = SessionBook(max_left_tokens=100)
    _leave(book, "a", 40, page=7)
    _leave(book, "b", 40, page=8)
    book.touch("a")
    assert book.trim() == []
    _leave(book, "c", 20)
    assert book.trim() == []
    _leave(book, "c", 21)  # replaces what it left before: 101 in all
    assert [tail.page for tail in book.trim()] == [8]
    assert book.get("b") is None
    assert book.get("a") is not None
    assert [tail.page for tail in book.tails()] == [7]


def test_sessions_with_a_live_reservation_stay() -> None:
    book = SessionBook(max_left_tokens=10)
    _leave(book, "a", 40)
    book.touch("a").live_id = "r"
    _leave(book, "b", 5, page=3)
    assert [tail.page for tail in book.trim()] == [3]
    assert book.get("a") is not None
    book.touch("a").live_id = None
    assert book.trim() == []
    assert book.get("a") is None


def test_the_bound_on_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_RECORDS", 3)
    book = SessionBook(max_left_tokens=100)
    for name in "abcd":
        _leave(book, name, 1)
    book.trim()
    assert [name for name in "abcd" if book.get(name) is not None] == ["b", "c", "d"]


def test_a_session_is_listed_while_pages_it_brought_are_in_the_tree() -> None:
    book = SessionBook(max_left_tokens=100)
    _leave(book, "a", 8)
    assert list(book.cached_sessions()) == []
    of_a, of_nobody = page_of("a"), page_of("")
    book.entered(of_a)
    book.entered(of_nobody)
    assert list(book.cached_sessions()) == ["a"]
    assert book.brought("a") == [of_a]
    book.gone(of_a)
    book.gone(of_nobody)
    assert list(book.cached_sessions()) == []
    assert book.brought("a") == []


def test_what_a_session_waits_for_and_how_many_requests_its_person_made() -> None:
    record = SessionRecord()
    assert record.wait == PERSON
    record.comes("1")
    assert record.wait == person_wait(1)
    record.wait_for_tools(30.0)
    assert record.wait == tool_wait(30.0)
    record.comes("2")  # with the results
    record.comes("2")  # the same turn, reserved again
    assert record.wait == person_wait(1)
    record.comes("3")
    assert record.wait == person_wait(2)
