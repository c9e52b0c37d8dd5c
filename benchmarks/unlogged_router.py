"""A router that tells events at once and keeps nothing for a log: what ``benchmarks.token_log`` compares with.

python -m benchmarks.unlogged_router < START      START: what ``seamount.cluster.process`` reads
"""

from __future__ import annotations

from collections.abc import Sequence

from seamount.cluster.process import main
from seamount.router import token_log
from seamount.v1 import common_pb2
from seamount.wire.ids import RankId


class Unlogged(token_log.TurnLog):
    """Delivers what it is given; nothing ever waits, and nothing is asked."""

    def add_prompt(self, num_prompt_tokens: int, events: token_log.Events) -> None:
        self._deliver(events)

    def add(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[common_pb2.TokenLogprobs],
        events: token_log.Events,
        *,
        decode_rank: RankId | None,
    ) -> None:
        self._deliver(events)

    def ask_if_still(self) -> bool:
        return False


if __name__ == "__main__":
    token_log.TurnLog = Unlogged  # type: ignore[misc]
    main()
