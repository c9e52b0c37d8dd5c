"""Stop strings over text that arrives in pieces: Aho–Corasick, one step a character, whatever the strings."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """Withholds what may be the beginning of a stop string until it is known not to be.

    The match is the first one to be complete; of several that are complete at the same character, the longest.
    Positions are the caller's: that of a text's first character is given with it. Without strings, all text passes.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self._depth = [0]
        self._match_length = [0]
        for string in strings:
            self._add(string)
        self._link()
        self._state = 0
        self._held = ""
        self._end = 0

    def feed(self, text: str, position: int) -> tuple[str, int | None]:
        """The text that may be delivered, and the position at which a stop string begins, if one is complete.

        ``position`` continues the text before; after ``flush`` it may be anywhere. After a match, nothing may follow.
        """
        if len(self._next) == 1:
            return text, None
        state = self._state
        for i, character in enumerate(text):
            while state and character not in self._next[state]:
                state = self._fallback[state]
            state = self._next[state].get(character, 0)
            if self._match_length[state]:
                known = self._held + text[: i + 1]
                kept = len(known) - self._match_length[state]
                self._held = ""
                return known[:kept], position + i + 1 - self._match_length[state]
        self._state = state
        known = self._held + text
        passed = len(known) - self._depth[state]
        self._held = known[passed:]
        return known[:passed], None

    def flush(self) -> str:
        """What was withheld: no stop string reaches across this point."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _add(self, string: str) -> None:
        state = 0
        for character in string:
            following = self._next[state].get(character)
            if following is None:
                following = len(self._next)
                self._next[state][character] = following
                self._next.append({})
                self._fallback.append(0)
                self._depth.append(self._depth[state] + 1)
                self._match_length.append(0)
            state = following
        self._match_length[state] = len(string)

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            if not self._match_length[state]:  # its own string is longer than any that is a suffix of it
                self._match_length[state] = self._match_length[self._fallback[state]]
            for character, following in self._next[state].items():
                queue.append(following)
                fallback = self._fallback[state]
                while fallback and character not in self._next[fallback]:
                    fallback = self._fallback[fallback]
                self._fallback[following] = self._next[fallback].get(character, 0)
