"""A router whose token log tells events at once and writes nothing: what ``benchmarks.token_log`` compares with.

python -m benchmarks.unlogged_router < START      START: what ``seamount.cluster.process`` reads
"""

from __future__ import annotations

from seamount.cluster.process import main
from seamount.router.token_log import TokenLog


async def _tell_at_once(token_log: TokenLog) -> None:
    logs, token_log._news = list(token_log._news), {}
    for log in logs:
        if log.to_send() is not None:
            log.settle(None)


if __name__ == "__main__":
    TokenLog._flush = _tell_at_once  # type: ignore[method-assign]
    main()
