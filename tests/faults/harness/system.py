"""Two routers, one prefill and three decode ranks as plain processes over a real Redis, and what tests do to them."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import grpc
from pydantic import SecretStr

from harness.listener import FailpointListener
from harness.recording import Event, RecordingClient, said
from harness.recoveries import Recoveries
from harness.redis_proxy import RedisProxy
from seamount.cluster.forking import Parent
from seamount.cluster.local import LocalCluster
from seamount.cluster.redis_server import RedisServer
from seamount.cluster.settings import Settings, validate
from seamount.router.client import AsyncClient, Sampling, user
from seamount.router.store import Store
from seamount.router.watcher import Directory
from seamount.v1 import session_pb2, worker_pb2, worker_pb2_grpc
from seamount.wire.errors import AlreadyExists, SeamountError

CHUNK_TOKENS = 32
"""Prompt tokens that are computed, and pushed, together."""
PROMPT = "Name the planets and say which of them has rings, and why nobody can stand on it. " * 2
NUM_ROUTERS = 2
LINKED_AFTER_S = 0.6
"""Routers look for each other twice a second: one that dies sooner after its start is found by its counter (3 s)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A turn whose answer is the same each time it is asked for. ``forced``: ids to take instead of sampled ones."""

    sampling: Sampling
    forced: tuple[int, ...] = ()
    prompt: str = PROMPT


@dataclass(slots=True, kw_only=True)
class Answer:
    """A turn as one client saw it, begun but perhaps not over."""

    session: session_pb2.Session
    client: RecordingClient
    key: str
    task: asyncio.Task[None]

    @property
    def turn_id(self) -> str:
        return self.client.told.events[0].turn_id


@dataclass(slots=True, kw_only=True)
class FaultSystem:
    """``listener``, ``proxies`` (one a router), ``redis``: where a test takes hold. ``calm``: a router of a system of
    its own that nobody disturbs; ``recoveries``: what was measured."""

    cluster: LocalCluster
    calm: str
    listener: FailpointListener
    proxies: dict[str, RedisProxy]
    redis: RedisServer
    redis_dir: Path
    recoveries: Recoveries
    directory: Directory
    _references: dict[Request, list[Event]] = field(default_factory=dict)
    _killed: set[str] = field(default_factory=set)

    def name_of(self, pid: int) -> str:
        """``decode-1.0``, ``router-0`` …"""
        return next(name for name, process in self.cluster.processes.items() if process.pid == pid)

    def pool_of(self, pid: int) -> str:
        """prefill, decode or router."""
        return self.name_of(pid).partition("-")[0]

    def addresses(self, *numbers: int) -> str:
        wanted = [f"router-{number}" for number in numbers or range(NUM_ROUTERS)]
        return ",".join(self.cluster.processes[name].address for name in wanted if name in self.cluster.processes)

    # ---- faults

    async def kill(self, pid: int) -> str:
        """SIGKILL from outside; returns whom."""
        name = self.name_of(pid)
        await self.cluster.kill(name)
        self._killed.add(name)
        return name

    def forget_killed(self, name: str) -> None:
        """The test has started it anew by itself."""
        self._killed.discard(name)

    async def kill_redis(self) -> None:
        """SIGKILL, and start again over the same files."""
        os.kill(self.redis.pid, signal.SIGKILL)
        await asyncio.to_thread(self.redis.stop)
        await asyncio.to_thread(self.redis.start, self.redis_dir)

    @asynccontextmanager
    async def stopped(self, pid: int) -> AsyncIterator[None]:
        """SIGSTOP for the length of the block."""
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def restore(self) -> None:
        """Start anew who was killed, and wait until both routers see every rank and Redis."""
        killed, self._killed = self._killed, set()
        await asyncio.gather(*(self._start(name) for name in sorted(killed)))
        await self._forget_the_dead()
        async with asyncio.timeout(30):
            while not await self.all_are_alive():  # noqa: ASYNC110 - the routers' views, polled
                await asyncio.sleep(0.05)

    async def all_are_alive(self) -> bool:
        """Whether both routers see every rank that lives, and see it alive."""
        wanted = {process.pid for name, process in self.cluster.processes.items() if not name.startswith("router")}
        for number in range(NUM_ROUTERS):
            async with AsyncClient(self.addresses(number)) as client:
                if await self._alive(client) != wanted:
                    return False
        return True

    # ---- turns

    async def begin(self, client: RecordingClient, request: Request, *, key: str = "the turn") -> Answer:
        """The request's turn in a fresh session, under way."""
        session = await client.create_session()
        stream = client.run_turn(
            session.id, [user(request.prompt)], sampling=request.sampling, idempotency_key=key, deadline_s=120.0
        )

        async def follow() -> None:
            async for _ in stream:
                pass

        return Answer(session=session, client=client, key=key, task=asyncio.create_task(follow()))

    async def afresh(self, request: Request) -> Request:
        """The same with a prompt that no cache here knows, and to which the answer is as long as it may be."""
        while True:
            fresh = replace(request, prompt=f"{secrets.token_hex(4)} {request.prompt}")
            (usage,) = [event.usage for event in await self.reference(fresh) if event.HasField("usage")]
            if usage.num_output_tokens == request.sampling.max_output_tokens:
                return fresh

    async def reference(self, request: Request) -> list[Event]:
        """What the turn says when nobody is disturbed."""
        if request not in self._references:
            async with RecordingClient(self.calm, forced=request.forced) as client:
                answer = await self.begin(client, request)
                await answer.task
                self._references[request] = said(client.told.events)
        return self._references[request]

    async def check(self, answer: Answer, request: Request) -> None:
        """What must hold when the turn is over, whatever happened: the events of a calm system, each once; every router
        tells the same ones again, by the turn and by its key, which takes no other request; and it ran once."""
        told = answer.client.told.events
        assert said(told) == await self.reference(request)
        for number in range(NUM_ROUTERS):
            if f"router-{number}" not in self.cluster.processes:
                continue
            async with RecordingClient(self.addresses(number), forced=request.forced) as client:
                await self._check_at(client, answer, request, told)

    async def _check_at(self, client: RecordingClient, answer: Answer, request: Request, told: Sequence[Event]) -> None:
        session_id = answer.session.id
        session = await client.get_session(session_id)
        assert (session.head, session.state) == (1, session_pb2.SESSION_STATE_IDLE) or session.pending_tool_calls
        assert [event async for event in client.resume_turn(session_id, told[0].turn_id)] == told
        again = client.run_turn(
            session_id, [user(request.prompt)], sampling=request.sampling, idempotency_key=answer.key, deadline_s=120.0
        )
        assert [event async for event in again] == told, "one outcome a key"
        other = client.run_turn(session_id, [user("something else")], idempotency_key=answer.key)
        try:
            await other.result()
        except AlreadyExists:
            pass
        else:
            raise AssertionError("another request was taken under the same key")
        assert (await client.get_session(session_id)).head == 1, "nothing ran twice"

    async def check_caches(self) -> None:
        """All pages and reservations are back within seconds, and every page is where it belongs."""
        held: list[str] = []
        for _ in range(150):
            held = [
                violation
                for name, process in self.cluster.processes.items()
                if not name.startswith("router") and (violation := await self._held(name, process.address))
            ]
            if not held:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"not given back: {held}")

    async def num_computed(self) -> dict[int, int]:
        """Prompt tokens that each rank which lives now has computed since its start, by process id."""
        ranks = [process for name, process in self.cluster.processes.items() if not name.startswith("router")]
        return {rank.pid: (await _state(rank.address)).num_computed_tokens for rank in ranks}

    async def num_computed_since(self, before: Mapping[int, int]) -> int:
        """By ranks that live now, since ``before``."""
        return sum(number - before.get(pid, 0) for pid, number in (await self.num_computed()).items())

    # ---- parts

    async def _start(self, name: str) -> None:
        pool, _, number = name.partition("-")
        if pool == "router":
            await self.cluster.start_router(int(number))
            await asyncio.sleep(LINKED_AFTER_S)
        else:
            assert pool in ("prefill", "decode")
            await self.cluster.start_gang(pool, name.partition(".")[0])

    async def _forget_the_dead(self) -> None:
        """Routers look for the dead for a minute; here dozens die in one."""
        pids = {process.pid for process in self.cluster.processes.values()}
        for peer_id, (record, beat) in (await self.directory.read()).items():
            if record.process_id not in pids:
                await self.directory.remove(peer_id, beat)

    async def _alive(self, client: AsyncClient) -> set[int]:
        with suppress(SeamountError):
            return {rank.state.process_id for rank in await client.list_ranks() if rank.alive}
        return set()

    async def _held(self, name: str, address: str) -> str:
        state = await _state(address)
        num_pages = state.num_pages - state.num_free_pages - state.num_cached_pages
        if state.num_reservations or num_pages:
            return f"{name}: {state.num_reservations} reservations, {num_pages} pages"
        async with grpc.aio.insecure_channel(address) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            checked = await stub.CheckCaches(worker_pb2.CheckCachesRequest(), timeout=5)
        assert not checked.violation, f"{name}: {checked.violation}"
        return ""


async def _state(address: str) -> worker_pb2.RankState:
    async with grpc.aio.insecure_channel(address) as channel:
        call = worker_pb2_grpc.WorkerServiceStub(channel).WatchState(worker_pb2.WatchStateRequest(), timeout=5)
        response = await call.read()
        call.cancel()
        return response.state


def _calm(settings: Settings) -> Settings:
    one = {"pools": {"prefill": {"gangs": 0}, "decode": {"gangs": 1, "expert_parallel": 1}}, "redis_url": None}
    folder = settings.run_dir / "calm"
    plain = settings.model_dump(exclude={"pools", "run_dir", "redis", "redis_url", "placement"})
    return validate({**plain, **one, "run_dir": folder, "redis": {"data_dir": folder / "redis"}})


@asynccontextmanager
async def fault_system(settings: Settings, parent: Parent, recoveries: Recoveries) -> AsyncIterator[FaultSystem]:
    """The system, for as long as the block lasts."""
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        redis_dir = settings.redis.data_dir
        redis.start(redis_dir)
        listener = await stack.enter_async_context(FailpointListener())
        proxies = {
            f"router-{number}": await stack.enter_async_context(RedisProxy(Path(unquote(urlsplit(redis.url).path))))
            for number in range(NUM_ROUTERS)
        }
        store = await Store.open(redis.url)
        stack.push_async_callback(store.close)
        cluster = await stack.enter_async_context(
            LocalCluster(
                settings=settings.model_copy(update={"redis_url": SecretStr(redis.url)}),
                num_routers=NUM_ROUTERS,
                allow_forced_tokens=True,
                failpoints=listener.path,
                parent=parent,
                redis_urls={name: proxy.url for name, proxy in proxies.items()},
            )
        )
        calm = await stack.enter_async_context(
            LocalCluster(settings=_calm(settings), allow_forced_tokens=True, parent=parent)
        )
        await asyncio.sleep(LINKED_AFTER_S)
        yield FaultSystem(
            cluster=cluster,
            calm=calm.address,
            listener=listener,
            proxies=proxies,
            redis=redis,
            redis_dir=redis_dir,
            recoveries=recoveries,
            directory=Directory(store, settings.cluster_name),
        )
