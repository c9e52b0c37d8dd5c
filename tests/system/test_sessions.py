"""Sessions over gRPC, through every process: what is computed, what is replayed, what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1.health_pb2 import HealthCheckResponse

from seamount.cluster.local import LocalCluster
from seamount.cluster.redis_server import RedisServer
from seamount.router.client import (
    AsyncClient,
    ContextPolicy,
    Message,
    Retries,
    Role,
    Sampling,
    Tool,
    ToolCall,
    system,
    tool_result,
    user,
)
from seamount.router.client_turn import TurnStream
from seamount.router.messages import ThinkingMode
from seamount.router.session_service import FORCED_TOKENS_KEY
from seamount.router.tokenizer import Control, Tokenizer
from seamount.v1 import admin_pb2, common_pb2, events_pb2, inference_pb2, session_pb2, session_pb2_grpc
from seamount.wire.credentials import bearer
from seamount.wire.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    SeamountError,
    Unauthenticated,
    Unavailable,
    from_rpc_error,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.cluster]

StartCluster = Callable[..., AbstractAsyncContextManager[LocalCluster]]
PagesAreBack = Callable[[AsyncClient], Awaitable[None]]
KEYS = {"alice": "alice-key-0123456789abcdef", "bob": "bob-key-0123456789abcdef00"}
ADMIN_KEY = "root-key-0123456789abcdef0"
SHORT = Sampling(max_output_tokens=8, temperature=0.0)
WEATHER = Tool(function_json='{"name": "weather", "parameters": {"type": "object"}}')
CALL = ToolCall(id="c1", name="weather", arguments_json='{"city": "Bergen"}')


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(start_cluster: StartCluster, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("secrets")
    lines = [f"{tenant}:{hashlib.sha256(key.encode()).hexdigest()}" for tenant, key in KEYS.items()]
    lines.append(f"root:{hashlib.sha256(ADMIN_KEY.encode()).hexdigest()}:admin")
    (folder / "keys").write_text("\n".join(lines) + "\n")
    (folder / "token").write_text("worker-token-0123456789abcdef\n")
    files = {"api_key_file": str(folder / "keys"), "worker_token_file": str(folder / "token")}
    async with start_cluster({"router": files}) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def alice(cluster: LocalCluster, pages_are_back: PagesAreBack) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address, api_key=KEYS["alice"]) as client:
        yield client
    async with AsyncClient(cluster.address, api_key=ADMIN_KEY) as root:
        await pages_are_back(root)


async def computed_tokens(cluster: LocalCluster) -> dict[str, int]:
    """Prompt tokens that each pool's ranks computed so far, by their own counters."""
    async with AsyncClient(cluster.address, api_key=ADMIN_KEY) as root:
        await asyncio.sleep(0.3)  # the ranks' states reach the router ten times a second
        counts = {"prefill": 0, "decode": 0}
        for rank in await root.list_ranks():
            counts["prefill" if rank.state.gang_id.startswith("prefill") else "decode"] += (
                rank.state.num_computed_tokens
            )
        return counts


async def test_each_turn_computes_only_what_is_new(cluster: LocalCluster, alice: AsyncClient) -> None:
    session = await alice.create_session(thinking_mode=ThinkingMode.CHAT)
    before = await computed_tokens(cluster)
    first = await alice.run_turn(session.id, [user("word " * 40)], sampling=SHORT).result()
    middle = await computed_tokens(cluster)
    assert first.receipt.path == events_pb2.PREFILL_PATH_REMOTE
    assert first.receipt.num_decode_computed_tokens == 1
    assert middle["decode"] - before["decode"] == 1, "the rank's own counter agrees with the receipt"
    num_first = first.receipt.num_prompt_tokens
    assert first.receipt.num_prefill_computed_tokens == num_first - 1 == middle["prefill"] - before["prefill"]
    assert first.receipt.num_pushed_tokens == num_first - 1

    second = await alice.run_turn(session.id, [user("and more " * 20)], sampling=SHORT).result()
    after = await computed_tokens(cluster)
    receipt = second.receipt
    assert receipt.path == events_pb2.PREFILL_PATH_REMOTE
    assert receipt.num_decode_computed_tokens == 1 == after["decode"] - middle["decode"]
    # The last sampled token was never fed back, so its entry is new too.
    known = num_first + first.receipt.num_output_tokens - 1
    assert receipt.num_cached_tokens == known
    assert receipt.num_prefill_computed_tokens == receipt.num_prompt_tokens - 1 - known
    assert receipt.num_pulled_tokens == known - known_at_prefill(num_first)
    assert after["prefill"] - middle["prefill"] == receipt.num_prefill_computed_tokens
    assert (first.receipt.miss_cause, receipt.miss_cause) == (
        events_pb2.MISS_CAUSE_FIRST_TURN,
        events_pb2.MISS_CAUSE_NONE,
    )
    assert receipt.transfer_time.ToNanoseconds() > 0
    assert first.receipt.idle_kv_byte_seconds == 0
    assert receipt.idle_kv_byte_seconds > 0, "the caches waited for this turn"
    totals = (await alice.get_session(session.id)).totals
    assert totals.num_turns == 2
    assert totals.num_cached_tokens == known
    assert totals.num_prefill_computed_tokens == num_first - 1 + receipt.num_prefill_computed_tokens
    assert totals.num_output_tokens == 16
    assert totals.idle_kv_byte_seconds == receipt.idle_kv_byte_seconds


async def test_a_context_policy_is_set_changed_and_refused(cluster: LocalCluster, alice: AsyncClient) -> None:
    session = await alice.create_session(context_policy=ContextPolicy.DISCARD_TOOL_RESULTS)
    assert session.context_policy == common_pb2.CONTEXT_POLICY_DISCARD_TOOL_RESULTS
    await alice.update_session(session.id, context_policy=ContextPolicy.DISCARD_ALL)
    assert (await alice.get_session(session.id)).context_policy == common_pb2.CONTEXT_POLICY_DISCARD_ALL
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        for policy in (0, 9):
            wrong = session_pb2.UpdateSessionRequest(
                session_id=session.id,
                idempotency_key="u",
                context_policy=policy,  # type: ignore[arg-type]
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.UpdateSession(wrong, metadata=bearer(KEYS["alice"]), timeout=10)
            error = from_rpc_error(caught.value)
            assert isinstance(error, InvalidArgument)
            assert error.field == "context_policy"


async def test_a_new_question_cuts_reasoning_and_the_receipt_says_so(alice: AsyncClient) -> None:
    session = await alice.create_session(thinking_mode=ThinkingMode.THINKING)
    first = await alice.run_turn(session.id, [user("word " * 40)], sampling=SHORT).result()
    second = await alice.run_turn(session.id, [user("and more")], sampling=SHORT).result()
    assert second.receipt.miss_cause == events_pb2.MISS_CAUSE_REASONING_CUT
    assert second.receipt.first_differing_position < first.receipt.num_prompt_tokens + 8


def known_at_prefill(num_prompt: int) -> int:
    """Full pages that a prefill rank's tree keeps of a prompt whose last token it did not compute."""
    return (num_prompt - 1) // 64 * 64


async def test_a_conversation_with_a_tool_call(cluster: LocalCluster, alice: AsyncClient) -> None:
    session = await alice.create_session()
    await alice.run_turn(session.id, [system("Be brief.", tools=[WEATHER]), user("hello")], sampling=SHORT).result()
    call = Message(role=Role.ASSISTANT, reasoning_content="I need the weather.", tool_calls=(CALL,))
    recorded = await alice.run_turn(session.id, [user("How is Bergen?"), call]).result()
    assert recorded.finish_reason == common_pb2.FINISH_REASON_RECORDED
    waiting = await alice.get_session(session.id)
    assert waiting.state == session_pb2.SESSION_STATE_WAITING_FOR_TOOLS
    assert [pending.id for pending in waiting.pending_tool_calls] == ["c1"]
    lease = await alice.report_tool_wait(session.id, 20.0)
    assert lease.outcome == common_pb2.LEASE_OUTCOME_ACCEPTED
    assert lease.tier == common_pb2.CACHE_TIER_DEVICE
    assert 0 < lease.num_rebuild_tokens <= waiting.num_context_tokens
    assert (await alice.get_session(session.id)).lease == lease
    answered = await alice.run_turn(session.id, [tool_result(CALL, "rain")], sampling=SHORT).result()
    assert answered.usage.num_output_tokens == 8
    assert answered.receipt.lease == lease, "in force when the turn came"
    assert not (await alice.get_session(session.id)).HasField("lease"), "it has done its work"
    with pytest.raises(FailedPrecondition):
        await alice.report_tool_wait(session.id, 20.0)
    history = await alice.get_history(session.id)
    await gone_with_its_lease(cluster, alice)
    roles = [message.role for message in history.messages]
    assert roles == [Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.USER, Role.ASSISTANT, Role.TOOL, Role.ASSISTANT]
    assert history.session.head == 3
    assert history.session.state == session_pb2.SESSION_STATE_IDLE
    assert len(history.receipts) == 2, "a turn that only records costs nothing"


async def gone_with_its_lease(cluster: LocalCluster, alice: AsyncClient) -> None:
    """A session that is deleted while it waits for a tool holds no pages any more."""
    session = await alice.create_session()
    call = Message(role=Role.ASSISTANT, tool_calls=(CALL,))
    await alice.run_turn(session.id, [system("Be brief.", tools=[WEATHER]), user("hello")], sampling=SHORT).result()
    await alice.run_turn(session.id, [user("How is Bergen?"), call]).result()
    assert (await alice.report_tool_wait(session.id, 60.0)).outcome == common_pb2.LEASE_OUTCOME_ACCEPTED
    await alice.delete_session(session.id)
    async with AsyncClient(cluster.address, api_key=ADMIN_KEY) as root, asyncio.timeout(5):
        while sum(rank.state.num_leased_pages for rank in await root.list_ranks()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_session_made_anew_under_its_old_key_is_served_where_the_old_one_was(alice: AsyncClient) -> None:
    """It has the same id: what ranks remember of the first one's epochs must not refuse it."""
    for _ in range(3):  # two decode ranks: one of them serves two of the three
        session = await alice.create_session(idempotency_key="made again")
        for _ in range(2):
            turn = await alice.run_turn(session.id, [user("hello")], sampling=SHORT).result()
            assert turn.finish_reason == common_pb2.FINISH_REASON_LENGTH
        await alice.delete_session(session.id)


async def test_a_retry_replays_the_first_result_and_computes_nothing(cluster: LocalCluster, alice: AsyncClient) -> None:
    session = await alice.create_session()
    sampling = Sampling(max_output_tokens=10, temperature=1.0, num_logprobs=2)
    messages = [user("tell me")]
    first = [e async for e in alice.run_turn(session.id, messages, sampling=sampling, idempotency_key="k")]
    before = await computed_tokens(cluster)
    again = [e async for e in alice.run_turn(session.id, messages, sampling=sampling, idempotency_key="k")]
    assert again == first
    assert await computed_tokens(cluster) == before
    assert (await alice.get_session(session.id)).head == 1
    with pytest.raises(AlreadyExists):
        await alice.run_turn(session.id, [user("else")], sampling=sampling, idempotency_key="k").result()


@pytest.mark.parametrize("mode", ["stop_string", "stop_token"])
async def test_a_replay_behind_a_stop_is_the_same_event_for_event(
    cluster: LocalCluster, alice: AsyncClient, checkpoint: Path, mode: str
) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    thought = tokenizer.encode("thinking")
    ids = [*thought, tokenizer.control_id(Control.END_THINK), *tokenizer.encode("one two STOP three")]
    stop = (
        common_pb2.SamplingParameters(max_output_tokens=40, stop_strings=["STOP"])
        if mode == "stop_string"
        else common_pb2.SamplingParameters(max_output_tokens=40, stop_token_ids=tokenizer.encode("S"))
    )
    session = await alice.create_session()
    request = session_pb2.RunTurnRequest(session_id=session.id, idempotency_key="k", sampling=stop)
    request.messages.add(role=common_pb2.ROLE_USER, content="count")
    first = await raw_turn(cluster, request, ids)
    assert text_of(first) == ("thinking", "one two ")
    assert first[-1].finished.reason == common_pb2.FINISH_REASON_STOP_SEQUENCE
    assert await raw_turn(cluster, request, ids) == first
    following = await alice.run_turn(session.id, [user("go on")], sampling=SHORT).result()
    prompt = await alice.tokenize([user("count"), Message(role=Role.ASSISTANT, content="one two "), user("go on")])
    assert following.usage.num_prompt_tokens == len(prompt)


async def raw_turn(
    cluster: LocalCluster, request: session_pb2.RunTurnRequest, forced: list[int]
) -> list[events_pb2.TurnEvent]:
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        metadata = (*bearer(KEYS["alice"]), (FORCED_TOKENS_KEY, ",".join(map(str, forced))))
        call = stub.RunTurn(request, metadata=metadata, timeout=30)
        return [event async for response in call for event in response.events]


def text_of(events: list[events_pb2.TurnEvent]) -> tuple[str, str]:
    return (
        "".join(event.reasoning_delta.text for event in events),
        "".join(event.content_delta.text for event in events),
    )


async def test_ids_of_a_non_canonical_tokenisation_reappear(cluster: LocalCluster, alice: AsyncClient) -> None:
    """A tool call sampled by the model (forced here) comes out parsed, and its very ids are in the next prompt."""
    tokenizer = Tokenizer.load(cluster.settings.model.path)
    dsml = tokenizer.control_id(Control.DSML)
    parts = ["\n\n<", dsml, "function_calls>\n<", dsml, 'invoke name="weather">\n<', dsml]
    parts += ['parameter name="city" string="true">Bergen</', dsml, "parameter>\n</", dsml, "invoke>\n</", dsml]
    parts += ["function_calls>", tokenizer.eos_token_id]
    ids = [*tokenizer.encode("hm"), tokenizer.control_id(Control.END_THINK)]
    for part in parts:
        ids += (
            [part]
            if isinstance(part, int)
            else [i for byte in part.encode() for i in tokenizer.encode_bytes(bytes([byte]))]
        )
    session = await alice.create_session()
    request = session_pb2.RunTurnRequest(session_id=session.id, idempotency_key="k")
    request.messages.add(role=common_pb2.ROLE_USER, content="weather?")
    request.sampling.max_output_tokens = 400
    events = await raw_turn(cluster, request, ids)
    assert events[-1].finished.reason == common_pb2.FINISH_REASON_TOOL_CALLS
    waiting = await alice.get_session(session.id)
    assert waiting.state == session_pb2.SESSION_STATE_WAITING_FOR_TOOLS
    (call,) = waiting.pending_tool_calls
    assert (call.name, call.arguments_json) == ("weather", '{"city": "Bergen"}')
    result = Message(role=Role.TOOL, tool_call_id=call.id, content="rain")
    answered = await alice.run_turn(session.id, [result], sampling=SHORT).result()
    # All sampled ids stay (reasoning is kept while tools answer), so all but the last are found in the cache.
    num_kept = answered.receipt.num_cached_tokens
    assert num_kept == events[0].started.num_prompt_tokens + len(ids) - 1
    assert answered.receipt.first_differing_position >= num_kept


def by_bytes(tokenizer: Tokenizer, text: str) -> list[int]:
    """One id a byte, whatever merges the tokenizer has: not what encoding the text would give."""
    return [token_id for byte in text.encode() for token_id in tokenizer.encode_bytes(bytes([byte]))]


async def test_a_fork_shares_full_pages_and_goes_its_own_way(cluster: LocalCluster, alice: AsyncClient) -> None:
    session = await alice.create_session(thinking_mode=ThinkingMode.CHAT)
    for text in ("word " * 60, "more " * 20):
        turn = await alice.run_turn(session.id, [user(text)], sampling=SHORT).result()
    num_known = turn.receipt.num_prompt_tokens + turn.receipt.num_output_tokens - 1
    fork = await alice.fork_session(session.id)
    early = await alice.fork_session(session.id, at_turn=1)
    assert (fork.head, early.head) == (2, 1)
    assert fork.num_context_tokens == (await alice.get_session(session.id)).num_context_tokens

    question = [user("and now?")]
    forked = await alice.run_turn(fork.id, question, sampling=SHORT).result()
    assert num_known - 63 <= forked.receipt.num_cached_tokens <= num_known, "all but its last, partly filled page"
    assert forked.receipt.miss_cause == events_pb2.MISS_CAUSE_FORKED
    original = await alice.run_turn(session.id, question, sampling=SHORT).result()
    assert original.receipt.num_cached_tokens == num_known, "the fork took nothing from it"
    assert (forked.content, forked.usage.num_prompt_tokens) == (original.content, original.usage.num_prompt_tokens)

    rewound = await alice.run_turn(early.id, [user("more " * 20)], sampling=SHORT).result()
    assert rewound.content == turn.content, "the second turn again"
    assert rewound.receipt.num_cached_tokens >= 64
    assert [(await alice.get_session(one)).head for one in (session.id, fork.id, early.id)] == [3, 3, 2]
    with pytest.raises(OutOfRange) as caught:
        await alice.fork_session(session.id, at_turn=4)
    assert (caught.value.field, caught.value.metadata["head"]) == ("at_turn", "3")


async def test_another_tenants_session_is_not_found(cluster: LocalCluster, alice: AsyncClient) -> None:
    session = await alice.create_session()
    async with AsyncClient(cluster.address, api_key=KEYS["bob"]) as bob:
        texts = set()
        for session_id in (session.id, "ses_" + "a" * 32):
            for attempt in (
                bob.get_session(session_id),
                bob.run_turn(session_id, [user("hi")]).result(),
                bob.cancel_turn(session_id),
                bob.fork_session(session_id),
                bob.resume_turn(session_id, "turn_x").result(),
                bob.report_tool_wait(session_id, 5.0),
            ):
                with pytest.raises(NotFound) as caught:
                    await attempt
                texts.add(caught.value.message)
        assert len(texts) == 1, "nothing tells a foreign session from one that never was"
        await bob.delete_session(session.id)
    assert (await alice.get_session(session.id)).id == session.id


async def test_without_a_key_every_method_is_unauthenticated(cluster: LocalCluster) -> None:
    modules = (session_pb2, inference_pb2, admin_pb2)
    names = [
        f"/{service.full_name}/{method.name}"
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    names += ["/grpc.health.v1.Health/Watch"]
    names += ["/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
    assert len(names) == 19
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        for name in names:
            for metadata in ((), bearer("wrong-key-0123456789abcdef")):
                call = channel.unary_stream(name)(b"", metadata=metadata, timeout=5)
                with pytest.raises(grpc.RpcError) as caught:
                    await call.read()
                assert isinstance(from_rpc_error(caught.value), Unauthenticated), name
        # Probes have no key; the answer is one bit.
        health = await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=5)
        assert HealthCheckResponse.FromString(health).status == HealthCheckResponse.SERVING


async def test_a_tenant_is_no_operator(alice: AsyncClient) -> None:
    with pytest.raises(SeamountError) as caught:
        await alice.list_ranks()
    assert caught.value.code == grpc.StatusCode.PERMISSION_DENIED


BAD_TURNS = [
    ([], None, InvalidArgument, "messages"),
    ([Message(role=Role.TOOL, tool_call_id="nope", content="x")], None, FailedPrecondition, None),
    ([user("hi")], Sampling(temperature=math.nan), InvalidArgument, "sampling.temperature"),
    ([user("hi")], Sampling(top_p=0.0), InvalidArgument, "sampling.top_p"),
    ([user("hi")], Sampling(top_k=-1), InvalidArgument, "sampling.top_k"),
    ([user("hi")], Sampling(max_output_tokens=0), InvalidArgument, "sampling.max_output_tokens"),
    ([user("hi")], Sampling(stop_token_ids=(10**6,)), InvalidArgument, "sampling.stop_token_ids[0]"),
    ([user("x" * 5000)], None, InvalidArgument, "messages"),
    ([Message(role=Role.USER, content="x", tool_call_id="c")], None, InvalidArgument, "messages[0].tool_call_id"),
]


@pytest.mark.parametrize(("messages", "sampling", "error", "field"), BAD_TURNS)
async def test_bad_turns_name_the_field_and_change_nothing(
    cluster: LocalCluster,
    alice: AsyncClient,
    messages: list[Message],
    sampling: Sampling | None,
    error: type[SeamountError],
    field: str | None,
) -> None:
    session = await alice.create_session()
    before, counted = await alice.get_session(session.id), await computed_tokens(cluster)
    with pytest.raises(error) as caught:
        await alice.run_turn(session.id, messages, sampling=sampling).result()
    if field is not None:
        assert caught.value.field == field
    if field == "messages" and messages:
        assert caught.value.metadata["max_context_tokens"] == "4096"
        assert int(caught.value.metadata["num_prompt_tokens"]) > 5000
    after = await alice.get_session(session.id)
    after.updated_at.CopyFrom(before.updated_at)
    assert after == before
    assert await computed_tokens(cluster) == counted


async def test_unknown_roles_models_and_sessions(cluster: LocalCluster, alice: AsyncClient) -> None:
    session = await alice.create_session()
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        for role in (0, 77):
            request = session_pb2.RunTurnRequest(session_id=session.id, idempotency_key="k")
            request.messages.add(role=role, content="x")  # type: ignore[arg-type]
            with pytest.raises(grpc.RpcError) as caught:
                await stub.RunTurn(request, metadata=bearer(KEYS["alice"]), timeout=5).read()
            typed = from_rpc_error(caught.value)
            assert isinstance(typed, InvalidArgument)
            assert typed.field == "messages[0].role"
        keyless = session_pb2.RunTurnRequest(session_id=session.id)
        keyless.messages.add(role=common_pb2.ROLE_USER, content="x")
        with pytest.raises(grpc.RpcError) as caught:
            await stub.RunTurn(keyless, metadata=bearer(KEYS["alice"]), timeout=5).read()
        assert from_rpc_error(caught.value).field == "idempotency_key"
    with pytest.raises(NotFound):
        await alice.create_session(model="gpt-unknown")
    with pytest.raises(NotFound):
        await alice.run_turn("ses_" + "b" * 32, [user("hi")]).result()


async def test_missing_and_unknown_tool_results(alice: AsyncClient) -> None:
    session = await alice.create_session()
    call = Message(role=Role.ASSISTANT, reasoning_content="r", tool_calls=(CALL,))
    await alice.run_turn(session.id, [system("s", tools=[WEATHER]), user("?"), call]).result()
    with pytest.raises(FailedPrecondition) as caught:
        await alice.run_turn(session.id, [user("never mind")]).result()
    assert caught.value.reason == "MISSING_TOOL_RESULTS"
    assert "c1" in caught.value.metadata["tool_call_ids"]
    with pytest.raises(FailedPrecondition) as caught:
        await alice.run_turn(session.id, [Message(role=Role.TOOL, tool_call_id="c9", content="x")]).result()
    assert caught.value.reason == "UNKNOWN_TOOL_CALL_ID"
    assert (await alice.get_session(session.id)).head == 1
    await alice.run_turn(session.id, [tool_result(CALL, "sun")], sampling=SHORT).result()


async def test_concurrent_turns_one_wins(alice: AsyncClient) -> None:
    session = await alice.create_session()
    long = Sampling(max_output_tokens=60, temperature=0.0)

    async def turn(number: int) -> str:
        client_error: SeamountError
        try:
            await alice.run_turn(session.id, [user(f"number {number}")], sampling=long, expected_head=0).result()
            return "committed"
        except SeamountError as error:
            client_error = error
        assert isinstance(client_error, Aborted)
        return client_error.reason

    outcomes = await asyncio.gather(*(turn(number) for number in range(6)))
    assert outcomes.count("committed") == 1
    assert set(outcomes) <= {"committed", "HEAD_MOVED", "TURN_IN_PROGRESS"}
    assert (await alice.get_session(session.id)).head == 1


async def test_a_retry_while_running_attaches(alice: AsyncClient) -> None:
    session = await alice.create_session()
    long = Sampling(max_output_tokens=60, temperature=0.0)
    streams = [alice.run_turn(session.id, [user("go")], sampling=long, idempotency_key="same") for _ in range(4)]

    async def collect(stream: TurnStream) -> list[events_pb2.TurnEvent]:
        return [event async for event in stream]

    seen = await asyncio.gather(*map(collect, streams))
    assert all(events == seen[0] for events in seen)
    assert (await alice.get_session(session.id)).head == 1


async def test_cancel_leaves_the_head_and_frees_the_session(alice: AsyncClient) -> None:
    session = await alice.create_session()
    stream = alice.run_turn(session.id, [user("go")], sampling=Sampling(max_output_tokens=2000, temperature=0.0))
    async for event in stream:
        if event.WhichOneof("event") == "reasoning_delta":
            break
    assert await alice.cancel_turn(session.id) is True
    turn = await stream.result()
    assert turn.finish_reason == common_pb2.FINISH_REASON_CANCELLED
    state = await alice.get_session(session.id)
    assert (state.head, state.state) == (0, session_pb2.SESSION_STATE_IDLE)
    assert await alice.cancel_turn(session.id) is False


async def test_a_client_that_goes_away_does_not_end_its_turn(alice: AsyncClient) -> None:
    session = await alice.create_session()
    sampling = Sampling(max_output_tokens=30, temperature=0.0)
    stream = alice.run_turn(session.id, [user("go")], sampling=sampling, idempotency_key="k")
    async for _ in stream:
        break
    await stream.aclose()
    again = await alice.run_turn(session.id, [user("go")], sampling=sampling, idempotency_key="k").result()
    assert again.usage.num_output_tokens == 30
    assert (await alice.get_session(session.id)).head == 1


async def test_a_stateless_generate_ends_with_its_call(
    cluster: LocalCluster, alice: AsyncClient, pages_are_back: PagesAreBack
) -> None:
    stream = alice.generate([user("go")], sampling=Sampling(max_output_tokens=3000, temperature=0.0))
    async for event in stream:
        if event.WhichOneof("event") == "reasoning_delta":
            break
    await stream.aclose()
    async with AsyncClient(cluster.address, api_key=ADMIN_KEY) as root:
        await pages_are_back(root)


async def test_redis_down_is_unavailable_and_the_session_intact_afterwards(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    with RedisServer() as server:
        url = server.start(tmp_path / "redis")
        async with (
            start_cluster({"placement": {"path": "local"}, "redis": {"timeout_s": 0.3}}, redis_url=url) as cluster,
            AsyncClient(cluster.address, retries=Retries(max_attempts=1), timeout_s=20) as client,
        ):
            session = await client.create_session()
            await client.run_turn(session.id, [user("one")], sampling=SHORT).result()
            os.kill(server.pid, signal.SIGSTOP)
            try:
                with pytest.raises(Unavailable) as caught:
                    await client.run_turn(session.id, [user("two")], sampling=SHORT, idempotency_key="two").result()
                assert caught.value.retry_after_s is not None
            finally:
                os.kill(server.pid, signal.SIGCONT)
            retried = await until_taken(client, session.id)
            assert retried.usage.num_output_tokens == 8
            history = await client.get_history(session.id)
            assert [m.content for m in history.messages if m.role is Role.USER] == ["one", "two"]


async def until_taken(client: AsyncClient, session_id: str) -> object:
    for _ in range(50):
        try:
            return await client.run_turn(session_id, [user("two")], sampling=SHORT, idempotency_key="two").result()
        except (Unavailable, Aborted):
            await asyncio.sleep(0.2)
    raise AssertionError("the session did not come back")
