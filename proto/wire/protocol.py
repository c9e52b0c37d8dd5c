"""The version of what routers and ranks say to each other: shown with each call, a mismatch is refused.

Routers and ranks of two releases meet when a new image is rolled out: they share Redis and its directory. Fields may be
added to messages without a new version; it grows where one side would misunderstand the other. Ranks of another version
are then left to the routers of their own, and sessions go on by their history in Redis.
"""

from __future__ import annotations

from collections.abc import Iterable

from seamount.wire.credentials import CallMetadata, bearer
from seamount.wire.errors import FailedPrecondition

WORKER_PROTOCOL = 1
UNTOLD_PROTOCOL = 1
"""Of callers that show none: releases from before it was shown."""
_HEADER = "seamount-protocol"


def rank_call(token: str | None) -> CallMetadata:
    """The metadata of a call to a rank."""
    return (*bearer(token), (_HEADER, str(WORKER_PROTOCOL)))


def check_protocol(metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
    """Raises ``FailedPrecondition`` (PROTOCOL_MISMATCH) for a caller of another version."""
    shown = next((value for key, value in metadata or () if key == _HEADER), str(UNTOLD_PROTOCOL))
    if shown != str(WORKER_PROTOCOL):
        theirs = str(shown)[:20]
        raise FailedPrecondition(
            f"the caller speaks protocol {theirs} and this rank {WORKER_PROTOCOL}: routers and ranks of these releases "
            "cannot work together; let each use its own",
            reason="PROTOCOL_MISMATCH",
            metadata={"caller": theirs, "callee": str(WORKER_PROTOCOL)},
        )
