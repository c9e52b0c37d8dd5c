"""What a parser says while tokens come in, and how it adds up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningText:
    text: str


@dataclass(frozen=True, slots=True)
class ContentText:
    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of the JSON object's text."""

    index: int
    arguments_json: str


@dataclass(frozen=True, slots=True)
class CallFinished:
    index: int


ParsedDelta = ReasoningText | ContentText | CallStarted | CallArguments | CallFinished


class OutputText:
    """Collects deltas for the next ``take``, neighbours of one kind joined, and the whole text of a message."""

    def __init__(self) -> None:
        self._deltas: list[ParsedDelta] = []
        self._reasoning: list[str] = []
        self._content: list[str] = []

    def add(self, delta: ParsedDelta) -> None:
        if isinstance(delta, ReasoningText):
            self._reasoning.append(delta.text)
        elif isinstance(delta, ContentText):
            self._content.append(delta.text)
        self._deltas.append(_joined(self._deltas.pop(), delta) if self._continues(delta) else delta)

    def take(self) -> list[ParsedDelta]:
        """What was added since the last time."""
        deltas, self._deltas = self._deltas, []
        return deltas

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        return "".join(self._content)

    def _continues(self, delta: ParsedDelta) -> bool:
        if not self._deltas or type(self._deltas[-1]) is not type(delta):
            return False
        return isinstance(delta, ReasoningText | ContentText | CallArguments)


def _joined(first: ParsedDelta, second: ParsedDelta) -> ParsedDelta:
    """Of two neighbours of one kind; calls are finished before the next one starts, so the index is the same."""
    if isinstance(first, CallArguments) and isinstance(second, CallArguments):
        return CallArguments(first.index, first.arguments_json + second.arguments_json)
    if isinstance(first, ReasoningText) and isinstance(second, ReasoningText):
        return ReasoningText(first.text + second.text)
    assert isinstance(first, ContentText)
    assert isinstance(second, ContentText)
    return ContentText(first.text + second.text)
