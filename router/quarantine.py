"""Turns that ranks die of: found by what was in a dying rank's own last batch, refused after two such deaths.

A death counts against a turn only if the rank's own process ended, or its engine said to hang, while its steps computed
the turn. One that falls silent, stops for a drain, ends or hangs because of a peer of its gang, or goes down together
with others of its node says nothing about the turn. After the first death that may count, the turn is computed in steps
of its own, so that the next one takes no other turn with it and is known to be this one's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from seamount.wire.errors import Internal
from seamount.wire.ids import RankId

MAX_DEATHS = 2
"""Of a turn, before it is refused for good."""
NODE_WINDOW_S = 1.0
"""Ranks of several gangs on one host that die within so short a time died of their node."""
GANG_WINDOW_S = 15.0
"""A rank that dies so soon after another one of its gang died of that: a collective's timeout, and some."""
_MAX_KNOWN = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """at: by ``time.monotonic()``."""

    rank_id: RankId
    gang_id: str
    host: str
    at: float


@dataclass(slots=True, kw_only=True)
class Deaths:
    """Ranks' processes that this router saw end, the latest ones."""

    clock: Callable[[], float] = time.monotonic
    num_noted: int = 0
    _known: deque[Death] = field(default_factory=lambda: deque(maxlen=_MAX_KNOWN))

    def note(self, rank_id: RankId, *, gang_id: str, host: str) -> None:
        """A rank died; said again of the same death, it changes nothing: a rank that comes back has another id."""
        if self.last_of(rank_id) is None:
            self.num_noted += 1
            self._known.append(Death(rank_id=rank_id, gang_id=gang_id, host=host, at=self.clock()))

    def last_of(self, rank_id: RankId) -> Death | None:
        """The rank's own, where it was seen."""
        return next((death for death in reversed(self._known) if death.rank_id == rank_id), None)

    def is_its_own(self, death: Death) -> bool:
        """Whether neither the node nor a peer of its gang took the rank down. Certain ``NODE_WINDOW_S`` later."""
        return not any(self._explains(other, death) for other in self._known)

    @staticmethod
    def _explains(other: Death, death: Death) -> bool:
        if other.gang_id == death.gang_id:
            return other.rank_id != death.rank_id and 0 < death.at - other.at <= GANG_WINDOW_S
        return other.host == death.host and abs(death.at - other.at) <= NODE_WINDOW_S


@dataclass(slots=True, kw_only=True)
class Suspicion:
    """Of one turn. ``in_batch_of``: the rank whose steps compute it now."""

    deaths: Deaths
    in_batch_of: RankId | None = None
    _held: list[Death] = field(default_factory=list)

    @property
    def is_suspect(self) -> bool:
        """Whether to compute it alone from now on."""
        return bool(self._held)

    @property
    def may_be_proven(self) -> bool:
        """Whether to wait until the deaths can be told apart (``NODE_WINDOW_S``), and then ask ``is_proven``."""
        return len(self._held) >= MAX_DEATHS

    def rank_died(self, rank_id: RankId) -> None:
        """The rank's process ended while a call for this turn was open there."""
        death = self.deaths.last_of(rank_id)
        if self.in_batch_of == rank_id and death is not None and death not in self._held:
            self._held.append(death)
        self.in_batch_of = None

    def is_proven(self) -> bool:
        """Whether enough ranks died of this turn; deaths that turn out to be others' are held against it no longer."""
        self._held = [death for death in self._held if self.deaths.is_its_own(death)]
        return len(self._held) >= MAX_DEATHS


def quarantined() -> Internal:
    """What a turn that ranks die of ends with, for good."""
    return Internal(
        f"{MAX_DEATHS} ranks died while they computed this turn; it is not tried again: change the request",
        reason="REQUEST_QUARANTINED",
    )
