"""The model's output, parsed one token at a time: reasoning, content, tool calls, stop strings, the end.

What comes out is a function of the token ids alone, never of how they were batched, and takes time linear in their
number. Structure is told by control ids only: text that spells a marker is text. No text is lost: what is withheld
because it may begin a marker or a stop string is delivered once it did not, and what fails to be a tool call is content
(``dsml``). Control tokens in places where they mean nothing are delivered as the text that they spell; a tool call
inside the reasoning is reasoning. Bytes that are no UTF-8 become U+FFFD.

Up to two newlines before a block of tool calls belong to the block; text behind a block is content again.

Stop strings are matched in what the client sees as text, reasoning and content, each by itself and not across a tool
call; arguments of calls are not searched.
"""

from __future__ import annotations

import codecs
import enum
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from seamount.router.deltas import CallStarted, ContentText, OutputText, ParsedDelta, ReasoningText
from seamount.router.dsml import BlockState, DsmlBlock
from seamount.router.messages import Message, Role, ThinkingMode, ToolCall
from seamount.router.stop_strings import StopStrings
from seamount.router.tokenizer import Control, Tokenizer
from seamount.v1 import common_pb2

FinishReason = common_pb2.FinishReason


class OutputMode(enum.Enum):
    CHAT = enum.auto()
    THINKING = enum.auto()
    """The prompt ended with ``<think>``."""
    RAW = enum.auto()
    """Content only: nothing but EOS has a meaning."""

    @classmethod
    def of(cls, mode: ThinkingMode) -> OutputMode:
        return cls.THINKING if mode is ThinkingMode.THINKING else cls.CHAT


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedOutput:
    """A finished output."""

    reason: FinishReason
    message: Message
    num_tokens: int
    """How many of the ids fed make up the message, EOS included. The others lie behind the end: cut them off."""
    num_reasoning_tokens: int
    """Without the closing ``</think>``."""
    thought_is_open: bool
    """The output ended before ``</think>``."""
    cut_bytes: bytes
    """Delivered text of the first id cut off: what it holds before the stop string."""
    incomplete_calls: tuple[ToolCall, ...]
    """Calls that were started and never finished, arguments as far as they came; their text is content."""


class TurnParser:
    """Parser of one output. ``feed`` until ``ended`` or until no more tokens come, then ``finish`` once.

    stop_token_ids: end the message like EOS, but are not part of it. call_id_prefix: ids of calls are this and the
    call's index. Stop strings must not be empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        mode: OutputMode,
        *,
        call_id_prefix: str,
        stop_strings: Sequence[str] = (),
        stop_token_ids: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._raw = mode is OutputMode.RAW
        self._stop_token_ids = frozenset(stop_token_ids)
        self._prefix = call_id_prefix
        self._stops = StopStrings(stop_strings)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._undecoded = False
        self._thinking = mode is OutputMode.THINKING
        self._block: DsmlBlock | None = None
        self._held = ""  # content that may begin a block
        self._token_ids: list[int] = []
        self._position = 0  # characters so far, markers and control tokens included
        self._ends: list[int] = []  # of each token, a character begun counted as whole
        self._ends_inside = bytearray()  # whether the token ends inside a character
        self._num_reasoning_tokens = 0
        self._output = OutputText()
        self._calls: list[ToolCall] = []
        self._incomplete: list[ToolCall] = []
        self._reason: FinishReason | None = None
        self._stopped_by_token = False
        self._match: int | None = None  # position of the stop string

    @property
    def ended(self) -> bool:
        """Whether the output is over by itself (EOS, stop token, stop string): what is fed later is ignored."""
        return self._reason is not None

    def feed(self, token_id: int) -> list[ParsedDelta]:
        """Take in the next token; returns what it lets out, possibly nothing, no text empty."""
        if self._reason is not None:
            return []
        self._token_ids.append(token_id)
        control = self._tokenizer.control(token_id)
        if token_id in self._stop_token_ids and control is not Control.EOS:
            self._stopped_by_token = True
            self._end(common_pb2.FINISH_REASON_STOP_SEQUENCE)
        elif control is None:
            self._text(self._decode(self._tokenizer.token_bytes(token_id)))
        else:
            self._flush_decoder()
            self._control(control)
        self._ends.append(self._position + self._undecoded)
        self._ends_inside.append(self._undecoded)
        return self._output.take()

    def finish(self, reason: FinishReason) -> tuple[list[ParsedDelta], ParsedOutput]:
        """No more tokens come. ``reason`` says why, where the output is not over by itself."""
        if self._reason is None:
            self._end(reason)
        assert self._reason is not None
        num_tokens, cut_bytes = self._cut()
        output = ParsedOutput(
            reason=self._reason,
            message=Message(
                role=Role.ASSISTANT,
                content=self._output.content,
                reasoning_content=self._output.reasoning,
                tool_calls=tuple(self._calls),
            ),
            num_tokens=num_tokens,
            num_reasoning_tokens=self._count_reasoning(num_tokens),
            thought_is_open=self._thinking,
            cut_bytes=cut_bytes,
            incomplete_calls=tuple(self._incomplete),
        )
        return self._output.take(), output

    def _end(self, reason: FinishReason) -> None:
        """Let out what is withheld; a stop string that it completes is the reason before any other."""
        self._flush_decoder()
        if self._block is not None:
            incomplete = self._block.abandon()
            self._leave_block(self._block, incomplete)
        held, self._held = self._held, ""
        self._show(held, self._position - len(held))
        if self._reason is None:
            self._emit_text(self._stops.flush())
            asks = reason == common_pb2.FINISH_REASON_STOP and self._calls
            self._reason = common_pb2.FINISH_REASON_TOOL_CALLS if asks else reason

    def _cut(self) -> tuple[int, bytes]:
        """How many tokens to keep, and the delivered bytes of the first one cut off."""
        if self._match is None:
            return len(self._token_ids) - self._stopped_by_token, b""
        kept = bisect_right(self._ends, self._match)
        cut = self._tokenizer.token_bytes(self._token_ids[kept])
        end = self._ends[kept - 1] if kept else 0
        rest_of_character = 0
        if kept and self._ends_inside[kept - 1]:
            while rest_of_character < len(cut) and cut[rest_of_character] & 0xC0 == 0x80:
                rest_of_character += 1
        shown = cut[rest_of_character:].decode("utf-8", "replace")[: self._match - end]
        return kept, cut[:rest_of_character] + shown.encode()

    def _count_reasoning(self, num_tokens: int) -> int:
        if not self._thinking:
            return self._num_reasoning_tokens
        ends_with_eos = num_tokens and self._tokenizer.control(self._token_ids[num_tokens - 1]) is Control.EOS
        return num_tokens - 1 if ends_with_eos else num_tokens

    # Tokens to text and control tokens.

    def _decode(self, token: bytes) -> str:
        if not self._undecoded:
            try:
                return token.decode()
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(token)
        self._undecoded = bool(self._decoder.getstate()[0])
        return text

    def _flush_decoder(self) -> None:
        if self._undecoded:
            self._undecoded = False
            self._text(self._decoder.decode(b"", final=True))
            self._decoder.reset()

    def _control(self, control: Control) -> None:
        if self._reason is not None:  # a stop string was completed by the bytes before
            return
        if control is Control.EOS:
            self._end(common_pb2.FINISH_REASON_STOP)
        elif control is Control.END_THINK and self._thinking:
            self._emit_text(self._stops.flush())
            self._num_reasoning_tokens = len(self._token_ids) - 1
            self._thinking = False
            self._position += len(control.value)
        elif control is Control.DSML and self._block is not None:
            self._after_block_read(self._block, self._block.marker(), len(control.value))
        elif control is Control.DSML and self._held.endswith("<"):
            opening, self._held = self._held + control.value, ""
            self._position += len(control.value)
            self._block = DsmlBlock(
                opening,
                self._position - len(opening),
                first_index=len(self._calls),
                call_id_prefix=self._prefix,
            )
        else:
            self._text(control.value)

    # Text to its place.

    def _text(self, text: str) -> None:
        if self._block is not None:
            self._after_block_read(self._block, self._block.text(text), len(text))
            return
        start, self._position = self._position, self._position + len(text)
        if self._thinking or self._raw:
            self._show(text, start)
        else:
            self._show_content(text, start)

    def _show_content(self, text: str, position: int) -> None:
        known = self._held + text
        num_held = _num_held(known)
        passed = len(known) - num_held
        position -= len(self._held)
        self._held = known[passed:]
        self._show(known[:passed], position)

    def _after_block_read(self, block: DsmlBlock, deltas: list[ParsedDelta], num_chars: int) -> None:
        self._position += num_chars
        for delta in deltas:
            if isinstance(delta, CallStarted):
                self._emit_text(self._stops.flush())
            self._output.add(delta)
        if block.state is not BlockState.OPEN:
            self._leave_block(block, block.abandon())

    def _leave_block(self, block: DsmlBlock, incomplete: ToolCall | None) -> None:
        self._block = None
        self._calls.extend(block.calls)
        if incomplete is not None:
            self._incomplete.append(incomplete)
        if block.state is BlockState.FAILED:
            self._show_content(block.rejected, block.rejected_position)
        else:
            self._show_content(block.leftover, self._position - len(block.leftover))

    def _show(self, text: str, position: int) -> None:
        if self._reason is not None or not text:
            return
        shown, match = self._stops.feed(text, position)
        self._emit_text(shown)
        if match is not None:
            self._reason, self._match = common_pb2.FINISH_REASON_STOP_SEQUENCE, match

    def _emit_text(self, text: str) -> None:
        if text:
            self._output.add(ReasoningText(text) if self._thinking else ContentText(text))


def _num_held(text: str) -> int:
    """Length of the longest suffix that may begin a block: up to two newlines, then perhaps ``<``."""
    num_open = 1 if text.endswith("<") else 0
    before = text[max(0, len(text) - num_open - 2) : len(text) - num_open]
    return num_open + len(before) - len(before.rstrip("\n"))
