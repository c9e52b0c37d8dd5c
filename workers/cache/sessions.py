"""What a rank remembers of each session: what it left, its tail page, its lease, its live reservation."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from seamount.workers.cache.prefix import PageNode
from seamount.workers.cache.retention import PERSON, PROGRAM, Tier, Wait, person_wait, tool_wait

MAX_RECORDS = 4_096
"""Sessions whose left ids are remembered."""

MAX_OTHERS = 4
"""Sessions of one page, beside those that it knows, that are counted for its return."""


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class Tail:
    """A session's last, partly filled page while no reservation uses it.

    root: root hash of its chain; parent: the full page before it; token_ids: uint32, as many as entries are present.
    """

    session_id: str
    page: int
    root: bytes
    parent: PageNode | None
    token_ids: array[int]


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class Lease:
    """Keeps what the session left here, up to ``max_pages`` of it, until ``expires_at`` (the owner's clock).

    tier: where it is kept, or below. given_during: the session's live reservation when it was given, if there was one:
    its commit does not end the lease. nodes: full pages that it keeps; none while it is not settled what the session
    leaves. pages: on the device, the tail's among them, that may not go: none once the last of ``nodes`` has a copy.
    """

    expires_at: float
    max_pages: int
    given_during: str | None
    tier: Tier = Tier.DEVICE
    nodes: list[PageNode] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    @property
    def num_tail_pages(self) -> int:
        """Of ``pages``: 1 where the tail is among them."""
        return len(self.pages) - len(self.nodes) if self.pages else 0


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class SessionRecord:
    """left, left_root: the ids whose entries the session's last reservation left here, and the root of their chain;
    salt: what that is made of.

    left_at: when that was, seconds of the owner's clock, or None. chain: the full pages of it, some of which may have
    been evicted since, as far as the next turn is expected to go through them. wait: until then; waits_for_tools: for
    their results, not for a person; num_requests: of a person, that came here; turn_id: the last turn. live_id: the
    reservation in force or None; latest_id: the last one ever made: only that one may leave a tail.
    """

    left: array[int] = field(default_factory=lambda: array("I"))
    left_root: bytes = b""
    salt: bytes = b""
    left_at: float | None = None
    chain: list[PageNode] = field(default_factory=list)
    tail: Tail | None = None
    live_id: str | None = None
    latest_id: str = ""
    wait: Wait = PERSON
    waits_for_tools: bool = False
    num_requests: int = 0
    turn_id: str = ""

    def comes(self, turn_id: str) -> None:
        """A turn of the session: until it says that it waits for tools, a person's message is what comes next."""
        if turn_id != self.turn_id:
            self.turn_id = turn_id
            self.num_requests += not self.waits_for_tools
        self.waits_for_tools, self.wait = False, person_wait(self.num_requests)

    def wait_for_tools(self, expected_s: float) -> None:
        self.waits_for_tools, self.wait = True, tool_wait(expected_s)


class SessionBook:
    """Records, and tails. Not thread-safe: its owner holds the lock.

    max_left_tokens: bound on the remembered ids of all sessions together; the least recently used go first. on_change:
    called after a page's ``num_sessions`` may have changed.
    """

    def __init__(self, *, max_left_tokens: int, on_change: Callable[[PageNode], None] = lambda node: None) -> None:
        self._max_left_tokens = max_left_tokens
        self._on_change = on_change
        self._num_left_tokens = 0
        self._records: OrderedDict[str, SessionRecord] = OrderedDict()
        self._tails: dict[int, Tail] = {}
        self._brought: dict[str, dict[PageNode, None]] = {}
        self.leases: dict[str, Lease] = {}
        """By session; each of them has a record."""

    def get(self, session_id: str) -> SessionRecord | None:
        return self._records.get(session_id)

    def waits(self, node: PageNode) -> tuple[Wait, ...]:
        """How long the sessions stay away whose last turn went through the page: its first one and its last one as far
        as they are remembered, the others like persons. A page that no session went through is a program's."""
        found = {name: self._records.get(name) for name in (node.session_id, node.last_session) if name}
        known = [record.wait for record in found.values() if record is not None]
        num_others = min(node.num_sessions - len(known), MAX_OTHERS)
        return (*known, *[PERSON] * num_others) or (PROGRAM,)

    def touch(self, session_id: str) -> SessionRecord:
        """The session's record, made if absent, now the most recently used."""
        record = self._records.setdefault(session_id, SessionRecord())
        self._records.move_to_end(session_id)
        return record

    def items(self) -> Iterator[tuple[str, SessionRecord]]:
        return iter(self._records.items())

    def records(self) -> Iterator[SessionRecord]:
        return iter(self._records.values())

    def tails(self) -> Iterator[Tail]:
        return iter(self._tails.values())

    def tail_at(self, page: int) -> Tail:
        return self._tails[page]

    def keep_tail(self, tail: Tail) -> None:
        """The session has no tail now: its former one was taken or dropped before."""
        self._records[tail.session_id].tail = tail
        self._tails[tail.page] = tail
        if tail.parent is not None:
            tail.parent.num_children[Tier.DEVICE] += 1

    def drop_tail(self, tail: Tail) -> None:
        self._records[tail.session_id].tail = None
        del self._tails[tail.page]
        if tail.parent is not None:
            tail.parent.num_children[Tier.DEVICE] -= 1

    def remember(self, session_id: str, token_ids: array[int], root: bytes) -> None:
        record = self.touch(session_id)
        self._num_left_tokens += len(token_ids) - len(record.left)
        record.left, record.left_root = token_ids, root

    def pass_through(self, session_id: str, chain: list[PageNode]) -> None:
        """The session's last turn went through these full pages, and no longer through those of the turn before."""
        record = self._records[session_id]
        before, record.chain = record.chain, chain
        for node in before:
            node.num_sessions -= 1
        for node in chain:
            node.num_sessions += 1
            node.last_session = session_id
        for node in dict.fromkeys((*before, *chain)):
            self._on_change(node)

    def trim(self) -> list[Tail]:
        """Forget the least recently used sessions beyond the bounds; returns their tails: the pages are ownerless now.

        Sessions with a live reservation or a lease stay.
        """
        num_records, num_tokens = len(self._records), self._num_left_tokens
        victims: list[str] = []
        for session_id, record in self._records.items():
            if num_records <= MAX_RECORDS and num_tokens <= self._max_left_tokens:
                break
            if record.live_id is None and session_id not in self.leases:
                victims.append(session_id)
                num_records -= 1
                num_tokens -= len(record.left)
        tails: list[Tail] = []
        for session_id in victims:
            record = self._records[session_id]
            if record.tail is not None:
                tails.append(record.tail)
                self.drop_tail(record.tail)
            self.forget(session_id)
        return tails

    def forget(self, session_id: str) -> None:
        """Its record goes; its tail and its lease have gone before."""
        self.pass_through(session_id, [])
        self._num_left_tokens -= len(self._records.pop(session_id).left)

    def brought(self, session_id: str) -> list[PageNode]:
        """Pages in the tree that were brought there by the session, or for it."""
        return list(self._brought.get(session_id, ()))

    def entered(self, node: PageNode) -> None:
        """The page is in the tree now."""
        if node.owner_id:
            self._brought.setdefault(node.owner_id, {})[node] = None

    def gone(self, node: PageNode) -> None:
        """The page has left the tree."""
        if node.owner_id:
            nodes = self._brought[node.owner_id]
            del nodes[node]
            if not nodes:
                del self._brought[node.owner_id]

    def cached_sessions(self) -> Iterator[str]:
        """Sessions with a live reservation, a tail, or pages in the tree that they brought; most recent first. Not one
        that was given up, though copies of its pages may lie in a lower tier until others need the room."""
        for session_id, record in reversed(self._records.items()):
            if record.live_id is not None or record.tail is not None or (record.left and session_id in self._brought):
                yield session_id
