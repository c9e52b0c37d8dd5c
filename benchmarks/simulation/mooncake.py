"""Mooncake's open trace format: JSON lines of ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``.

A hash id names a block of 512 tokens with everything before it, so two requests share the blocks that they begin with
alike. Requests name no session: one whose blocks go on from where another one's ended is taken for its next turn. What
is kept is the gap between the turns of a session, not the absolute time: the latter would make bursts that never were.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.simulation.traffic import Plan, Step
from seamount.wire.errors import InvalidArgument

BLOCK_TOKENS = 512
FIRST_ID = 1 << 31
"""Of the ids that stand for a trace's text; sessions' own ids are below."""
ANSWER_S_PER_TOKEN = 0.03
"""Of the time between two requests, what the first one's answer took; the rest is think time."""
TOOL = "trace"
MIN_WAIT_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    timestamp_s: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def parse_requests(lines: Iterable[str]) -> list[Request]:
    """In order of time. Raises InvalidArgument, naming the line and the field, for anything else than such a trace."""
    requests = []
    for number, text in enumerate(lines, start=1):
        try:
            found = json.loads(text)
            request = Request(
                timestamp_s=float(found["timestamp"]) / 1e3,
                input_length=int(found["input_length"]),
                output_length=int(found["output_length"]),
                hash_ids=tuple(int(one) for one in found["hash_ids"]),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidArgument(
                f"line {number} is not a request of a Mooncake trace: {type(error).__name__} {error}", field="trace"
            ) from None
        num_blocks = -(-request.input_length // BLOCK_TOKENS)
        if request.input_length < 1 or request.output_length < 1 or len(request.hash_ids) != num_blocks:
            raise InvalidArgument(
                f"line {number} has {len(request.hash_ids)} hash_ids for {request.input_length} tokens; there must be "
                f"one for each {BLOCK_TOKENS}, and at least one token of input and output",
                field="hash_ids",
            )
        requests.append(request)
    return sorted(requests, key=lambda one: one.timestamp_s)


def token_ids(hash_ids: Iterable[int], num_tokens: int) -> array[int]:
    """Ids that are alike where the blocks are."""
    ids = array("I")
    for block in hash_ids:
        first = FIRST_ID + block * BLOCK_TOKENS
        ids.extend(range(first, first + BLOCK_TOKENS))
    return ids[:num_tokens]


@dataclass(slots=True)
class _Turns:
    """A session as its requests come."""

    started_s: float
    last: Request
    steps: list[Step] = field(default_factory=list)


def plans_of(requests: Iterable[Request]) -> list[Plan]:
    """One for each session that the requests make."""
    sessions: list[_Turns] = []
    ends: dict[int, _Turns] = {}
    known: set[int] = set()
    start_s: float | None = None
    for request in requests:
        start_s = request.timestamp_s if start_s is None else start_s
        last_full = next((one for one in reversed(request.hash_ids) if one in ends), None)
        turns = ends.pop(last_full, None) if last_full is not None else None
        gap_s = 0.0
        if turns is None:
            turns = _Turns(request.timestamp_s - start_s, request)
            sessions.append(turns)
        else:
            gap_s = request.timestamp_s - turns.last.timestamp_s - turns.last.output_length * ANSWER_S_PER_TOKEN
        new_blocks = sum(1 for one in request.hash_ids if one not in known)
        known.update(request.hash_ids)
        turns.steps.append(
            Step(
                tool=TOOL,
                wait_s=max(MIN_WAIT_S, gap_s),
                num_appended=min(new_blocks * BLOCK_TOKENS, request.input_length),
                num_reasoning=0,
                num_output=request.output_length,
                text=token_ids(request.hash_ids, request.input_length),
            )
        )
        turns.last = request
        num_full = request.input_length // BLOCK_TOKENS
        if num_full:
            ends[request.hash_ids[num_full - 1]] = turns
    return [Plan(agent=0, steps=tuple(one.steps), starts_after_s=one.started_s) for one in sessions]


def read_trace(path: Path) -> list[Plan]:
    """Raises InvalidArgument for a file that cannot be read, or is no such trace."""
    try:
        with path.open(encoding="utf-8") as lines:
            return plans_of(parse_requests(line for line in lines if line.strip()))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"cannot read {path}: {error}", field="trace") from None
