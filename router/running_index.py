"""Which turns run, by the router that runs them: where a take-over looks. An index only, the session itself decides.

One sorted set of ``owner/tenant/session/turn``, all with the same score, so that it is ordered by name: the owners are
found in as many look-ups as there are owners, the turns of one owner in one. A turn is entered before it begins and
removed after it has ended; what a router that died left behind is removed by whoever looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote

from seamount.router.store import Store
from seamount.wire.ids import RouterId, SessionId, TenantId, TurnId

RELEASED = RouterId("-")
"""Owner of the turns whose router has left: anybody's to take."""
_AFTER_SLASH = "0"
"""The character after "/": names of one owner lie between "owner/" and "owner0"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedTurn:
    owner: RouterId
    tenant: TenantId
    session_id: SessionId
    turn_id: TurnId


class RunningIndex:
    """The index of one cluster: only routers that stand in the same directory judge each other. Errors as
    ``Store.function``."""

    def __init__(self, store: Store, cluster: str) -> None:
        self._store = store
        self._key = store.key("running", cluster)

    def entry(self, owner: RouterId, tenant: TenantId, session_id: SessionId, turn_id: TurnId) -> tuple[str | int, ...]:
        """The command that enters a turn."""
        return "ZADD", self._key, 0, _member(owner, tenant, session_id, turn_id)

    def removal(
        self, owner: RouterId, tenant: TenantId, session_id: SessionId, turn_id: TurnId
    ) -> tuple[str | int, ...]:
        """The command that removes a turn; harmless where it is not there."""
        return "ZREM", self._key, _member(owner, tenant, session_id, turn_id)

    async def release(self, turn: IndexedTurn, *, budget_s: float) -> None:
        """Enter the turn as nobody's, and no longer as its owner's."""
        released = self.entry(RELEASED, turn.tenant, turn.session_id, turn.turn_id)
        removed = self.removal(turn.owner, turn.tenant, turn.session_id, turn.turn_id)
        await self._store.pipeline([released, removed], budget_s=budget_s)

    async def remove(self, turn: IndexedTurn) -> None:
        await self._store.command(*self.removal(turn.owner, turn.tenant, turn.session_id, turn.turn_id))

    async def owners(self) -> list[RouterId]:
        """Every router that has turns in the index, dead or alive; tried once."""
        owners: list[RouterId] = []
        start = "-"
        while True:
            found = await self._store.command("ZRANGEBYLEX", self._key, start, "+", "LIMIT", 0, 1, budget_s=0.0)
            if not found:
                return owners
            name = found[0].decode().partition("/")[0]
            owners.append(RouterId(unquote(name)))
            start = f"[{name}{_AFTER_SLASH}"

    async def turns_of(self, owner: RouterId) -> list[IndexedTurn]:
        """The turns entered under this owner."""
        name = quote(owner, safe="")
        found = await self._store.command("ZRANGEBYLEX", self._key, f"[{name}/", f"({name}{_AFTER_SLASH}")
        turns: list[IndexedTurn] = []
        for member in found:
            _, tenant, session_id, turn_id = map(unquote, member.decode().split("/"))
            turns.append(
                IndexedTurn(
                    owner=owner,
                    tenant=TenantId(tenant),
                    session_id=SessionId(session_id),
                    turn_id=TurnId(turn_id),
                )
            )
        return turns


def _member(owner: RouterId, tenant: TenantId, session_id: SessionId, turn_id: TurnId) -> str:
    return "/".join(quote(part, safe="") for part in (owner, tenant, session_id, turn_id))
