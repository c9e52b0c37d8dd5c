"""One answer in the making over ranks that a test dictates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing

from seamount.router.account import Account
from seamount.router.claim import Claim
from seamount.router.generation import Generation
from seamount.router.placement import PathRules
from seamount.router.ranks import Ranks
from seamount.v1 import worker_pb2
from seamount.wire.ids import Epoch, RankId, SessionId, TurnId

EOS = 1


def make_generation(
    ranks: Ranks,
    prompt: Sequence[int],
    *,
    rules: PathRules,
    epoch: int = 1,
    deadline_s: float = 10.0,
    max_output_tokens: int = 5,
    preferred: RankId | None = None,
    num_left: int = 0,
) -> Generation:
    return Generation(
        claim=Claim(
            ranks=ranks,
            rules=rules,
            session_id=SessionId("s"),
            turn_id=TurnId("t"),
            epoch=Epoch(epoch),
            cache_salt=bytes(32),
            prompt=prompt,
            account=Account(started=time.monotonic()),
            deadline=time.monotonic() + deadline_s,
            preferred=preferred,
            num_left=num_left,
        ),
        sampling=worker_pb2.ResolvedSampling(max_output_tokens=max_output_tokens, top_p=1.0, num_logprobs=-1),
        max_attempts=3,
        eos_token_id=EOS,
    )


async def answer(generation: Generation) -> list[int]:
    """All tokens; the reservation is given back as a turn does."""
    token_ids: list[int] = []
    try:
        async with aclosing(generation.batches()) as batches:
            async for batch in batches:
                if isinstance(batch, worker_pb2.TokenBatch):
                    token_ids.extend(batch.token_ids)
    finally:
        await generation.release(None)
    return token_ids
