"""One reservation: a sequence's claim on pages of a rank, from Reserve to Release."""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum

from seamount.wire.hashes import page_hashes
from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.retention import Tier

ReservationKey = tuple[str, str, int, int]
"""session, turn, epoch, attempt."""


def ahead_key(session_id: str) -> ReservationKey:
    """Of the reservation that brings a session's pages up before its turn."""
    return "", f"ahead/{session_id}", 0, 0


class ReservationState(Enum):
    ACTIVE = "active"
    """Holds pages for all its tokens."""
    PREEMPTED = "preempted"
    """Holds no page until it is resumed."""
    ENDING = "ending"
    """Released, expired or superseded, but a receive or a step still touches its pages."""
    ENDED = "ended"
    """Holds nothing and is forgotten."""


@dataclass(slots=True, eq=False, kw_only=True)
class Reservation:
    """The live object. Only ``Reservations`` changes it; the engine thread may read it without the lock.

    Its repr has no tokens, nor hashes of them: it may end up in a log.

    token_ids: the prompt, then what was appended; pages: physical pages in order; computed_len: tokens whose entries
    are present, from the first on; common_len: first position at which the prompt differs from what the session left
    here (the length of the shorter if none does, 0 if it left nothing); left_len: how many those were, evicted ones
    included; idle_s: since then, when this was made; is_leased: a lease of the session was in force then; is_spare: it
    takes nobody else's pages but superseded and cold ones; for_session: that of a turn elsewhere, which it works for;
    num_prepared: tokens computed ahead of it;
    cached_len_at_first: ``cached_len`` when made;
    expires_at, time_to_live_s: seconds of the owner's monotonic clock.

    nodes: pinned pages of the tree, for the leading tokens; ``pages[i]`` is ``nodes[i].page``, or an own copy where
    another sequence computed the same page first. num_found: leading nodes that were cached when pages were assigned.
    to_restore: pages of the tree behind ``nodes`` that are on their way into ``pages``: nobody computes, sends or
    receives meanwhile; restored_from: the tiers in which they and those that have come were found; not_restored: those
    that were left when it ended; restored: done when there is nothing to wait for. is_ahead: it only restores.
    receive: [first, end) of the receive in flight; num_uses: receive, steps and sends that still touch the pages;
    keep_len: how far to keep the entries once those are over; num_reused_pages: pages that the session's next turn can
    go through at the most, None for all.
    """

    id: str
    session_id: str
    turn_id: str
    epoch: int
    attempt: int
    salt: bytes = field(default=b"", repr=False)
    root: bytes = field(repr=False)
    token_ids: list[int] = field(repr=False)
    prompt_len: int
    prompt_digest: bytes = field(repr=False)
    digests: list[bytes] = field(repr=False)
    page_size: int
    time_to_live_s: float
    expires_at: float = 0.0
    common_len: int = 0
    left_len: int = 0
    idle_s: float = 0.0
    is_spare: bool = False
    for_session: str = ""
    num_prepared: int = 0
    is_leased: bool = False
    state: ReservationState = ReservationState.ACTIVE
    pages: list[int] = field(default_factory=list)
    nodes: list[PageNode] = field(default_factory=list, repr=False)
    num_found: int = 0
    to_restore: deque[PageNode] = field(default_factory=deque, repr=False)
    restored_from: list[Tier] = field(default_factory=list, repr=False)
    not_restored: list[PageNode] = field(default_factory=list, repr=False)
    restored: Future[None] | None = field(default=None, repr=False)
    is_ahead: bool = False
    computed_len: int = 0
    cached_len_at_first: int = 0
    receive: tuple[int, int] | None = None
    num_uses: int = 0
    keep_len: int | None = None
    num_reused_pages: int | None = None

    @classmethod
    def of_prompt(
        cls,
        token_ids: array[int],
        *,
        root: bytes,
        key: ReservationKey,
        page_size: int,
        time_to_live_s: float,
        salt: bytes = b"",
        is_spare: bool = False,
        for_session: str = "",
    ) -> Reservation:
        """One that holds nothing yet. Hashes the prompt: not something to do under a lock."""
        session_id, turn_id, epoch, attempt = key
        return cls(
            id=secrets.token_hex(16),
            session_id=session_id,
            turn_id=turn_id,
            epoch=epoch,
            attempt=attempt,
            salt=salt,
            root=root,
            token_ids=token_ids.tolist(),
            prompt_len=len(token_ids),
            prompt_digest=prompt_digest(root, token_ids),
            digests=page_hashes(root, token_ids, page_size),
            page_size=page_size,
            time_to_live_s=time_to_live_s,
            is_spare=is_spare,
            for_session=for_session,
        )

    @property
    def key(self) -> ReservationKey:
        return (self.session_id, self.turn_id, self.epoch, self.attempt)

    @property
    def is_restoring(self) -> bool:
        return bool(self.to_restore)

    @property
    def present_len(self) -> int:
        """Tokens whose entries are present, or on their way from a tier below."""
        return (len(self.nodes) + len(self.to_restore)) * self.page_size if self.to_restore else self.computed_len

    @property
    def cached_len(self) -> int:
        """Prompt tokens whose entries are here, in any tier; at most ``prompt_len - 1``: the last one is always
        computed."""
        return min(self.present_len, self.prompt_len - 1)

    def num_tokens_from(self, tier: Tier) -> int:
        """Tokens that were found in a tier below the device, and have come from there or are on their way."""
        return self.restored_from.count(tier) * self.page_size

    @property
    def kept_len(self) -> int:
        """Tokens whose entries stay cached if it ends now."""
        return self.computed_len if self.keep_len is None else min(self.keep_len, self.computed_len)

    @property
    def capacity(self) -> int:
        """Tokens that fit into its pages."""
        return len(self.pages) * self.page_size

    def is_own(self, index: int) -> bool:
        """Whether ``pages[index]`` is referenced by this reservation itself and not through a node of the tree."""
        return index >= len(self.nodes) or self.nodes[index].page != self.pages[index]

    def slots(self, first: int, end: int) -> list[int]:
        """Physical slots (page * page_size + offset) of the positions [first, end), which lie within the capacity."""
        size, slots = self.page_size, list[int]()
        while first < end:
            index, offset = divmod(first, size)
            stop = min(end, (index + 1) * size)
            base = self.pages[index] * size + offset
            slots.extend(range(base, base + stop - first))
            first = stop
        return slots


def prompt_digest(root: bytes, token_ids: array[int]) -> bytes:
    """Tells one prompt from another under the same key."""
    return hashlib.sha256(root + memoryview(token_ids).cast("B")).digest()


def common_prefix_len(left: Sequence[int], right: Sequence[int]) -> int:
    """First position at which two sequences of one type differ; the length of the shorter if none does."""
    low, high = 0, min(len(left), len(right))
    while low < high:  # [0, low) is equal; halve the rest, so that the compared part is copied at C speed
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
