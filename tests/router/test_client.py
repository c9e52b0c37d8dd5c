"""The client against a scripted router: a real server, real stubs, answers that each test lays down."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import grpc
import pytest

from seamount.router.client import (
    AsyncClient,
    Client,
    Message,
    Retries,
    Role,
    Sampling,
    ThinkingMode,
    ToolCall,
    system,
    tool_result,
    user,
)
from seamount.router.tenants import ApiKeys, Identity, router_interceptors
from seamount.v1 import (
    common_pb2,
    events_pb2,
    inference_pb2,
    inference_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)
from seamount.wire.credentials import digest
from seamount.wire.errors import (
    Aborted,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    to_status,
)
from seamount.wire.ids import TenantId

KEY = "acme-key-0123456789"
QUICK = Retries(first_delay_s=0.01, resume_for_s=0.0)
EVENTS = [
    events_pb2.TurnEvent(started=events_pb2.TurnStarted(session_id="s", model="m", seed=7, num_prompt_tokens=5)),
    events_pb2.TurnEvent(reasoning_delta=events_pb2.ReasoningDelta(text="think ")),
    events_pb2.TurnEvent(reasoning_delta=events_pb2.ReasoningDelta(text="hard")),
    events_pb2.TurnEvent(content_delta=events_pb2.ContentDelta(text="An")),
    events_pb2.TurnEvent(content_delta=events_pb2.ContentDelta(text="swer")),
    events_pb2.TurnEvent(tool_call_started=events_pb2.ToolCallStarted(index=0, id="c0", name="look")),
    events_pb2.TurnEvent(tool_call_arguments_delta=events_pb2.ToolCallArgumentsDelta(index=0, arguments_json='{"a"')),
    events_pb2.TurnEvent(tool_call_arguments_delta=events_pb2.ToolCallArgumentsDelta(index=0, arguments_json=":1}")),
    events_pb2.TurnEvent(tool_call_finished=events_pb2.ToolCallFinished(index=0)),
    events_pb2.TurnEvent(usage=events_pb2.Usage(num_output_tokens=9)),
    events_pb2.TurnEvent(
        finished=events_pb2.TurnFinished(
            reason=common_pb2.FINISH_REASON_TOOL_CALLS, receipt=events_pb2.Receipt(num_cached_tokens=3)
        )
    ),
]
for _number, _event in enumerate(EVENTS, start=1):
    _event.turn_id, _event.sequence = "t", _number


class Script(session_pb2_grpc.SessionServiceServicer, inference_pb2_grpc.InferenceServiceServicer):
    """``failures`` are raised first, one a call; then a turn's n-th stream ends behind event ``cuts[n]``."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.cuts: list[int] = []
        self.events = EVENTS
        self.requests: list = []
        self.stream_closed = asyncio.Event()
        self.endless = False

    def _take(self, request) -> None:
        self.requests.append(request)
        if self.failures:
            raise self.failures.pop(0)

    async def CreateSession(self, request, context):
        self._take(request)
        return session_pb2.CreateSessionResponse(session=session_pb2.Session(id="s"))

    async def GetSession(self, request, context):
        self._take(request)
        messages = [common_pb2.Message(role=common_pb2.ROLE_USER, content="hi")] if request.include_messages else []
        return session_pb2.GetSessionResponse(session=session_pb2.Session(id="s"), messages=messages)

    async def ListSessions(self, request, context):
        self._take(request)
        return session_pb2.ListSessionsResponse(sessions=[session_pb2.Session(id="s")], next_page_token="n")

    async def DeleteSession(self, request, context):
        self._take(request)
        return session_pb2.DeleteSessionResponse()

    async def ForkSession(self, request, context):
        self._take(request)
        return session_pb2.ForkSessionResponse(session=session_pb2.Session(id="f"))

    async def CancelTurn(self, request, context):
        self._take(request)
        return session_pb2.CancelTurnResponse(cancelled=True)

    async def RunTurn(self, request, context):
        self._take(request)
        async for events in self._stream(0):
            yield session_pb2.RunTurnResponse(events=events)

    async def ResumeTurn(self, request, context):
        self._take(request)
        async for events in self._stream(request.after_sequence):
            yield session_pb2.ResumeTurnResponse(events=events)

    async def _stream(self, after):
        try:
            cut = self.cuts.pop(0) if self.cuts else len(self.events)
            for first in range(after, cut, 2):  # two events a frame
                yield self.events[first : min(first + 2, cut)]
            if self.endless:
                await asyncio.Event().wait()
            if cut < len(self.events):
                raise Unavailable("router going away", reason="GOING", retry_after_s=0.01)
        finally:
            self.stream_closed.set()

    async def Generate(self, request, context):
        self._take(request)
        yield inference_pb2.GenerateResponse(events=self.events, token_ids=[4, 5])

    async def Tokenize(self, request, context):
        self._take(request)
        return inference_pb2.TokenizeResponse(token_ids=[1, 2])

    async def ListModels(self, request, context):
        self._take(request)
        return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(id="m")])


async def start(script: Script) -> tuple[grpc.aio.Server, str]:
    keys = ApiKeys([(digest(KEY), Identity(tenant=TenantId("acme")))])
    server = grpc.aio.server(interceptors=router_interceptors(keys))
    session_pb2_grpc.add_SessionServiceServicer_to_server(script, server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(script, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


@asynccontextmanager
async def scripted(**options) -> AsyncIterator[tuple[Script, AsyncClient]]:
    script = Script()
    server, address = await start(script)
    try:
        async with AsyncClient(address, **({"api_key": KEY, "retries": QUICK} | options)) as client:
            yield script, client
    finally:
        await server.stop(0)


def passing() -> Unavailable:
    return Unavailable("away", reason="AWAY", retry_after_s=0.01)


async def test_a_turn_is_its_events_and_their_sum() -> None:
    async with scripted() as (_, client):
        stream = client.run_turn("s", [user("hi")])
        seen = [event async for event in stream]
        turn = await stream.result()
    assert seen == EVENTS
    assert (turn.session_id, turn.turn_id, turn.model, turn.seed) == ("s", "t", "m", 7)
    assert (turn.reasoning, turn.content) == ("think hard", "Answer")
    call = ToolCall(id="c0", name="look", arguments_json='{"a":1}')
    assert turn.tool_calls == (call,)
    assert turn.finish_reason == common_pb2.FINISH_REASON_TOOL_CALLS
    assert (turn.usage.num_output_tokens, turn.receipt.num_cached_tokens) == (9, 3)
    assert turn.message() == Message(
        role=Role.ASSISTANT, content="Answer", reasoning_content="think hard", tool_calls=(call,)
    )


@pytest.mark.parametrize("cut", range(len(EVENTS)))
async def test_a_broken_stream_goes_on_with_nothing_twice(cut: int) -> None:
    async with scripted() as (script, client):
        script.cuts = [cut, min(cut + 1, len(EVENTS) - 1)]
        seen = [event async for event in client.run_turn("s", [user("hi")])]
    assert seen == EVENTS
    run, *resumed = script.requests
    assert run.idempotency_key
    if cut == 0:
        assert resumed[0] == run, "nothing is known of the turn yet: the same key again"
    else:
        assert resumed[0] == session_pb2.ResumeTurnRequest(session_id="s", turn_id="t", after_sequence=cut)
    assert resumed[1].after_sequence == min(cut + 1, len(EVENTS) - 1)


async def test_a_turn_is_resumed_for_a_while_however_often_that_fails() -> None:
    async with scripted(retries=replace(QUICK, resume_for_s=10.0)) as (script, client):
        script.cuts = [3] * 8
        assert [event async for event in client.run_turn("s", [user("hi")])] == EVENTS
    assert [request.after_sequence for request in script.requests[1:]] == [3] * 8


async def test_the_stream_goes_on_at_the_next_router() -> None:
    first, second = Script(), Script()
    (server, one), (other, two) = await start(first), await start(second)
    first.endless = True
    first.cuts = [4]
    try:
        async with AsyncClient(f"{one}, {two}", api_key=KEY, retries=QUICK) as client:
            stream = client.run_turn("s", [user("hi")])
            seen = [await anext(stream) for _ in range(4)]
            await server.stop(0)
            seen += [event async for event in stream]
            await client.get_session("s")
    finally:
        await server.stop(0)
        await other.stop(0)
    assert seen == EVENTS
    assert [type(request).__name__ for request in second.requests] == ["ResumeTurnRequest", "GetSessionRequest"]


async def test_a_turn_is_resumed_by_its_id() -> None:
    async with scripted() as (script, client):
        script.cuts = [7]
        stream = client.resume_turn("s", "t", after_sequence=5)
        assert [event async for event in stream] == EVENTS[5:]
    assert [request.after_sequence for request in script.requests] == [5, 7]


async def test_to_resume_behind_the_last_event_is_the_end() -> None:
    async with scripted() as (script, client):
        assert [event async for event in client.resume_turn("s", "t", after_sequence=len(EVENTS))] == []
    assert len(script.requests) == 1


def test_no_address_is_an_error() -> None:
    async def make() -> None:
        AsyncClient(" , ")

    with pytest.raises(InvalidArgument):
        asyncio.run(make())


async def test_a_stream_that_never_moves_is_given_up() -> None:
    async with scripted() as (script, client):
        script.cuts = [3] * 20
        with pytest.raises(Unavailable) as caught:
            await client.run_turn("s", [user("hi")]).result()
        assert caught.value.reason == "GOING"
        assert len(script.requests) == 3


async def test_a_stream_that_moves_is_followed_however_often_it_breaks() -> None:
    async with scripted(retries=replace(QUICK, max_attempts=2)) as (script, client):
        script.cuts = list(range(1, 7))
        assert [event async for event in client.run_turn("s", [user("hi")])] == EVENTS
        assert len(script.requests) == 7


async def test_a_failed_turn_raises_its_own_error_and_is_not_retried() -> None:
    status = to_status(ResourceExhausted("no pages", reason="NO_PAGES", retry_after_s=1.0))
    failed = events_pb2.TurnEvent(turn_id="t", sequence=2)
    failed.failed.status.ParseFromString(status.SerializeToString())
    async with scripted() as (script, client):
        script.events = [EVENTS[0], failed]
        stream = client.run_turn("s", [user("hi")])
        assert await anext(stream) == EVENTS[0]
        with pytest.raises(ResourceExhausted, match="no pages") as caught:
            await anext(stream)
        assert caught.value.retry_after_s == 1.0
        assert len(script.requests) == 1


async def test_a_stream_without_an_end_is_an_error() -> None:
    async with scripted(retries=Retries(max_attempts=1, resume_for_s=0.0)) as (script, client):
        script.events = EVENTS[:3]
        with pytest.raises(Unavailable) as caught:
            await client.run_turn("s", [user("hi")]).result()
    assert caught.value.reason == "STREAM_CUT"


async def test_leaving_a_stream_cancels_it_on_the_server() -> None:
    async with scripted() as (script, client):
        script.endless = True
        async with client.run_turn("s", [user("hi")]) as stream:
            await anext(stream)
            assert not script.stream_closed.is_set()
        await asyncio.wait_for(script.stream_closed.wait(), 1.0)


async def test_reads_and_keyed_writes_are_retried_a_bounded_number_of_times() -> None:
    async with scripted() as (script, client):
        for call in (
            client.create_session,
            lambda: client.get_session("s"),
            lambda: client.delete_session("s"),
            lambda: client.tokenize("x"),
            lambda: client.cancel_turn("s", "t"),
            lambda: client.fork_session("s", at_turn=2),
        ):
            script.requests, script.failures = [], [passing(), passing()]
            await call()
            assert len(script.requests) == 3
            assert script.requests[0] == script.requests[2]
            script.requests, script.failures = [], [passing() for _ in range(9)]
            with pytest.raises(Unavailable):
                await call()
            assert len(script.requests) == 3
            script.failures = []


async def test_what_must_not_be_repeated_is_not() -> None:
    async with scripted() as (script, client):
        for call in (lambda: client.cancel_turn("s"), lambda: client.generate([1, 2]).result()):
            script.requests, script.failures = [], [passing()]
            with pytest.raises(Unavailable):
                await call()
            assert len(script.requests) == 1


@pytest.mark.parametrize("error", [NotFound("none", reason="NO_SESSION"), Aborted("stale", reason="STALE_HEAD")])
async def test_lasting_errors_are_typed_and_not_retried(error) -> None:
    async with scripted() as (script, client):
        script.failures = [error]
        with pytest.raises(type(error)) as caught:
            await client.get_session("s")
        assert (caught.value.reason, caught.value.message) == (error.reason, error.message)
        assert len(script.requests) == 1


async def test_an_error_with_a_time_is_retried_after_it() -> None:
    async with scripted() as (script, client):
        script.failures = [Aborted("running elsewhere", reason="TURN_RUNNING", retry_after_s=0.5)]
        started = time.monotonic()
        await client.run_turn("s", [user("hi")]).result()
        assert time.monotonic() - started >= 0.5
        assert len(script.requests) == 2


async def test_a_missing_or_wrong_key_is_unauthenticated() -> None:
    for options in ({"api_key": None}, {"api_key": "no-such-key-0123456789"}):
        async with scripted(**options) as (script, client):
            with pytest.raises(Unauthenticated):
                await client.list_models()
            with pytest.raises(Unauthenticated):
                await client.run_turn("s", [user("hi")]).result()
            assert script.requests == []


async def test_requests_say_what_was_asked() -> None:
    call = ToolCall(id="c", name="n", arguments_json="{}")
    async with scripted() as (script, client):
        await client.create_session(
            model="m", thinking_mode=ThinkingMode.CHAT, defaults=Sampling(top_k=3), idempotency_key="k"
        )
        created = script.requests[-1]
        assert created.idempotency_key == "k"
        assert created.thinking_mode == common_pb2.THINKING_MODE_CHAT
        assert created.defaults == common_pb2.SamplingParameters(top_k=3)
        assert not created.defaults.HasField("temperature")
        sampling = Sampling(temperature=0.0, seed=5, stop_strings=("x",), stop_token_ids=(9,), num_logprobs=0)
        messages = [system("s"), user("u"), tool_result(call, "r")]
        await client.run_turn("s", messages, sampling=sampling, expected_head=0, deadline_s=2.5).result()
        turn = script.requests[-1]
        assert [m.role for m in turn.messages] == [
            common_pb2.ROLE_SYSTEM,
            common_pb2.ROLE_USER,
            common_pb2.ROLE_TOOL,
        ]
        assert turn.messages[2].tool_call_id == "c"
        assert turn.sampling.HasField("temperature")
        assert turn.sampling.HasField("num_logprobs")
        assert (turn.sampling.seed, list(turn.sampling.stop_strings)) == (5, ["x"])
        assert turn.HasField("expected_head")
        assert turn.deadline.ToMilliseconds() == 2500
        result = await client.generate([1, 2]).result()
        assert list(script.requests[-1].token_ids.token_ids) == [1, 2]
        assert result.token_ids == (4, 5)
        await client.generate([user("u")], thinking_mode=ThinkingMode.CHAT).result()
        assert script.requests[-1].messages.thinking_mode == common_pb2.THINKING_MODE_CHAT
        await client.tokenize("text")
        assert script.requests[-1].text == "text"
        await client.tokenize([user("u")])
        assert script.requests[-1].messages.messages[0].content == "u"
        history = await client.get_history("s")
        assert history.messages == (user("hi"),)
        assert await client.list_sessions(page_size=1) == ([session_pb2.Session(id="s")], "n")


@contextmanager
def silent_listener() -> Iterator[str]:
    """Accepts connections (the kernel does) and never says a word, as a stopped process would."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


async def test_a_router_that_hangs_or_is_gone_costs_a_second() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{free.getsockname()[1]}"
    with silent_listener() as hung:
        for address in (hung, gone):
            async with AsyncClient(address, retries=Retries(max_attempts=1)) as client:
                started = time.monotonic()
                with pytest.raises(Unavailable) as caught:
                    await client.list_models()
                assert caught.value.reason == "NO_CONNECTION"
                assert address in caught.value.message
                with pytest.raises(Unavailable):
                    await client.run_turn("s", [user("hi")]).result()
                assert time.monotonic() - started < 2.6


async def test_a_client_finds_a_router_that_came_back() -> None:
    script = Script()
    server, address = await start(script)
    async with AsyncClient(address, api_key=KEY, retries=QUICK) as client:
        await client.list_models()
        await server.stop(0)
        with pytest.raises(Unavailable):
            await client.list_models()
        again = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(script, again)
        assert again.add_insecure_port(address)
        await again.start()
        try:
            assert [model.id for model in await client.list_models()] == ["m"]
        finally:
            await again.stop(0)


async def test_the_blocking_client_is_the_same_one() -> None:
    script = Script()
    server, address = await start(script)

    def use() -> None:
        with Client(address, api_key=KEY) as client:
            assert client.create_session().id == "s"
            stream = client.run_turn("s", [user("hi")])
            assert list(stream) == EVENTS
            assert stream.result().content == "Answer"
            assert client.generate([3]).result().token_ids == (4, 5)
            with client.run_turn("s", [user("hi")]) as left:
                assert next(left) == EVENTS[0]
            script.failures = [NotFound("none", reason="NO_SESSION")]
            with pytest.raises(NotFound):
                client.get_session("s")
        client.close()

    try:
        await asyncio.to_thread(use)
    finally:
        await server.stop(0)


def test_the_blocking_client_has_every_method() -> None:
    public = {name for name in vars(AsyncClient) if not name.startswith("_")} - {"close"}
    assert public <= set(vars(Client))
    assert len(public) >= 13


def test_retries_grow_and_end() -> None:
    retries = Retries(max_attempts=4)
    delays = [retries.delay_s(Unavailable("x", reason="X"), attempt) for attempt in (1, 2, 3)]
    assert all(delay is not None and 0 < delay < 2 for delay in delays)
    assert retries.delay_s(Unavailable("x", reason="X"), 4) is None
    assert retries.delay_s(NotFound("x", reason="X"), 1) is None
    assert retries.delay_s(ResourceExhausted("x", reason="X", retry_after_s=5.0), 1) == 5.0
    assert retries.delay_s(ResourceExhausted("x", reason="X", retry_after_s=5.1), 1) is None
