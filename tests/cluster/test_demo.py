"""The demo's own checks can fail."""

import pytest

from seamount.cluster.demo import check_receipt, demo_settings
from seamount.cluster.settings import is_loopback
from seamount.v1 import events_pb2

LOCAL, REMOTE = events_pb2.PREFILL_PATH_LOCAL, events_pb2.PREFILL_PATH_REMOTE


def receipt(**changes) -> events_pb2.Receipt:
    fields = {"num_prompt_tokens": 100, "num_cached_tokens": 60, "num_decode_computed_tokens": 40, "path": LOCAL}
    return events_pb2.Receipt(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"num_cached_tokens": 59}, False),
        ({"num_cached_tokens": 61}, False),
        ({"num_decode_computed_tokens": 41}, False),
        ({"num_decode_computed_tokens": 39}, False),
        ({"path": REMOTE, "num_decode_computed_tokens": 1, "num_prefill_computed_tokens": 39}, True),
        ({"path": REMOTE, "num_decode_computed_tokens": 2, "num_prefill_computed_tokens": 38}, False),
        ({"path": REMOTE, "num_decode_computed_tokens": 1, "num_prefill_computed_tokens": 40}, False),
    ],
)
def test_a_receipt_must_add_up(changes: dict, holds: bool) -> None:
    assert check_receipt("x", receipt(**changes), num_cached=60).holds is holds


def test_a_receipt_must_have_gone_where_it_should() -> None:
    assert check_receipt("x", receipt(), num_cached=60, remote=False).holds
    assert not check_receipt("x", receipt(), num_cached=60, remote=True).holds


def test_the_demo_stays_on_this_machine_and_out_of_the_way() -> None:
    settings = demo_settings()
    assert is_loopback(settings.router.host)
    assert is_loopback(settings.pools.host)
    assert settings.router.port == 0
    assert settings.redis_url is None
    assert settings.run_dir.name == ".demo"
