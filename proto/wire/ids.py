"""Identifiers. Each is a plain string or number on the wire; the types keep them apart in code."""

from typing import NewType

TenantId = NewType("TenantId", str)
SessionId = NewType("SessionId", str)
TurnId = NewType("TurnId", str)
RankId = NewType("RankId", str)
GangId = NewType("GangId", str)
RouterId = NewType("RouterId", str)
ReservationId = NewType("ReservationId", str)
Epoch = NewType("Epoch", int)
"""Fencing number of a session's owner: grows with every turn attempt; a lower one is refused in Redis and at ranks."""
