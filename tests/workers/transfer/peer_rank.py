"""A rank in a process of its own, to be killed or stopped from outside: ``peer_rank.py NUM_TOKENS PRESENT SEED``.

Prints "address reservation_id" and serves until it is killed; its planes hold random bytes of the seed.
"""

import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import start_rank


async def main(num_tokens: int, present: int, seed: int) -> None:
    async with AsyncExitStack() as stack:
        rank = await start_rank(stack, "peer", num_pages=num_tokens // 64 + 8)
        rank.fill(seed)
        reservation = rank.reserve(list(range(num_tokens)))
        rank.reservations.advance(reservation.id, present)
        print(rank.address, reservation.id, flush=True)
        await asyncio.Event().wait()


asyncio.run(main(*map(int, sys.argv[1:])))
