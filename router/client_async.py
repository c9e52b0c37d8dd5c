"""``AsyncClient``: typed calls of a router, each with a deadline, repeated where that is safe."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import grpc

from seamount.router.client_turn import Frame, Retries, TurnStream
from seamount.router.messages import (
    Message,
    Role,
    ThinkingMode,
    Tool,
    ToolCall,
    message_to_proto,
    messages_from_proto,
)
from seamount.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    common_pb2,
    events_pb2,
    inference_pb2,
    inference_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    worker_pb2,
)
from seamount.wire import limits
from seamount.wire.credentials import bearer, channel_credentials
from seamount.wire.durations import duration
from seamount.wire.errors import SeamountError, Unavailable, from_rpc_error

CONNECT_TIMEOUT_S = 1.0
DEFAULT_TIMEOUT_S = 10.0
"""Of a call that answers once."""
DEFAULT_STREAM_TIMEOUT_S = 900.0
"""Of a stream whose turn names no deadline of its own."""
_STREAM_SLACK_S = 5.0

Response = TypeVar("Response")
Request = TypeVar("Request")
Request_contra = TypeVar("Request_contra", contravariant=True)
Response_co = TypeVar("Response_co", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What is None or empty takes the session's, then the deployment's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_output_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None

    def to_proto(self) -> common_pb2.SamplingParameters:
        return common_pb2.SamplingParameters(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            max_output_tokens=self.max_output_tokens,
            stop_strings=self.stop_strings,
            stop_token_ids=self.stop_token_ids,
            num_logprobs=self.num_logprobs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """ca_file: PEM authorities that sign the router's certificate (None = the usual ones); the pair: for mutual TLS."""

    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """A session with everything said in it. receipts: one a turn that generated."""

    session: session_pb2.Session
    messages: tuple[Message, ...]
    receipts: tuple[events_pb2.Receipt, ...]


def user(text: str) -> Message:
    return Message(role=Role.USER, content=text)


def system(text: str, *, tools: Sequence[Tool] = (), response_format_json: str = "") -> Message:
    return Message(role=Role.SYSTEM, content=text, tools=tuple(tools), response_format_json=response_format_json)


def tool_result(call: ToolCall, content: str) -> Message:
    """The answer to a call that the model made."""
    return Message(role=Role.TOOL, content=content, tool_call_id=call.id)


class _Method(Protocol[Request_contra, Response_co]):
    def __call__(
        self, request: Request_contra, /, *, timeout: float, metadata: Sequence[tuple[str, str]]
    ) -> Awaitable[Response_co]: ...


class AsyncClient:
    """Belongs to one event loop. Close it, or use it in ``async with``.

    address: host:port of a router. api_key: None where the deployment has no key file. tls: None = plain text.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: Retries | None = None,
    ) -> None:
        self.address = address
        self._metadata = bearer(api_key)
        self._timeout_s = timeout_s
        self._retries = retries or Retries()
        self._channel = _channel(address, tls)
        self._sessions = session_pb2_grpc.SessionServiceStub(self._channel)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End every call and the connection."""
        await self._channel.close()

    # --- sessions

    async def create_session(
        self,
        *,
        model: str = "",
        thinking_mode: ThinkingMode = ThinkingMode.THINKING,
        defaults: Sampling | None = None,
        idempotency_key: str | None = None,
    ) -> session_pb2.Session:
        """A new session, or the one that this key made before. model: empty = the deployment's."""
        request = session_pb2.CreateSessionRequest(
            idempotency_key=_key(idempotency_key),
            model=model,
            thinking_mode=common_pb2.ThinkingMode.Name(thinking_mode.value),
            defaults=_proto(defaults),
        )
        return (await self._call(self._sessions.CreateSession, request)).session

    async def get_session(self, session_id: str) -> session_pb2.Session:
        """Raises ``NotFound``, also for another tenant's session."""
        request = session_pb2.GetSessionRequest(session_id=session_id)
        return (await self._call(self._sessions.GetSession, request)).session

    async def get_history(self, session_id: str) -> History:
        """The session with the messages of every committed turn. Raises as ``get_session`` does."""
        request = session_pb2.GetSessionRequest(session_id=session_id, include_messages=True)
        answer = await self._call(self._sessions.GetSession, request)
        return History(
            session=answer.session, messages=messages_from_proto(answer.messages), receipts=tuple(answer.receipts)
        )

    async def list_sessions(self, *, page_size: int = 0, page_token: str = "") -> tuple[list[session_pb2.Session], str]:
        """One page and the token of the next one (empty at the end). page_size: 0 = the server's choice."""
        request = session_pb2.ListSessionsRequest(page_size=page_size, page_token=page_token)
        answer = await self._call(self._sessions.ListSessions, request)
        return list(answer.sessions), answer.next_page_token

    async def delete_session(self, session_id: str) -> None:
        """Repeating it is harmless."""
        await self._call(self._sessions.DeleteSession, session_pb2.DeleteSessionRequest(session_id=session_id))

    def run_turn(
        self,
        session_id: str,
        messages: Sequence[Message],
        *,
        sampling: Sampling | None = None,
        expected_head: int | None = None,
        deadline_s: float | None = None,
        idempotency_key: str | None = None,
    ) -> TurnStream:
        """Append messages and, unless the last one is the assistant's, generate the answer.

        deadline_s: of the turn, on the server; None = the deployment's. idempotency_key: the same one again, with the
        same messages, gets the first result; None = a fresh one for this stream and its own retries.
        """
        request = session_pb2.RunTurnRequest(
            session_id=session_id,
            idempotency_key=_key(idempotency_key),
            messages=[message_to_proto(message) for message in messages],
            sampling=_proto(sampling),
            expected_head=expected_head,
        )
        timeout_s = DEFAULT_STREAM_TIMEOUT_S
        if deadline_s is not None:
            request.deadline.CopyFrom(duration(deadline_s))
            timeout_s = deadline_s + _STREAM_SLACK_S

        async def frames() -> AsyncGenerator[Frame, None]:
            call = self._sessions.RunTurn(request, metadata=self._metadata, timeout=timeout_s)
            async with aclosing(self._answers(call)) as answers:
                async for answer in answers:
                    yield answer.events, ()

        return TurnStream(frames, self._retries)

    async def cancel_turn(self, session_id: str, turn_id: str = "") -> bool:
        """Whether such a turn was running. turn_id: empty = whichever runs, and then not retried."""
        request = session_pb2.CancelTurnRequest(session_id=session_id, turn_id=turn_id)
        answer = await self._call(self._sessions.CancelTurn, request, repeatable=bool(turn_id))
        return answer.cancelled

    # --- stateless

    def generate(
        self,
        prompt: Sequence[Message] | Sequence[int],
        *,
        model: str = "",
        thinking_mode: ThinkingMode = ThinkingMode.THINKING,
        sampling: Sampling | None = None,
        timeout_s: float = DEFAULT_STREAM_TIMEOUT_S,
    ) -> TurnStream:
        """Answer messages, or continue token ids, without a session. Never retried; ends with its stream."""
        request = inference_pb2.GenerateRequest(model=model, sampling=_proto(sampling))
        if prompt and all(isinstance(part, int) for part in prompt):
            request.token_ids.token_ids.extend(part for part in prompt if isinstance(part, int))
        else:
            request.messages.CopyFrom(_messages(prompt, thinking_mode))

        async def frames() -> AsyncGenerator[Frame, None]:
            call = self._inference.Generate(request, metadata=self._metadata, timeout=timeout_s)
            async with aclosing(self._answers(call)) as answers:
                async for answer in answers:
                    yield answer.events, answer.token_ids

        return TurnStream(frames, Retries(max_attempts=1))

    async def tokenize(
        self,
        text: str | Sequence[Message],
        *,
        model: str = "",
        thinking_mode: ThinkingMode = ThinkingMode.THINKING,
    ) -> list[int]:
        """Ids of plain text (control literals in it stay text), or of messages as the model would see them."""
        request = inference_pb2.TokenizeRequest(model=model)
        if isinstance(text, str):
            request.text = text
        else:
            request.messages.CopyFrom(_messages(text, thinking_mode))
        return list((await self._call(self._inference.Tokenize, request)).token_ids)

    async def list_models(self) -> list[inference_pb2.Model]:
        return list((await self._call(self._inference.ListModels, inference_pb2.ListModelsRequest())).models)

    # --- operators

    async def list_pools(self) -> list[admin_pb2.PoolState]:
        return list((await self._call(self._admin.ListPools, admin_pb2.ListPoolsRequest())).pools)

    async def list_ranks(self, pool: worker_pb2.Pool = worker_pb2.POOL_UNSPECIFIED) -> list[admin_pb2.Rank]:
        """pool: unspecified = all."""
        return list((await self._call(self._admin.ListRanks, admin_pb2.ListRanksRequest(pool=pool))).ranks)

    async def list_rank_sessions(self, rank_id: str) -> list[str]:
        request = admin_pb2.ListRankSessionsRequest(rank_id=rank_id)
        return list((await self._call(self._admin.ListRankSessions, request)).session_ids)

    # --- calls

    async def _call(self, method: _Method[Request, Response], request: Request, *, repeatable: bool = True) -> Response:
        attempt = 1
        while True:
            try:
                await self._connect()
                return await method(request, timeout=self._timeout_s, metadata=self._metadata)
            except grpc.RpcError as error:
                failure: SeamountError = from_rpc_error(error)
            except Unavailable as error:
                failure = error
            delay_s = self._retries.delay_s(failure, attempt) if repeatable else None
            if delay_s is None:
                raise failure
            attempt += 1
            await asyncio.sleep(delay_s)

    async def _answers(self, call: grpc.aio.UnaryStreamCall[Any, Response]) -> AsyncGenerator[Response, None]:
        try:
            await self._connect()
            async for answer in call:
                yield answer
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()

    async def _connect(self) -> None:
        """A router that hangs still accepts connections for a while: so many seconds, then another is worth a try."""
        if self._channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY:
            return
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._channel.channel_ready()
        except TimeoutError:
            raise Unavailable(
                f"no connection to {self.address} within {CONNECT_TIMEOUT_S:g} s: is a router running there?",
                reason="NO_CONNECTION",
                retry_after_s=0.1,
            ) from None


def _channel(address: str, tls: Tls | None) -> grpc.aio.Channel:
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", -1),  # a long history may be larger than any one request
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    credentials = channel_credentials(tls.ca_file, certificate_file=tls.certificate_file, key_file=tls.key_file)
    return grpc.aio.secure_channel(address, credentials, options=options)


def _key(given: str | None) -> str:
    return uuid.uuid4().hex if given is None else given


def _proto(sampling: Sampling | None) -> common_pb2.SamplingParameters | None:
    return None if sampling is None else sampling.to_proto()


def _messages(messages: Sequence[Any], thinking_mode: ThinkingMode) -> inference_pb2.Messages:
    return inference_pb2.Messages(
        messages=[message_to_proto(message) for message in messages],
        thinking_mode=common_pb2.ThinkingMode.Name(thinking_mode.value),
    )
