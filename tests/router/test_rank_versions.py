"""Ranks of a release that speaks another protocol stand in the same directory, and are left alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from seamount.router.directory import Role
from seamount.router.ranks import Ranks
from seamount.wire import protocol
from seamount.wire.ids import RankId


async def test_a_router_uses_no_rank_that_speaks_another_protocol(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    await system.add("decode-a")
    monkeypatch.setattr("seamount.router.ranks._OTHER_VERSION_S", 0.2)
    monkeypatch.setattr("seamount.router.ranks.rank_call", lambda _token: (("seamount-protocol", "2"),))
    newer = Ranks(watcher=system.watcher, worker_token=None, call_timeout_s=2.0, progress_timeout_s=1.0)
    await newer.start()
    await asyncio.sleep(0.5)
    assert newer.loads(Role.DECODE) == []
    assert newer.source(RankId("decode-a")) is None
    assert [(peer.record.peer_id, state) for peer, state in newer.all()] == [("decode-a", None)]
    assert [load.rank_id for load in system.ranks.loads(Role.DECODE)] == ["decode-a"]  # its own releases' routers do
    monkeypatch.setattr("seamount.router.ranks.rank_call", protocol.rank_call)  # the rank has been replaced, say
    await system.until(lambda: newer.load(RankId("decode-a")) is not None)
    await newer.stop()
