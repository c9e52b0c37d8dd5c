"""Reads one block of DSML tool calls, piece by piece, in time linear in its text.

    \\n\\n<｜DSML｜function_calls>
    <｜DSML｜invoke name="N">
    <｜DSML｜parameter name="k" string="true|false">value</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>

``｜DSML｜`` is the control token only; text that spells it is text. Between tags any white space will do. A call counts
once its closing tag is there. At the first deviation, or where the text ends too early, the block *fails*: the calls
completed before stay, and everything behind them, the open call included, is ``rejected``, to be delivered as content,
so that nothing is ever lost.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from seamount.router import strict_json
from seamount.router.deltas import CallArguments, CallFinished, CallStarted, ParsedDelta
from seamount.router.messages import ToolCall, is_name
from seamount.router.tokenizer import Control
from seamount.wire import limits

_MARKER = Control.DSML.value
_NAME_END = '">'
_PARAMETER_ENDS = {'" string="true">': True, '" string="false">': False}
_MAX_HEADER_CHARS = limits.MAX_PARAMETER_NAME_BYTES + max(map(len, _PARAMETER_ENDS))


class BlockState(enum.Enum):
    OPEN = enum.auto()
    CLOSED = enum.auto()
    """``leftover`` holds the text behind the closing tag."""
    FAILED = enum.auto()
    """``rejected`` holds the text that is content."""


class DsmlBlock:
    """One block, from just behind the first marker on.

    opening: the text up to and with the first marker; position: of that text's first character.
    """

    def __init__(self, opening: str, position: int, *, first_index: int, call_id_prefix: str) -> None:
        self.state = BlockState.OPEN
        self.calls: list[ToolCall] = []
        self.leftover = ""
        self.rejected = ""
        self.rejected_position = position
        self._unit = [opening]  # raw text since the last completed call
        self._end = position + len(opening)
        self._prefix = call_id_prefix
        self._index = first_index
        self._name: str | None = None  # of the open call
        self._keys: set[str] = set()
        self._arguments: list[str] = []
        self._buffer = ""  # not yet understood; short
        self._literal = ""
        self._after_literal: Callable[[], bool] = self._read_gap
        self._read: Callable[[], bool]
        self._deltas: list[ParsedDelta] = []
        self._raw_value: list[str] | None = None
        self._expect("function_calls>", self._read_gap)

    def text(self, text: str) -> list[ParsedDelta]:
        """Take in the next text; only while OPEN."""
        self._unit.append(text)
        self._end += len(text)
        self._buffer += text
        return self._advance()

    def marker(self) -> list[ParsedDelta]:
        """Take in a DSML control token; only while OPEN."""
        self._unit.append(_MARKER)
        self._end += len(_MARKER)
        if self._read == self._read_value_end:
            self._resume_value()
            self._read_value()
        if self._read == self._read_value:
            self._mark_in_value()
        elif self._read == self._read_gap and self._buffer in ("<", "</"):
            self._open_tag()
        else:
            self._fail()
        return self._advance()

    def abandon(self) -> ToolCall | None:
        """The block goes no further: fail, if it is still open. Returns the call that was started and not finished."""
        incomplete = None
        if self._name is not None:
            incomplete = ToolCall(id=self._call_id, name=self._name, arguments_json="".join(self._arguments))
        if self.state is BlockState.OPEN:
            self._fail()
        return incomplete

    @property
    def _call_id(self) -> str:
        return f"{self._prefix}{self._index}"

    def _advance(self) -> list[ParsedDelta]:
        while self.state is BlockState.OPEN and self._read():
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    def _fail(self) -> None:
        self.state = BlockState.FAILED
        self.rejected = "".join(self._unit)
        self.rejected_position = self._end - len(self.rejected)

    # Each reader takes what it understands from the buffer; False: it needs more.

    def _read_literal(self) -> bool:
        if self._buffer.startswith(self._literal):
            self._buffer = self._buffer[len(self._literal) :]
            self._read = self._after_literal
            return True
        if not self._literal.startswith(self._buffer):
            self._fail()
        return False

    def _read_gap(self) -> bool:
        self._buffer = self._buffer.lstrip()
        if self.calls and self._name is None:
            self._unit = [self._buffer]  # white space between tags is no text of anybody's
        if self._buffer not in ("", "<", "</"):
            self._fail()
        return False

    def _read_call_name(self) -> bool:
        name, end, rest = self._buffer.partition(_NAME_END)
        if not end:
            return self._need_more_header(limits.MAX_NAME_BYTES)
        if not is_name(name):
            self._fail()
            return False
        self._name, self._buffer, self._read = name, rest, self._read_gap
        self._keys, self._arguments = set(), []
        self._deltas.append(CallStarted(self._index, self._call_id, name))
        return True

    def _read_parameter_name(self) -> bool:
        found = [(self._buffer.find(end), end) for end in _PARAMETER_ENDS if end in self._buffer]
        if not found:
            return self._need_more_header(_MAX_HEADER_CHARS)
        at, end = min(found)
        key = self._buffer[:at]
        if key in self._keys or len(key.encode()) > limits.MAX_PARAMETER_NAME_BYTES:
            self._fail()
            return False
        self._buffer = self._buffer[at + len(end) :]
        opening = f"{', ' if self._keys else '{'}{strict_json.dump(key)}: "
        self._keys.add(key)
        if _PARAMETER_ENDS[end]:
            self._raw_value = None
            self._argue(f'{opening}"')
        else:
            self._raw_value = []
            self._argue(opening)
        self._read = self._read_value
        return True

    def _read_value(self) -> bool:
        held = 2 if self._buffer.endswith("</") else 1 if self._buffer.endswith("<") else 0
        passed = len(self._buffer) - held
        self._add_to_value(self._buffer[:passed])
        self._buffer = self._buffer[passed:]
        return False

    def _read_value_end(self) -> bool:
        if self._buffer.startswith("parameter>"):
            self._buffer = self._buffer[len("parameter>") :]
            self._end_value()
            self._read = self._read_gap
            return True
        if not "parameter>".startswith(self._buffer):
            self._resume_value()
            return True
        return False

    def _need_more_header(self, max_chars: int) -> bool:
        if len(self._buffer) > max_chars + len(_NAME_END):
            self._fail()
        return False

    # What the readers lead to.

    def _expect(self, literal: str, then: Callable[[], bool]) -> None:
        self._literal, self._after_literal, self._read = literal, then, self._read_literal

    def _open_tag(self) -> None:
        closes, in_call = self._buffer == "</", self._name is not None
        self._buffer = ""
        if closes:
            self._expect("invoke>" if in_call else "function_calls>", self._end_call if in_call else self._end_block)
        elif in_call:
            self._expect('parameter name="', self._read_parameter_name)
        else:
            self._expect('invoke name="', self._read_call_name)

    def _end_call(self) -> bool:
        assert self._name is not None
        self._argue("}" if self._keys else "{}")
        self.calls.append(ToolCall(id=self._call_id, name=self._name, arguments_json="".join(self._arguments)))
        self._deltas.append(CallFinished(self._index))
        self._index += 1
        self._name = None
        self._unit = [self._buffer]
        self._read = self._read_gap
        return True

    def _end_block(self) -> bool:
        if not self.calls:  # an empty block is no call, so it is text
            self._fail()
            return False
        self.leftover, self._buffer = self._buffer, ""
        self.state = BlockState.CLOSED
        return False

    def _mark_in_value(self) -> None:
        if self._buffer == "</":
            self._buffer, self._read = "", self._read_value_end
        else:
            self._add_to_value(self._buffer + _MARKER)
            self._buffer = ""

    def _resume_value(self) -> None:
        self._add_to_value(f"</{_MARKER}")
        self._read = self._read_value

    def _add_to_value(self, text: str) -> None:
        if not text:
            return
        if self._raw_value is None:
            self._argue(strict_json.dump(text)[1:-1])
        else:
            self._raw_value.append(text)

    def _end_value(self) -> None:
        if self._raw_value is None:
            self._argue('"')
            return
        text = "".join(self._raw_value)
        try:
            self._argue(strict_json.dump(strict_json.parse(text, limits.MAX_JSON_DEPTH - 1)))
        except ValueError:
            self._argue(strict_json.dump(text))

    def _argue(self, arguments_json: str) -> None:
        self._arguments.append(arguments_json)
        self._deltas.append(CallArguments(self._index, arguments_json))
