"""Turns as messages of the project's own encoding, and as token ids with the assistant's marked."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from examples.tiny_agent.tools import Tool
from examples.tiny_agent.turns import Turn
from seamount.router import strict_json
from seamount.router.encoding import Piece, render
from seamount.router.messages import Message, Role, ThinkingMode, ToolCall
from seamount.router.messages import Tool as ToolSchema
from seamount.router.tokenizer import Control, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    system: str
    tools: tuple[Tool, ...]
    turns: tuple[Turn, ...]

    def opening(self) -> list[Message]:
        """The system message, if there is anything to say in it."""
        if not self.system and not self.tools:
            return []
        schemas = tuple(ToolSchema(function_json=tool.function_json()) for tool in self.tools)
        return [Message(role=Role.SYSTEM, content=self.system, tools=schemas)]

    def messages(self) -> list[Message]:
        """All of it, gold answers included."""
        return self.opening() + [message for i, turn in enumerate(self.turns) for message in turn_messages(turn, i)]


def turn_messages(turn: Turn, index: int) -> list[Message]:
    """A turn's question, gold calls, their results and the answer."""
    messages = [Message(role=Role.USER, content=turn.question)]
    for i, step in enumerate(turn.steps):
        calls = tuple(
            ToolCall(id=f"call-{index}-{i}-{j}", name=call.tool.name, arguments_json=strict_json.dump(call.arguments))
            for j, call in enumerate(step.calls)
        )
        messages.append(Message(role=Role.ASSISTANT, reasoning_content=step.reasoning, tool_calls=calls))
        messages += [
            Message(role=Role.TOOL, content=result, tool_call_id=call.id)
            for call, result in zip(calls, step.results, strict=True)
        ]
    messages.append(Message(role=Role.ASSISTANT, reasoning_content=turn.reasoning, content=turn.answer))
    return messages


@dataclass(frozen=True, slots=True)
class MarkedPiece:
    """A piece of a rendering. learnt: whether the assistant says it, in a message that is worth learning."""

    piece: Piece
    learnt: bool


def marked_pieces(
    conversation: Conversation, mode: ThinkingMode, *, every_reasoning: bool = False
) -> list[MarkedPiece]:
    """The whole conversation, rendered as it is served.

    every_reasoning: each turn as it is served while it is the last one, with its reasoning: one document then teaches
    all of its turns in full.

    What the assistant says begins behind the ``<think>`` or ``</think>`` that ends a prompt and goes on to EOS, EOS
    included. Of turns before the last one only the visible part is there, without reasoning; it is learnt where it can
    be said without.
    """
    learnt = _learnt_messages(conversation, mode, every_reasoning=every_reasoning)
    marked: list[MarkedPiece] = []
    asked = speaking = False
    num_said = 0
    for piece in _pieces(conversation, mode, every_reasoning=every_reasoning):
        marked.append(MarkedPiece(piece, speaking and learnt[num_said]))
        if piece is Control.USER:
            asked = True  # the tools' preamble, before the first question, spells <think>, too
        elif speaking and piece is Control.EOS:
            speaking = False
            num_said += 1
        elif asked and not speaking and piece in (Control.THINK, Control.END_THINK):
            speaking = True
    return marked


def _pieces(conversation: Conversation, mode: ThinkingMode, *, every_reasoning: bool) -> list[Piece]:
    if not every_reasoning:
        return render(conversation.messages(), mode=mode).pieces()
    pieces: list[Piece] = []
    for i, turn in enumerate(conversation.turns):
        before = [] if i else conversation.opening()
        pieces += render([*before, *turn_messages(turn, i)], mode=mode, begins=not i).pieces()
    return pieces


def _learnt_messages(conversation: Conversation, mode: ThinkingMode, *, every_reasoning: bool) -> list[bool]:
    """For each assistant message in order."""
    last = len(conversation.turns) - 1
    return [
        turn.chat or (mode is ThinkingMode.THINKING and (every_reasoning or i == last))
        for i, turn in enumerate(conversation.turns)
        for _ in range(len(turn.steps) + 1)
    ]


@dataclass(frozen=True, slots=True)
class Document:
    token_ids: npt.NDArray[np.uint16]
    """[n], from BOS to the last EOS."""
    loss_mask: npt.NDArray[np.bool_]
    """[n], True at the tokens to learn."""
    ends: tuple[int, ...] = ()
    """Numbers of tokens at which it may end, behind a turn; empty where it must stay whole."""

    def length_within(self, max_tokens: int) -> int:
        """The most of its tokens that ``max_tokens`` hold, 0 if it has no such part."""
        if len(self.token_ids) <= max_tokens:
            return len(self.token_ids)
        place = bisect.bisect_right(self.ends, max_tokens)
        return self.ends[place - 1] if place else 0

    def first(self, length: int) -> Document:
        """As much of it; ``length`` is of ``length_within``."""
        if length == len(self.token_ids):
            return self
        ends = self.ends[: bisect.bisect_left(self.ends, length)]
        return Document(self.token_ids[:length], self.loss_mask[:length], ends)


class DocumentEncoder:
    """Rendered conversations to token ids, many at a time. Remembers the ids of the template's runs."""

    _MAX_REMEMBERED_CHARS = 100

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, npt.NDArray[np.uint16]] = {}
        self._controls = {control: np.array([tokenizer.control_id(control)], np.uint16) for control in Control}

    def encode(
        self, renderings: Sequence[Sequence[MarkedPiece]], *, may_end: Sequence[bool] | None = None
    ) -> list[Document]:
        """One document each. may_end: which of them may end behind any turn; by default none."""
        texts = [m.piece for marked in renderings for m in marked if isinstance(m.piece, str)]
        unknown = list(dict.fromkeys(text for text in texts if text not in self._known))
        encoded = dict(zip(unknown, map(_ids, self._tokenizer.encode_all(unknown)), strict=True))
        self._known.update({text: ids for text, ids in encoded.items() if _is_template(text)})
        may = may_end or [False] * len(renderings)
        return [self._document(marked, encoded, each) for marked, each in zip(renderings, may, strict=True)]

    def _document(
        self, marked: Sequence[MarkedPiece], encoded: dict[str, npt.NDArray[np.uint16]], may_end: bool
    ) -> Document:
        parts, learnt = [], []
        for item in marked:
            if isinstance(item.piece, Control):
                part = self._controls[item.piece]
            else:
                assert isinstance(item.piece, str), "a gold conversation holds no sampled ids"
                part = self._known[item.piece] if item.piece in self._known else encoded[item.piece]
            parts.append(part)
            learnt.append(item.learnt)
        token_ids = np.concatenate(parts)
        ends: tuple[int, ...] = ()
        if may_end:
            ends = tuple(np.nonzero(token_ids == self._controls[Control.USER])[0][1:].tolist())
        return Document(token_ids, np.repeat(learnt, [len(part) for part in parts]), ends)


def _ids(ids: list[int]) -> npt.NDArray[np.uint16]:
    return np.array(ids, np.uint16)


def _is_template(text: str) -> bool:
    """Runs between two markers of a tool call, which are the same in every conversation."""
    return text in _TEMPLATE_RUNS


_TEMPLATE_RUNS = frozenset(
    {"\n\n<", "function_calls>\n<", "invoke>\n<", "invoke>\n</", "function_calls>", "parameter>\n<", "parameter>\n</"}
)
