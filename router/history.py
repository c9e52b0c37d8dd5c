"""A session's history as the next prompt's token ids.

A turn is stored as its input messages and the very ids that were sampled. Those ids go back into the prompt as they
are: all of them while only tool results have followed, and from behind ``</think>`` on once a new question has come,
which cuts earlier reasoning. They are replaced by an encoding of the stored text in one case only: the turn was made
under another fingerprint.

What a context policy discards (``context_policy.py``) is left out, or replaced, turn by turn.

Every turn ends with EOS, sampled or appended, so turns are encoded one by one and remembered: a new turn costs what is
new in it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from seamount.router.context_policy import Discards, TurnDiscards, discards_of
from seamount.router.encoding import ENCODER_VERSION, Piece, RunEncoder, render
from seamount.router.messages import (
    ASKING_ROLES,
    Message,
    ThinkingMode,
    ToolCall,
    TurnPlan,
    message_from_proto,
    message_to_proto,
    messages_from_proto,
    tool_calls_from_proto,
)
from seamount.router.parsing import ParsedOutput
from seamount.router.tokenizer import Control, Tokenizer
from seamount.v1 import common_pb2, record_pb2

_ASKING_ROLE_NUMBERS = frozenset(role.value for role in ASKING_ROLES)


def session_fingerprint(model_fingerprint: str, tokenizer: Tokenizer) -> str:
    """SHA-256, in hex, over model, tokenizer and encoder: ids are only valid under the one they were made with."""
    parts = (model_fingerprint, tokenizer.fingerprint, ENCODER_VERSION)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def sampled_message(
    token_ids: Sequence[int],
    output: ParsedOutput,
    tokenizer: Tokenizer,
    logprobs: Iterable[common_pb2.TokenLogprobs] = (),
) -> record_pb2.SampledMessage:
    """What is stored of a finished output.

    token_ids: all that the parser was fed; those behind the message's end are left out, their logprobs too. Appended as
    synthetic ids: the delivered text of a token that a stop string cut, ``</think>`` after an open thought, and EOS;
    nothing where EOS was sampled.
    """
    kept = list(token_ids[: output.num_tokens])
    synthetic: list[int] = []
    if not kept or kept[-1] != tokenizer.eos_token_id:
        synthetic = tokenizer.encode_bytes(output.cut_bytes)
        if output.thought_is_open:
            synthetic.append(tokenizer.control_id(Control.END_THINK))
        synthetic.append(tokenizer.eos_token_id)
    return record_pb2.SampledMessage(
        token_ids=kept,
        num_reasoning_tokens=output.num_reasoning_tokens,
        synthetic_token_ids=synthetic,
        message=message_to_proto(output.message),
        logprobs=list(logprobs)[: output.num_tokens],
    )


def pending_after(plan: TurnPlan, output: ParsedOutput | None) -> tuple[ToolCall, ...]:
    """The calls that wait for results after a turn; ``output`` is None where it only recorded."""
    return plan.pending_tool_calls if output is None else output.message.tool_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    token_ids: list[int]
    num_reencoded_turns: int
    """Turns whose sampled ids were made under another fingerprint: their text was encoded anew."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A turn of a history, with what its rendering depends on: the calls before it, whether a user asks later, and what
    of it is discarded."""

    record: record_pb2.TurnRecord
    pending: tuple[ToolCall, ...]
    user_follows: bool
    discards: TurnDiscards


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What ``History.encoded_ahead`` made: new messages, unknown turns, and the runs of both."""

    token_ids: array[int]
    turns: Sequence[tuple[_Place, array[int]]]
    runs: RunEncoder


_Key = tuple[str, bool, TurnDiscards, ThinkingMode]


@dataclass(frozen=True, slots=True)
class _EncodedTurn:
    record: record_pb2.TurnRecord
    pending: tuple[ToolCall, ...]
    token_ids: array[int]


class History:
    """Renders histories of any sessions. Remembers encoded turns, least recently used ones go. Belongs to one thread.

    max_cached_ids: bound on the remembered ids, 4 bytes each.
    """

    def __init__(self, tokenizer: Tokenizer, fingerprint: str, *, max_cached_ids: int = 8 << 20) -> None:
        self.fingerprint = fingerprint
        self._tokenizer = tokenizer
        self._encoder = RunEncoder(tokenizer)
        self._max_cached_ids = max_cached_ids
        self._num_cached_ids = 0
        self._turns: OrderedDict[_Key, _EncodedTurn] = OrderedDict()

    def prompt(
        self,
        records: Sequence[record_pb2.TurnRecord],
        messages: Sequence[Message],
        mode: ThinkingMode,
        *,
        discards: Discards | None = None,
        ahead: Ahead | None = None,
    ) -> Prompt:
        """Token ids of committed turns and new messages, ready to be continued.

        records: all turns of the session, oldest first, unchanged since they were committed. messages: checked by
        ``check_messages`` and ``check_turn``. discards: None = what the last turn had discarded.
        """
        discards = discards_of(records) if discards is None else discards
        asks = any(message.role in ASKING_ROLES for message in messages)
        token_ids = [self._tokenizer.control_id(Control.BOS)]
        for segment in self._segments(records, mode, user_follows=asks, discards=discards):
            token_ids.extend(segment)
        token_ids.extend(
            self._encoder.encode(_new_pieces(records, messages, mode, discards)) if ahead is None else ahead.token_ids
        )
        stale = sum(record.HasField("output") and record.fingerprint != self.fingerprint for record in records)
        return Prompt(token_ids=token_ids, num_reencoded_turns=stale)

    def settled(self, records: Sequence[record_pb2.TurnRecord], mode: ThinkingMode) -> list[int]:
        """What the next prompt begins with if a user's message comes next: the committed turns without reasoning."""
        token_ids = [self._tokenizer.control_id(Control.BOS)]
        for segment in self._segments(records, mode, user_follows=True, discards=discards_of(records)):
            token_ids.extend(segment)
        return token_ids

    def context(self, records: Sequence[record_pb2.TurnRecord], mode: ThinkingMode) -> array[int]:
        """What the next prompt begins with of committed turns: with their last reasoning while calls wait."""
        token_ids = array("I", [self._tokenizer.control_id(Control.BOS)])
        for segment in self._segments(records, mode, user_follows=rests(records), discards=discards_of(records)):
            token_ids.extend(segment)
        return token_ids

    def num_context_tokens(self, records: Sequence[record_pb2.TurnRecord], mode: ThinkingMode) -> int:
        """Length of ``context``."""
        return len(self.context(records, mode))

    def unknown(
        self, records: Sequence[record_pb2.TurnRecord], mode: ThinkingMode, *, user_follows: bool, discards: Discards
    ) -> list[_Place]:
        """The turns that would have to be encoded now."""
        return [place for place in _places(records, user_follows, discards) if self._known(place, mode) is None]

    def encoded_ahead(
        self,
        unknown: Sequence[_Place],
        records: Sequence[record_pb2.TurnRecord],
        messages: Sequence[Message],
        mode: ThinkingMode,
        discards: Discards,
    ) -> Ahead:
        """Encode, on any thread, what ``prompt`` or ``num_context_tokens`` lack. Touches nothing that is remembered."""
        runs = RunEncoder(self._tokenizer)
        turns = [(place, self._encode_turn(place, mode, runs)) for place in unknown]
        return Ahead(token_ids=runs.encode(_new_pieces(records, messages, mode, discards)), turns=turns, runs=runs)

    def learn(self, ahead: Ahead, mode: ThinkingMode) -> None:
        """Remember what was encoded ahead; on the thread that this history belongs to."""
        self._encoder.adopt(ahead.runs)
        for place, token_ids in ahead.turns:
            self._remember(place, mode, token_ids)

    def _segments(
        self, records: Sequence[record_pb2.TurnRecord], mode: ThinkingMode, *, user_follows: bool, discards: Discards
    ) -> list[array[int]]:
        return [self._turn(place, mode) for place in _places(records, user_follows, discards)]

    def _turn(self, place: _Place, mode: ThinkingMode) -> array[int]:
        key, known = _key(place, mode), self._known(place, mode)
        if known is not None:
            self._turns.move_to_end(key)
            return known
        token_ids = self._encode_turn(place, mode, self._encoder)
        self._remember(place, mode, token_ids)
        return token_ids

    def _known(self, place: _Place, mode: ThinkingMode) -> array[int] | None:
        known, record = self._turns.get(_key(place, mode)), place.record
        # Turn ids need not be unique over sessions: what is remembered is used for the same turn only.
        if known is not None and known.pending == place.pending and (known.record is record or known.record == record):
            return known.token_ids
        return None

    def _remember(self, place: _Place, mode: ThinkingMode, token_ids: array[int]) -> None:
        key = _key(place, mode)
        known = self._turns.pop(key, None)
        if known is not None:
            self._num_cached_ids -= len(known.token_ids)
        self._turns[key] = _EncodedTurn(place.record, place.pending, token_ids)
        self._num_cached_ids += len(token_ids)
        while self._num_cached_ids > self._max_cached_ids:
            _, forgotten = self._turns.popitem(last=False)
            self._num_cached_ids -= len(forgotten.token_ids)

    def _encode_turn(self, place: _Place, mode: ThinkingMode, encoder: RunEncoder) -> array[int]:
        record, user_follows = place.record, place.user_follows
        messages = place.discards.kept_input(messages_from_proto(record.input))
        has_output = place.discards.keeps_output(record)
        valid = record.fingerprint == self.fingerprint
        if has_output and not valid:
            messages = (*messages, message_from_proto(record.output.message))
        runs = render(messages, mode=mode, pending_tool_calls=place.pending, user_follows=user_follows, begins=False)
        if has_output and valid:
            cut = user_follows and mode is ThinkingMode.THINKING
            runs.sampled(self._without_reasoning(record.output) if cut else _all_ids(record.output))
        return encoder.encode(runs.pieces())

    def _without_reasoning(self, output: record_pb2.SampledMessage) -> array[int]:
        token_ids = _all_ids(output)
        end_think = self._tokenizer.control_id(Control.END_THINK)
        for i in range(output.num_reasoning_tokens, len(token_ids)):
            if token_ids[i] == end_think:
                return token_ids[i + 1 :]
        return token_ids[output.num_reasoning_tokens :]  # the thought was ended by EOS


def common_len(one: array[int], other: array[int]) -> int:
    """Length of the longest common prefix; by halves, as slices compare fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def rests(records: Sequence[record_pb2.TurnRecord]) -> bool:
    """Whether the next message can only be a question, as no calls wait: earlier reasoning is cut then."""
    return bool(records) and not records[-1].pending_tool_calls


def _new_pieces(
    records: Sequence[record_pb2.TurnRecord], messages: Sequence[Message], mode: ThinkingMode, discards: Discards
) -> list[Piece]:
    messages = discards.of_turn(len(records)).kept_input(messages)
    pending = tool_calls_from_proto(records[-1].pending_tool_calls) if records else ()
    return render(messages, mode=mode, pending_tool_calls=pending, begins=False).pieces()


def _places(records: Sequence[record_pb2.TurnRecord], user_follows: bool, discards: Discards) -> list[_Place]:
    places: list[_Place] = []
    for i in range(len(records) - 1, -1, -1):
        before = records[i - 1].pending_tool_calls if i else ()
        places.append(_Place(records[i], tool_calls_from_proto(before), user_follows, discards.of_turn(i)))
        user_follows = user_follows or any(m.role in _ASKING_ROLE_NUMBERS for m in records[i].input)
    return places[::-1]


def _key(place: _Place, mode: ThinkingMode) -> _Key:
    return place.record.turn_id, place.user_follows, place.discards, mode


def _all_ids(output: record_pb2.SampledMessage) -> array[int]:
    token_ids = array("I", output.token_ids)
    token_ids.extend(output.synthetic_token_ids)
    return token_ids
