"""DeepSeek-V3.2's message encoding: what the official ``encoding_dsv32.py`` renders, as runs instead of one string.

A *run* is the text between two control tokens, template and user text together; it is encoded once, by a tokenizer
without added tokens. Control ids come from the template alone, so text that spells one stays text, and the ids equal
those of the official encoding wherever user text spells none.

Where the official encoder fails or leaves a choice, the rule here is:

- a developer message before the last user message keeps its place (the official one drops it and then fails);
- an assistant message after the last user message, in thinking mode, without reasoning and without calls is rendered
  with empty reasoning (the official one raises);
- tool results are sorted into the order of the calls (the official one goes by position);
- JSON (tools, arguments, response format) is parsed strictly and rendered in one form, key order kept;
- two user messages in a row each get their assistant tag, a system message stands where it is given (as officially).

Messages have passed ``messages.check_messages`` and ``messages.check_turn``.
"""

from __future__ import annotations

import functools
import re
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from seamount.router import strict_json
from seamount.router.messages import ASKING_ROLES, Message, Role, ThinkingMode, ToolCall, in_call_order
from seamount.router.tokenizer import Control, Tokenizer

ENCODER_VERSION = "deepseek-v3.2/1"
"""Part of a session's fingerprint: changes whenever the same messages would give other ids."""

_TOOLS = """\


## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the \
user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:

<｜DSML｜function_calls>
...
</｜DSML｜function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
"""
_TOOLS_END = "\n</functions>\n"
_RESPONSE_FORMAT = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
_DEVELOPER_CONTENT = "\n\n# The user's message is: "


@dataclass(frozen=True, slots=True)
class Sampled:
    """Ids that stand in the prompt as they are."""

    token_ids: array[int]


Piece = Control | str | Sampled


class Runs:
    """Collects a rendering; adjacent text becomes one run."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._text: list[str] = []

    def text(self, text: str) -> None:
        """Text of a user or of the template; control literals in it stay text."""
        self._text.append(text)

    def template(self, literal: str) -> None:
        """Template text: its control literals become control tokens."""
        for piece in _split_literal(literal):
            if isinstance(piece, Control):
                self.control(piece)
            else:
                self.text(piece)

    def control(self, control: Control) -> None:
        self._end_run()
        self._pieces.append(control)

    def sampled(self, token_ids: array[int]) -> None:
        self._end_run()
        self._pieces.append(Sampled(token_ids))

    def pieces(self) -> list[Piece]:
        """All of it; no two neighbours are text, none is empty text."""
        self._end_run()
        return self._pieces

    def _end_run(self) -> None:
        run = "".join(self._text)
        self._text.clear()
        if run:
            self._pieces.append(run)


_CONTROL_PATTERN = re.compile("(" + "|".join(re.escape(control.value) for control in Control) + ")")


@functools.cache  # of the few constants above and below
def _split_literal(literal: str) -> tuple[Control | str, ...]:
    controls = {control.value: control for control in Control}
    return tuple(controls.get(part, part) for part in _CONTROL_PATTERN.split(literal) if part)


def render(
    messages: Sequence[Message],
    *,
    mode: ThinkingMode,
    pending_tool_calls: Sequence[ToolCall] = (),
    user_follows: bool = False,
    begins: bool = True,
) -> Runs:
    """Render consecutive messages; more may be appended to the result.

    pending_tool_calls: the calls of the assistant message before the first one, where that one is a tool message.
    user_follows: a later message asks again, so that all reasoning here is cut.
    begins: start with BOS.
    """
    runs = Runs()
    if begins:
        runs.control(Control.BOS)
    last_asking = max((i for i, message in enumerate(messages) if message.role in ASKING_ROLES), default=-1)
    if user_follows:
        last_asking = len(messages)
    calls = pending_tool_calls
    i = 0
    while i < len(messages):
        message = messages[i]
        thinks = mode is ThinkingMode.THINKING and i >= last_asking
        if message.role is Role.TOOL:
            results = list(takewhile(lambda following: following.role is Role.TOOL, messages[i:]))
            _render_results(runs, in_call_order(results, calls), thinks=thinks)
            i += len(results)
            continue
        if message.role is Role.ASSISTANT:
            _render_assistant(runs, message, thinks=thinks)
        elif message.role is Role.SYSTEM:
            runs.text(message.content)
            _render_tools_and_format(runs, message)
        else:
            _render_asking(runs, message, thinks=thinks)
        calls = message.tool_calls
        i += 1
    return runs


def _render_asking(runs: Runs, message: Message, *, thinks: bool) -> None:
    runs.control(Control.USER)
    if message.role is Role.DEVELOPER:
        _render_tools_and_format(runs, message)
        runs.text(_DEVELOPER_CONTENT)
    runs.text(message.content)
    runs.control(Control.ASSISTANT)
    runs.control(Control.THINK if thinks else Control.END_THINK)


def _render_tools_and_format(runs: Runs, message: Message) -> None:
    if message.tools:
        runs.template(_TOOLS)
        runs.text("\n".join(_canonical(tool.function_json) for tool in message.tools))
        runs.text(_TOOLS_END)
    if message.response_format_json:
        runs.text(_RESPONSE_FORMAT + _canonical(message.response_format_json))


def _render_assistant(runs: Runs, message: Message, *, thinks: bool) -> None:
    if thinks:
        runs.text(message.reasoning_content)
        runs.control(Control.END_THINK)
    runs.text(message.content)
    if message.tool_calls:
        runs.template("\n\n<｜DSML｜function_calls>")
        for call in message.tool_calls:
            _render_call(runs, call)
        runs.template("\n</｜DSML｜function_calls>")
    runs.control(Control.EOS)


def _render_call(runs: Runs, call: ToolCall) -> None:
    runs.template("\n<｜DSML｜invoke")
    runs.text(f' name="{call.name}">\n')
    for i, (name, value) in enumerate(strict_json.parse(call.arguments_json).items()):
        is_string = isinstance(value, str)
        runs.template("\n<｜DSML｜parameter" if i else "<｜DSML｜parameter")
        runs.text(f' name="{name}" string="{"true" if is_string else "false"}">')
        runs.text(value if is_string else strict_json.dump(value))
        runs.template("</｜DSML｜parameter>")
    runs.template("\n</｜DSML｜invoke>")


def _render_results(runs: Runs, results: Sequence[Message], *, thinks: bool) -> None:
    runs.text("\n\n<function_results>")
    for result in results:
        runs.text(f"\n<result>{result.content}</result>")
    runs.text("\n</function_results>\n\n")
    runs.control(Control.THINK if thinks else Control.END_THINK)


def _canonical(json_text: str) -> str:
    return strict_json.dump(strict_json.parse(json_text))


def to_text(pieces: Iterable[Piece], tokenizer: Tokenizer | None = None) -> str:
    """The rendering as one string, control tokens spelt out. Sampled pieces need the tokenizer."""
    parts: list[str] = []
    for piece in pieces:
        if isinstance(piece, Sampled):
            assert tokenizer is not None, "sampled ids need a tokenizer"
            parts.append(tokenizer.decode(piece.token_ids))
        else:
            parts.append(piece.value if isinstance(piece, Control) else piece)
    return "".join(parts)


class RunEncoder:
    """Pieces to token ids. Remembers the ids of recent runs: system prompts and tools come again with every turn.

    Least recently used runs are forgotten once the remembered ones exceed ``max_cached_chars`` characters. Belongs to
    one thread.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_cached_chars: int = 16 << 20) -> None:
        self.tokenizer = tokenizer
        self._max_cached_chars = max_cached_chars
        self._num_cached_chars = 0
        self._ids_of_run: OrderedDict[str, array[int]] = OrderedDict()

    def encode(self, pieces: Iterable[Piece]) -> array[int]:
        """Ids ('I') of a rendering, each run encoded by itself."""
        token_ids = array("I")
        for piece in pieces:
            if isinstance(piece, Control):
                token_ids.append(self.tokenizer.control_id(piece))
            elif isinstance(piece, Sampled):
                token_ids.extend(piece.token_ids)
            else:
                token_ids.extend(self._run(piece))
        return token_ids

    def encode_messages(self, messages: Sequence[Message], mode: ThinkingMode) -> list[int]:
        """The prompt of a conversation that starts here, ready to be continued."""
        return list(self.encode(render(messages, mode=mode).pieces()))

    def adopt(self, other: RunEncoder) -> None:
        """Remember what another encoder of the same tokenizer has encoded."""
        for text, token_ids in other._ids_of_run.items():
            self._remember(text, token_ids)

    def _run(self, text: str) -> array[int]:
        known = self._ids_of_run.get(text)
        if known is not None:
            self._ids_of_run.move_to_end(text)
            return known
        token_ids = array("I", self.tokenizer.encode(text))
        self._remember(text, token_ids)
        return token_ids

    def _remember(self, text: str, token_ids: array[int]) -> None:
        if text in self._ids_of_run or len(text) > self._max_cached_chars:
            return
        self._ids_of_run[text] = token_ids
        self._num_cached_chars += len(text)
        while self._num_cached_chars > self._max_cached_chars:
            forgotten, _ = self._ids_of_run.popitem(last=False)
            self._num_cached_chars -= len(forgotten)
