"""Log lines are JSON objects, and quote nothing."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from seamount.wire import logs


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    root = logging.getLogger("seamount")
    before = (root.handlers[:], root.level, root.propagate)
    logs.configure(stream=stream)
    yield stream
    root.handlers[:], root.propagate = before[0], before[2]
    root.setLevel(before[1])


def lines(out: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_line_has_its_event_and_its_figures(out: io.StringIO) -> None:
    logging.getLogger("seamount.part").info("rank_ready", extra={"rank_id": "r\n1", "port": 3, "odd": {1}})
    (line,) = lines(out)
    assert line.pop("time") > 0
    assert line == {
        "level": "info",
        "part": "seamount.part",
        "event": "rank_ready",
        "rank_id": "r\n1",
        "port": 3,
        "odd": "{1}",
    }


def test_an_exception_is_its_type_and_places_without_its_text(out: io.StringIO) -> None:
    def fail() -> None:
        raise ValueError("what the user wrote")

    try:
        fail()
    except ValueError:
        logging.getLogger("seamount").exception("broken")
    (line,) = lines(out)
    assert (line["event"], line["level"], line["error"]) == ("broken", "error", "ValueError")
    assert line["at"][-1].endswith(" fail")
    assert "what the user wrote" not in out.getvalue()


def test_configuring_twice_writes_once(out: io.StringIO) -> None:
    logs.configure(stream=out, level=logging.WARNING)
    logging.getLogger("seamount").warning("once")
    logging.getLogger("seamount").info("never")
    assert [line["event"] for line in lines(out)] == ["once"]
