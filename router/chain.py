"""The hash chain over a session's records: a gap, a swap or a foreign record is found on reading.

    chain_0 = SHA-256(SessionRecord)            binds the session's id, its tenant and its creation
    chain_n = SHA-256(chain_{n-1} ‖ TurnRecord_n)

Redis keeps each turn as an *entry*: chain_n (32 bytes) followed by the serialised TurnRecord_n.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from seamount.v1 import record_pb2
from seamount.wire.errors import DataLoss
from seamount.wire.ids import SessionId, TenantId

CHAIN_BYTES = 32


def root(session_record: bytes) -> bytes:
    """chain_0 of a session: 32 bytes."""
    return hashlib.sha256(session_record).digest()


def entry(before: bytes, turn_record: bytes) -> bytes:
    """The entry of a turn that follows ``before`` (32 bytes)."""
    return hashlib.sha256(before + turn_record).digest() + turn_record


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The committed turns of one session, verified. The records are shared: never change one.

    head: their number; end: chain_head; num_bytes: their serialised size.
    """

    root: bytes
    end: bytes
    records: tuple[record_pb2.TurnRecord, ...] = ()
    num_bytes: int = 0

    @property
    def head(self) -> int:
        return len(self.records)

    @staticmethod
    def start(session_record: bytes) -> History:
        """The history of a session without turns."""
        first = root(session_record)
        return History(root=first, end=first)

    def extended(self, entries: Sequence[bytes]) -> History:
        """This history with the entries that follow it. Raises ``DataLoss`` where one doesn't."""
        end, num_bytes, records = self.end, self.num_bytes, []
        for index, item in enumerate(entries):
            end, turn_record = verified(end, item, index=self.head + index)
            records.append(turn_record)
            num_bytes += len(item)
        return History(root=self.root, end=end, records=(*self.records, *records), num_bytes=num_bytes)

    def appended(self, record: record_pb2.TurnRecord, item: bytes) -> History:
        """This history with a record of our own and the entry made of it."""
        return History(
            root=self.root,
            end=item[:CHAIN_BYTES],
            records=(*self.records, record),
            num_bytes=self.num_bytes + len(item),
        )


def verified(before: bytes, item: bytes, *, index: int) -> tuple[bytes, record_pb2.TurnRecord]:
    """(chain after, record) of the entry that follows ``before``. Raises ``DataLoss`` where it doesn't."""
    turn_record = item[CHAIN_BYTES:]
    if entry(before, turn_record) != item:
        raise _damaged(index)
    try:
        return item[:CHAIN_BYTES], record_pb2.TurnRecord.FromString(turn_record)
    except DecodeError as error:
        raise _damaged(index) from error


def _damaged(index: int) -> DataLoss:
    return DataLoss(
        f"the stored turn {index} is damaged or does not follow the one before; restore the session store from its "
        "last backup, or delete the session",
        reason="HISTORY_DAMAGED",
        metadata={"turn": str(index)},
    )


class HistoryCache:
    """Histories this router has seen, least recently used out first, bounded by their serialised bytes.

    What it holds is only ever *extended* by what Redis answers and compared by chain: it can be stale, never wrong.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[TenantId, SessionId], History] = OrderedDict()
        self.num_bytes = 0

    def get(self, tenant: TenantId, session_id: SessionId) -> History | None:
        found = self._entries.get((tenant, session_id))
        if found is not None:
            self._entries.move_to_end((tenant, session_id))
        return found

    def put(self, tenant: TenantId, session_id: SessionId, history: History) -> None:
        """Keep this one; a history larger than the whole cache is not kept."""
        self.drop(tenant, session_id)
        self._entries[tenant, session_id] = history
        self.num_bytes += history.num_bytes
        while self.num_bytes > self._max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.num_bytes -= evicted.num_bytes

    def drop(self, tenant: TenantId, session_id: SessionId) -> None:
        dropped = self._entries.pop((tenant, session_id), None)
        if dropped is not None:
            self.num_bytes -= dropped.num_bytes
