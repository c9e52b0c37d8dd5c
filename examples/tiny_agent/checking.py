"""Judges a turn by what was done and what was answered; any wording that names the right values will do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.tiny_agent.mentions import mentions, numbers_in, position_of
from examples.tiny_agent.tables import Rows
from examples.tiny_agent.tools import Arguments
from examples.tiny_agent.turns import Check, Evidence

MAX_ANSWER_CHARS = 1000
"""A longer answer counts as a list of guesses."""


@dataclass(frozen=True, slots=True)
class MadeCall:
    """A call as it was made. block: the assistant message of the turn, from 0; valid: known tool, arguments valid under
    its schema; result: as the model read it."""

    block: int
    name: str
    arguments: Arguments
    valid: bool
    result: str

    @property
    def failed(self) -> bool:
        return "error" in self.parsed_result

    @property
    def parsed_result(self) -> dict[str, Any]:
        return dict(json.loads(self.result))


@dataclass(slots=True, kw_only=True)
class Trace:
    """What happened in a turn. state_before, state_after: all records."""

    state_before: dict[str, Rows]
    calls: list[MadeCall] = field(default_factory=list)
    first_reasoning: str = ""
    answer: str = ""
    ended: bool = False
    """The answer ended by EOS, within the steps allowed."""
    state_after: dict[str, Rows] = field(default_factory=dict)


def failure(check: Check, trace: Trace) -> str:
    """Why a turn does not count; empty where it does."""
    for rule in _RULES:
        reason = rule(check, trace)
        if reason:
            return reason
    return ""


def _ended(check: Check, trace: Trace) -> str:
    if not trace.ended:
        return "it did not come to an answer"
    return "the answer is too long" if len(trace.answer) > MAX_ANSWER_CHARS else ""


def _number_of_calls(check: Check, trace: Trace) -> str:
    if check.max_calls is not None and len(trace.calls) > check.max_calls:
        return f"{len(trace.calls)} calls where {check.max_calls} are allowed"
    first_block = sum(call.block == 0 for call in trace.calls)
    return f"{first_block} calls in the first block, not {check.parallel}" if first_block < check.parallel else ""


def _state(check: Check, trace: Trace) -> str:
    wanted = trace.state_before if check.state is None else check.state
    return "" if trace.state_after == wanted else "the records are not as they should be"


def _evidence(check: Check, trace: Trace) -> str:
    shown = [record for call in trace.calls for record in _records(call.parsed_result)]
    for wanted in check.evidence:
        if not any(_shows(record, wanted) for record in shown):
            return f"no result showed {wanted.field} of {wanted.key}"
    results = [call.parsed_result.get("result") for call in trace.calls]
    for number in check.results:
        if number not in results:
            return f"no calculator gave {number}"
    return ""


def _records(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _records(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _records(inner)


def _shows(record: dict[str, Any], wanted: Evidence) -> bool:
    return record.get(wanted.key_name) == wanted.key and _same(record.get(wanted.field), wanted.value)


def _same(value: Any, wanted: Any) -> bool:
    return type(value) is type(wanted) and bool(value == wanted)


def _required_calls(check: Check, trace: Trace) -> str:
    for name, arguments in check.required_calls:
        if not any(call.name == name and call.arguments == arguments and not call.failed for call in trace.calls):
            return f"{name} was not called as asked"
    for name, key in check.failed_calls:
        if not any(call.name == name and key in call.arguments.values() and call.failed for call in trace.calls):
            return f"{name} was not tried with {key}"
    return ""


def _answer(check: Check, trace: Trace) -> str:
    answer = trace.answer
    if check.exact and answer.strip() != check.exact.strip():
        return "the answer is not the text asked for"
    at = 0
    for value in check.values:
        found = position_of(answer, value, at)
        if found < 0:
            return f"the answer does not name {value}"
        at = found + 1 if check.ordered else 0
    for value in check.forbidden:
        if mentions(answer, value):
            return f"the answer names {value}, too"
    if check.any_of and not any(mentions(answer, phrase) for phrase in check.any_of):
        return f"the answer says none of {', '.join(check.any_of)}"
    return ""


def _first(check: Check, trace: Trace) -> str:
    if not check.first:
        return ""
    first = position_of(trace.answer, check.first)
    for rival in check.rivals:
        if 0 <= position_of(trace.answer, rival) < first:
            return f"the answer names {rival} before {check.first}"
    return ""


def _choice(check: Check, trace: Trace) -> str:
    if check.number_range is not None:
        return _number_choice(check.number_range, trace)
    if not check.options:
        return ""
    chosen = _first_mentioned(trace.first_reasoning, check.options)
    if chosen is None:
        return "the first reasoning chooses nothing"
    named = [option for option in check.options if mentions(trace.answer, option)]
    return "" if named == [chosen] else f"the answer names {', '.join(named) or 'no option'}, chosen was {chosen}"


def _first_mentioned(text: str, options: Sequence[str]) -> str | None:
    places = {option: position_of(text, option) for option in options}
    found = [option for option in options if places[option] >= 0]
    return min(found, key=places.__getitem__) if found else None


def _number_choice(number_range: tuple[int, int], trace: Trace) -> str:
    low, high = number_range
    chosen = next((number for _, number in numbers_in(trace.first_reasoning) if low <= number <= high), None)
    if chosen is None:
        return "the first reasoning thinks of no number"
    return "" if mentions(trace.answer, chosen) else f"the answer does not name {chosen:g}, the number thought of"


_RULES: tuple[Callable[[Check, Trace], str], ...] = (
    _ended,
    _number_of_calls,
    _required_calls,
    _evidence,
    _state,
    _answer,
    _first,
    _choice,
)
