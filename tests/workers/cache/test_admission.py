from __future__ import annotations

import pytest

from seamount.wire.errors import Aborted, OutOfRange
from seamount.workers.cache.admission import MAX_RETRY_S, MIN_RETRY_S, EpochFences, check_span, no_pages
from seamount.workers.cache.pages import PagePool


def test_fences_let_the_newest_through_and_forget_the_least_recent() -> None:
    fences = EpochFences(max_sessions=2)
    fences.advance("a", "t", 5, 1)
    fences.advance("a", "t", 5, 1)
    fences.advance("a", "u", 5, 0)  # another turn counts its own attempts
    fences.advance("b", "t", 9, 0)
    with pytest.raises(Aborted, match="epoch 4"):
        fences.advance("a", "u", 4, 9)
    fences.advance("a", "u", 6, 0)
    fences.advance("c", "t", 1, 0)
    fences.advance("b", "t", 1, 0)  # forgotten: c was one too many
    with pytest.raises(Aborted):
        fences.advance("c", "t", 0, 0)


@pytest.mark.parametrize(
    ("soonest_s", "retry_after_s"), [(-3.0, MIN_RETRY_S), (0.0, MIN_RETRY_S), (0.7, 0.7), (59.0, MAX_RETRY_S)]
)
def test_the_time_to_retry_is_bounded(soonest_s: float, retry_after_s: float) -> None:
    refused = no_pages(PagePool(3), 9, soonest_s)
    assert refused.retry_after_s == pytest.approx(retry_after_s)
    assert refused.metadata == {"num_needed_pages": "9", "num_pages": "3"}


def test_spans() -> None:
    check_span(0, 0, 0)
    check_span(2, 5, 5)
    for first, end in ((-1, 2), (3, 2), (2, 6)):
        with pytest.raises(OutOfRange):
            check_span(first, end, 5)
