"""What the router's tests share: a byte-level tokenizer, hostile text, generated conversations, the golden cases,
and ranks whose answers a test dictates."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import tokenizers
from hypothesis import strategies as st

from seamount.router.admission import Admission
from seamount.router.byte_tokenizer import write_byte_tokenizer
from seamount.router.cut_ahead import CutAhead
from seamount.router.deletions import Deletions
from seamount.router.directory import PeerRecord, new_instance
from seamount.router.directory import Role as PeerRole
from seamount.router.followed_turns import FollowedTurns
from seamount.router.history import History
from seamount.router.messages import Message, Role, Tool, ToolCall
from seamount.router.metrics import RouterMetrics
from seamount.router.model import ServedModel
from seamount.router.moves import Moves
from seamount.router.ranks import Ranks
from seamount.router.rendering import Rendering
from seamount.router.retention import Retention
from seamount.router.sessions import Sessions
from seamount.router.spec import RouterSpec
from seamount.router.store import Store
from seamount.router.token_log import TokenLog
from seamount.router.tokenizer import Control, Tokenizer
from seamount.router.tool_waits import ToolWaits
from seamount.router.turn_maker import TurnMaker
from seamount.router.turns import Turns
from seamount.router.watcher import Directory, DirectoryWatcher, Registration
from seamount.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from seamount.wire.ids import RankId, RouterId
from seamount.wire.interceptors import rank_interceptors
from seamount.wire.metrics import new_registry

FRAGMENTS = [
    *(control.value for control in Control),
    *("\n", "\n\n", "<", "</", ">", '"', "\\", "\t", "\r\n", " ", "hello", "</｜DSML｜parameter>", "parameter>"),
    *(
        "\n\n<｜DSML｜function_calls>\n",
        "<｜DSML｜invoke name=",
        ' string="true">',
        "invoke>",
        "é",
        "中文",
        "🙂",
        "\u2028",
    ),
    *("{", "}", "[1, 2]", "NaN", "0", "\ufffd", "\x00", "\u0301", "function_calls>", "</function_results>"),
]
hostile_text = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join),
    st.text(st.characters(codec="utf-8"), max_size=12),
)
harmless_text = st.text(st.characters(codec="utf-8", exclude_characters="<｜"), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | hostile_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hostile_text, inner, max_size=3),
    max_leaves=6,
)
names = st.text(st.characters(codec="utf-8", exclude_characters='"'), min_size=1, max_size=10).filter(str.isprintable)
keys = hostile_text.filter(lambda key: ' string="true">' not in key)


def dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


@st.composite
def _assistant(draw: st.DrawFn, text: st.SearchStrategy[str], prefix: str, *, thinks: bool) -> Message:
    arguments = draw(st.lists(st.dictionaries(keys, json_values, max_size=3), max_size=3))
    return Message(
        role=Role.ASSISTANT,
        content=draw(text),
        reasoning_content=draw(text) if thinks else "",
        tool_calls=tuple(
            ToolCall(id=f"{prefix}{i}", name=draw(names), arguments_json=dump(value))
            for i, value in enumerate(arguments)
        ),
    )


@st.composite
def _conversation(draw: st.DrawFn, text: st.SearchStrategy[str]) -> tuple[Message, ...]:
    tool = Tool(function_json=dump({"name": "f", "description": draw(text), "parameters": {"type": "object"}}))
    tools = (tool,) if draw(st.booleans()) else ()
    schema = dump({"type": draw(text)}) if draw(st.booleans()) else ""
    messages = []
    if draw(st.booleans()):
        messages.append(Message(role=Role.SYSTEM, content=draw(text), tools=tools, response_format_json=schema))
    for turn in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            messages.append(Message(role=Role.USER, content=draw(text)))
        else:
            content = draw(text) or "x"
            messages.append(Message(role=Role.DEVELOPER, content=content, tools=tools, response_format_json=schema))
        for step in range(draw(st.integers(0, 2))):
            answer = draw(_assistant(text, f"c{turn}.{step}.", thinks=True))
            messages.append(answer)
            results = [Message(role=Role.TOOL, tool_call_id=call.id, content=draw(text)) for call in answer.tool_calls]
            messages.extend(draw(st.permutations(results)))
            if not results:
                break
    if messages[-1].role is Role.ASSISTANT:
        messages.append(Message(role=Role.USER, content=draw(text)))
    return tuple(messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategies:
    """Hypothesis strategies that several files use."""

    hostile_text: st.SearchStrategy[str]
    hostile_conversations: st.SearchStrategy[tuple[Message, ...]]
    """Ready to be answered."""
    harmless_conversations: st.SearchStrategy[tuple[Message, ...]]
    """Ready to be answered; no text holds a control literal."""
    answers: st.SearchStrategy[Message]
    """Assistant messages without reasoning; the ids of their calls are ``call_0`` …"""
    thoughtful_answers: st.SearchStrategy[Message]


@pytest.fixture(scope="session")
def strategies() -> Strategies:
    return Strategies(
        hostile_text=hostile_text,
        hostile_conversations=_conversation(hostile_text),
        harmless_conversations=_conversation(harmless_text),
        answers=_assistant(hostile_text, "call_", thinks=False),
        thoughtful_answers=_assistant(hostile_text, "call_", thinks=True),
    )


def message_from_openai(message: dict[str, Any]) -> Message:
    """A golden case's message."""
    return Message(
        role=Role[message["role"].upper()],
        content=message.get("content") or "",
        reasoning_content=message.get("reasoning_content") or "",
        tool_calls=tuple(
            ToolCall(id=call["id"], name=call["function"]["name"], arguments_json=call["function"]["arguments"])
            for call in message.get("tool_calls", ())
        ),
        tool_call_id=message.get("tool_call_id", ""),
        tools=tuple(Tool(function_json=json.dumps(tool["function"])) for tool in message.get("tools", ())),
        response_format_json=json.dumps(message["response_format"]) if "response_format" in message else "",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenCase:
    name: str
    messages: Sequence[Message]
    thinking_mode: str
    rendered: str


@pytest.fixture(scope="session")
def golden_cases() -> list[GoldenCase]:
    file = Path(__file__).parents[1] / "golden" / "encoding_cases.json"
    return [
        GoldenCase(
            name=case["name"],
            messages=[message_from_openai(message) for message in case["input"]["messages"]],
            thinking_mode=case["input"]["thinking_mode"],
            rendered=case["rendered"],
        )
        for case in json.loads(file.read_text(encoding="utf-8"))["cases"]
    ]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def official_tokenizer(tokenizer_folder: Path) -> tokenizers.Tokenizer:
    """With added tokens: a control literal anywhere in the text becomes its id."""
    return tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


Frames = AsyncIterator[Any]


class ScriptedRank(worker_pb2_grpc.WorkerServiceServicer):
    """A rank on a real port that stands in the directory; what it answers is the test's to say.

    ``on_reserve``, ``on_prefill``, ``on_generate``: called instead of the usual answers. The usual ones: a reservation
    with ``cached_len``; a prefill that pushes all but one token; the ids from ``TOKENS`` on, one a frame; a move
    of 64 tokens.
    """

    TOKENS = 40

    def __init__(self, rank_id: str, role: PeerRole) -> None:
        self.rank_id, self.role = rank_id, role
        self.cached_len = 0
        self.reserved: list[worker_pb2.ReserveRequest] = []
        self.released: list[worker_pb2.ReleaseRequest] = []
        self.retained: list[worker_pb2.RetainRequest] = []
        self.lease = worker_pb2.RetainResponse(
            outcome=common_pb2.LEASE_OUTCOME_ACCEPTED, tier=common_pb2.CACHE_TIER_DEVICE, num_rebuild_tokens=5
        )
        self.lease.duration.FromSeconds(30)
        self.generated: list[worker_pb2.WorkerServiceGenerateRequest] = []
        self.prefilled: list[worker_pb2.PrefillRequest] = []
        self.migrated: list[worker_pb2.MigrateRequest] = []
        self.prepared: list[worker_pb2.PrepareRequest] = []
        self.on_drain: Callable[[worker_pb2.DrainRequest], Frames] | None = None
        self.on_migrate: Callable[[worker_pb2.MigrateRequest], Frames] | None = None
        self.state = worker_pb2.RankState(rank_id=rank_id, healthy=True, num_pages=100, num_free_pages=100)
        self.on_reserve: Callable[[worker_pb2.ReserveRequest], Awaitable[worker_pb2.ReserveResponse | None]] | None = (
            None
        )
        self.on_retain: Callable[[worker_pb2.RetainRequest], Awaitable[None]] | None = None
        self.on_prefill: Callable[[worker_pb2.PrefillRequest], Frames] | None = None
        self.on_generate: Callable[[worker_pb2.WorkerServiceGenerateRequest], Frames] | None = None
        self.is_silent = False
        self.num_cancelled = 0
        self.address = ""
        self._server = grpc.aio.server(interceptors=rank_interceptors(None))
        self.registration: Registration | None = None
        self._death: asyncio.Task[None] | None = None

    async def start(self, directory: Directory) -> None:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        record = PeerRecord(
            peer_id=self.rank_id,
            role=self.role,
            address=self.address,
            version="0",
            process_id=1,
            instance=new_instance(),
            gang_id=f"gang-of-{self.rank_id}",
        )
        self.registration = Registration(directory, record, interval_s=0.1)
        await self.registration.start()

    async def stop(self) -> None:
        assert self.registration is not None
        await self.registration.stop()
        await self._server.stop(None)
        if self._death is not None:
            await self._death

    def die(self) -> None:
        """After a moment every connection breaks and the beat stops, as if the process had been killed."""

        async def end() -> None:
            await asyncio.sleep(0.1)
            assert self.registration is not None
            assert self.registration._task is not None
            self.registration._task.cancel()
            await self._server.stop(None)

        self._death = asyncio.create_task(end())

    async def Reserve(self, request: worker_pb2.ReserveRequest, context: Any) -> worker_pb2.ReserveResponse:
        self.reserved.append(request)
        answer = await self.on_reserve(request) if self.on_reserve else None
        return answer or worker_pb2.ReserveResponse(
            reservation_id=f"{self.rank_id}/{request.attempt}", cached_len=self.cached_len
        )

    async def Prefill(self, request: worker_pb2.PrefillRequest, context: Any) -> Frames:
        self.prefilled.append(request)
        if self.on_prefill is not None:
            async for frame in self.on_prefill(request):
                yield frame
            return
        num_pushed = len(request.token_ids) - 1 - request.cached_len
        yield worker_pb2.PrefillResponse(
            finished=worker_pb2.PrefillFinished(num_computed_tokens=num_pushed, num_pushed_tokens=num_pushed)
        )

    async def Migrate(self, request: worker_pb2.MigrateRequest, context: Any) -> Frames:
        self.migrated.append(request)
        if self.on_migrate is not None:
            async for frame in self.on_migrate(request):
                yield frame
            return
        yield worker_pb2.MigrateResponse(
            finished=worker_pb2.MigrateFinished(num_migrated_tokens=64, cached_len=64, is_complete=True)
        )

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> Frames:
        assert self.on_drain is not None
        async for frame in self.on_drain(request):
            yield frame

    async def Prepare(self, request: worker_pb2.PrepareRequest, context: Any) -> worker_pb2.PrepareResponse:
        self.prepared.append(request)
        return worker_pb2.PrepareResponse()

    async def Generate(self, request: worker_pb2.WorkerServiceGenerateRequest, context: Any) -> Frames:
        self.generated.append(request)
        try:
            async for frame in (self.on_generate or self.tokens)(request):
                yield frame
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise

    async def tokens(self, request: worker_pb2.WorkerServiceGenerateRequest, *, num: int = 1 << 20) -> Frames:
        first = request.sampling.first_output_index
        for index in range(first, first + min(num, request.sampling.max_output_tokens)):
            yield token_frame(self.TOKENS + index, index)
            await asyncio.sleep(0)
        yield finished_frame()

    async def Release(self, request: worker_pb2.ReleaseRequest, context: Any) -> worker_pb2.ReleaseResponse:
        self.released.append(request)
        return worker_pb2.ReleaseResponse()

    async def Retain(self, request: worker_pb2.RetainRequest, context: Any) -> worker_pb2.RetainResponse:
        self.retained.append(request)
        if self.on_retain is not None:
            await self.on_retain(request)
        return self.lease

    async def WatchState(self, request: worker_pb2.WatchStateRequest, context: Any) -> Frames:
        while True:
            if not self.is_silent:
                yield worker_pb2.WatchStateResponse(state=self.state)
            await asyncio.sleep(0.05)


def token_frame(token_id: int, index: int) -> worker_pb2.WorkerServiceGenerateResponse:
    return worker_pb2.WorkerServiceGenerateResponse(
        tokens=worker_pb2.TokenBatch(first_index=index, token_ids=[token_id])
    )


def finished_frame(
    reason: int = common_pb2.FINISH_REASON_LENGTH, num_computed: int = 3
) -> worker_pb2.WorkerServiceGenerateResponse:
    finished = worker_pb2.GenerateFinished(reason=reason, num_computed_tokens=num_computed)  # type: ignore[arg-type]
    finished.decode_time.FromMilliseconds(70)
    return worker_pb2.WorkerServiceGenerateResponse(finished=finished)


async def until(true: Callable[[], object], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110 - of anything
            await asyncio.sleep(0.02)


@dataclass(kw_only=True)
class ScriptedSystem:
    """Scripted ranks, and what a router has of them."""

    directory: Directory
    watcher: DirectoryWatcher
    ranks: Ranks
    scripted: dict[str, ScriptedRank]
    token_frame: Callable[..., worker_pb2.WorkerServiceGenerateResponse] = token_frame
    finished_frame: Callable[..., worker_pb2.WorkerServiceGenerateResponse] = finished_frame
    until: Callable[..., Awaitable[None]] = until

    async def add(self, rank_id: str, role: PeerRole = PeerRole.DECODE) -> ScriptedRank:
        rank = self.scripted[rank_id] = ScriptedRank(rank_id, role)
        await rank.start(self.directory)
        await until(lambda: self.ranks.load(RankId(rank_id)) is not None)
        return rank


@pytest.fixture
async def system(store: Store) -> AsyncIterator[ScriptedSystem]:
    directory = Directory(store, "scripted")
    watcher = DirectoryWatcher(directory, dead_after_s=2.0, poll_interval_s=0.05)
    await watcher.start()
    ranks = Ranks(watcher=watcher, worker_token=None, call_timeout_s=2.0, progress_timeout_s=1.0)
    await ranks.start()
    running = ScriptedSystem(directory=directory, watcher=watcher, ranks=ranks, scripted={})
    yield running
    await ranks.stop()
    await watcher.stop()
    for rank in running.scripted.values():
        await rank.stop()


SECRET = bytes(32)


def router_turns(
    store: Store,
    system: Any,
    tokenizer: Tokenizer,
    name: str,
    *,
    max_context_tokens: int = 1 << 20,
    **changes: Any,
) -> Turns:
    spec = RouterSpec(
        router_id=RouterId(name),
        cluster_name="scripted",
        redis_url="",
        model_path=Path(),
        model_name="m",
        max_context_tokens=max_context_tokens,
        **changes,
    )
    model = ServedModel(
        name="m",
        tokenizer=tokenizer,
        history=History(tokenizer, "f"),
        vocab_size=tokenizer.vocab_size,
        max_context_tokens=max_context_tokens,
    )
    sessions, rendering = Sessions(store, secret=SECRET, router_id=spec.router_id), Rendering(model.history)
    metrics = RouterMetrics(new_registry())
    return Turns(
        model=model,
        sessions=sessions,
        rendering=rendering,
        admission=Admission(spec=spec, model=model, sessions=sessions, rendering=rendering),
        maker=TurnMaker(
            spec=spec,
            model=model,
            ranks=system.ranks,
            rendering=rendering,
            token_log=TokenLog(sessions),
            secret=SECRET,
            moves=Moves(store, "test"),
        ),
        followed=FollowedTurns(model=model, sessions=sessions, rendering=rendering),
        retention=Retention(sessions=sessions, ranks=system.ranks, waits=ToolWaits(store), metrics=metrics),
        cut_ahead=CutAhead(spec=spec, ranks=system.ranks, rendering=rendering, secret=SECRET),
        deletions=Deletions(store),
        metrics=metrics,
    )


@pytest.fixture
def make_turns() -> Callable[..., Turns]:
    """Turns of one router by store, system, tokenizer and the router's name; changes of its spec."""
    return router_turns


@pytest.fixture
async def turns(
    store: Store, system: Any, tokenizer: Tokenizer, make_turns: Callable[..., Turns], request: pytest.FixtureRequest
) -> AsyncIterator[Turns]:
    """Those of ``router-a``; its parameter, if it has one: changes of the spec."""
    made = make_turns(store, system, tokenizer, "router-a", **getattr(request, "param", {}))
    yield made
    await made.stop(0.0)
    await made.sessions.close()
    made.rendering.close()
