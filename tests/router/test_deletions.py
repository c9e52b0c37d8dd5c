"""Which deletions ranks are told of, and how they read them; a real store."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from seamount.cluster.deletions import DeletionFollower
from seamount.cluster.rank import deleted_before
from seamount.router import deletions as deletions_module
from seamount.router.deletions import EPOCH_MARGIN, Deletion, Deletions
from seamount.router.store import Store
from seamount.router.turns import Turns
from seamount.v1 import session_pb2
from seamount.wire.errors import Unavailable
from seamount.wire.ids import GangId, RankId, SessionId, TenantId
from seamount.workers.spec import RankSpec

ALICE, BOB = TenantId("alice"), TenantId("bob")


async def created(turns: Turns, key: str = "") -> SessionId:
    request = session_pb2.CreateSessionRequest(idempotency_key=key)
    return SessionId((await turns.sessions.create(ALICE, request, model="m")).id)


async def test_a_deletion_is_told_with_an_epoch_between_the_old_session_and_a_new_one(turns: Turns) -> None:
    session_id = await created(turns, "key")
    epoch = (await turns.sessions.get(ALICE, session_id)).epoch
    await asyncio.sleep(EPOCH_MARGIN / 1e6)
    await turns.delete(ALICE, session_id)
    ((deletion,), _) = await turns.deletions.after("")
    assert await created(turns, "key") == session_id
    assert deletion.session_id == session_id
    assert epoch < deletion.epoch < (await turns.sessions.get(ALICE, session_id)).epoch


async def test_only_who_has_a_session_can_have_it_forgotten(turns: Turns) -> None:
    session_id = await created(turns)
    for tenant, name in ((BOB, session_id), (ALICE, SessionId("ses_" + "a" * 32)), (ALICE, SessionId("no id"))):
        await turns.delete(tenant, name)
    assert await turns.deletions.after("") == ([], "")
    for _ in range(2):
        await turns.delete(ALICE, session_id)
    found, _ = await turns.deletions.after("")
    assert [one.session_id for one in found] == [session_id], "the second time there was nothing"


async def test_a_damaged_session_is_told_of_too(turns: Turns, store: Store) -> None:
    session_id = await created(turns)
    await store.command("HDEL", store.key(f"{{alice/{session_id}}}", "meta"), "chain")
    await turns.delete(ALICE, session_id)
    ((deletion,), _) = await turns.deletions.after("")
    assert abs(deletion.epoch - time.time_ns() // 1000) < 60e6


async def test_a_rank_reads_all_in_parts_and_then_what_is_new(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletions_module, "READ_AT_ONCE", 3)
    monkeypatch.setattr("seamount.cluster.deletions.FOLLOW_EVERY_S", 0.01)
    deletions, told = Deletions(store), list[Deletion]()
    follower = DeletionFollower(deletions, told.append)
    assert await follower.earlier() == []
    for number in range(8):
        await deletions.note(SessionId(f"s{number}"), number)
    earlier = await follower.earlier()
    assert [(one.session_id, one.epoch) for one in earlier] == [(f"s{n}", n + EPOCH_MARGIN) for n in range(8)]
    failures, read = 3, deletions.after

    async def after(place: str) -> Any:
        nonlocal failures
        failures -= 1
        if failures > 0:
            raise Unavailable("away", reason="STORE_UNAVAILABLE")
        return await read(place)

    monkeypatch.setattr(deletions, "after", after)
    follower.start()
    for number in range(8, 13):
        await deletions.note(SessionId(f"s{number}"), number)
    await until_told(told, 5)
    await follower.stop()
    await follower.stop()
    assert [one.session_id for one in told] == [f"s{number}" for number in range(8, 13)]


async def until_told(told: list[Deletion], number: int) -> None:
    async with asyncio.timeout(5):
        while len(told) < number:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class CountedReads(Deletions):
    num_reads = 0

    async def after(self, place: str) -> tuple[list[Deletion], str]:
        self.num_reads += 1
        return await super().after(place)


async def test_only_a_rank_with_a_disk_reads_what_was_deleted_before_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("seamount.cluster.deletions.FOLLOW_EVERY_S", 0.01)
    deletions, told = CountedReads(store), list[Deletion]()
    new = DeletionFollower(deletions, told.append)
    assert await deleted_before(new, spec_of(disk_cache_dir=None)) == set(), "nothing was ever deleted"
    for number in range(3):
        await deletions.note(SessionId(f"s{number}"), number)
    assert await deleted_before(new, spec_of(disk_cache_dir=None)) == set()
    assert deletions.num_reads == 0
    old = DeletionFollower(deletions, told.append)
    assert await deleted_before(old, spec_of(disk_cache_dir=tmp_path)) == {"s0", "s1", "s2"}
    await deletions.note(SessionId("s3"), 3)
    for follower in (new, old):
        follower.start()
    await until_told(told, 2)
    for follower in (new, old):
        await follower.stop()
    assert [one.session_id for one in told] == ["s3", "s3"], "both hear of what is deleted after they began"


def spec_of(disk_cache_dir: Path | None) -> RankSpec:
    return RankSpec(
        rank_id=RankId("decode-0.0"),
        gang_id=GangId("decode-0"),
        pool="decode",
        gang_rank=0,
        gang_size=1,
        model_path=Path("model"),
        layout="float32",
        dtype="float32",
        num_pages=1,
        disk_cache_dir=disk_cache_dir,
        max_batch_tokens=1,
        prefill_chunk_tokens=1,
        max_running=1,
        max_context_tokens=1,
        step_timeout_s=1.0,
    )


async def test_old_deletions_are_dropped(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletions_module, "MAX_KEPT", 100)
    deletions = Deletions(store)
    for number in range(400):
        await deletions.note(SessionId(f"s{number}"), number)
    found, _ = await deletions.after("")
    assert 100 <= len(found) < 400
    assert found[-1].session_id == "s399"
