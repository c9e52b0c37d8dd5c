"""The cut of reasoning, ahead of time.

A user's message cuts the reasoning of the turns before it, so that the next prompt differs from what the caches hold
from the first of these thoughts on. What it will begin with is known as soon as the answer before it is committed: this
router, which owns the encoding, tells the decode rank, which computes it while it has nothing else to do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from seamount.router.context_policy import TRIGGER_SHARE
from seamount.router.history import rests
from seamount.router.messages import ASKING_ROLES, ThinkingMode
from seamount.router.ranks import Ranks
from seamount.router.rendering import Rendering
from seamount.router.spec import RouterSpec
from seamount.router.turn import Turn
from seamount.v1 import record_pb2, worker_pb2
from seamount.wire.errors import SeamountError
from seamount.wire.hashes import tenant_salt
from seamount.wire.ids import RankId

_LOG = logging.getLogger(__name__)
_ASKING_ROLE_NUMBERS = frozenset(role.value for role in ASKING_ROLES)


@dataclass(slots=True, kw_only=True)
class CutAhead:
    """Of one router. ``close`` at the end."""

    spec: RouterSpec
    ranks: Ranks
    rendering: Rendering
    secret: bytes
    _asking: set[asyncio.Task[None]] = field(default_factory=set)

    def after(self, turn: Turn) -> None:
        """A turn is over and its reservation released: ask for its session, with nobody waiting, if it pays."""
        record, generation = turn.committed, turn.generation
        if record is None or generation is None or generation.decode_rank is None or not self.spec.cut_ahead:
            return
        records = (*turn.begun.records, record)
        if turn.mode is not ThinkingMode.THINKING or not will_be_cut(records):
            return
        task = asyncio.create_task(self._ask(turn, records, generation.decode_rank), name="cut ahead")
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def close(self) -> None:
        """Drop what is being asked: it is no loss."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)

    async def _ask(self, turn: Turn, records: Sequence[record_pb2.TurnRecord], rank_id: RankId) -> None:
        token_ids = await self.rendering.settled(records, turn.mode)
        if len(token_ids) > TRIGGER_SHARE * self.spec.max_context_tokens:
            return  # the next turn may leave more out
        request = worker_pb2.PrepareRequest(
            session_id=turn.begun.session_id,
            turn_id=turn.begun.turn_id,
            epoch=turn.begun.epoch,
            cache_salt=tenant_salt(self.secret, turn.begun.tenant),
            token_ids=token_ids,
        )
        try:
            await self.ranks.client(rank_id).prepare(request)
        except SeamountError as error:
            _LOG.info("not_cut_ahead", extra={"rank_id": rank_id, "reason": error.reason})


def will_be_cut(records: Sequence[record_pb2.TurnRecord]) -> bool:
    """Whether a user's message comes next, and cuts reasoning that the last prompt or its answer held."""
    if not rests(records):
        return False
    for record in reversed(records):
        if record.output.num_reasoning_tokens or any(message.reasoning_content for message in record.input):
            return True
        if any(message.role in _ASKING_ROLE_NUMBERS for message in record.input):
            return False
    return False
