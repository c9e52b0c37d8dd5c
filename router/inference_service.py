"""``InferenceService``: stateless generation, tokenization, models. A ``Generate`` ends with its call."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

import grpc

from seamount.router.account import Account
from seamount.router.claim import Claim
from seamount.router.events import turn_events
from seamount.router.generation import Generation
from seamount.router.messages import (
    ThinkingMode,
    check_turn,
    checked_messages,
    thinking_mode_from_proto,
)
from seamount.router.metrics import RouterMetrics, TokenTimes
from seamount.router.model import ServedModel
from seamount.router.parameters import check_sampling, fit_context, resolve
from seamount.router.parsing import OutputMode
from seamount.router.ranks import Ranks
from seamount.router.rendering import Rendering
from seamount.router.session_service import forced_token_ids
from seamount.router.spec import RouterSpec
from seamount.router.tenants import caller
from seamount.v1 import common_pb2, inference_pb2, inference_pb2_grpc, worker_pb2
from seamount.wire import limits
from seamount.wire.errors import InvalidArgument, SeamountError
from seamount.wire.hashes import tenant_salt
from seamount.wire.ids import Epoch, SessionId, TurnId

Context = grpc.aio.ServicerContext[object, object]
_STATELESS = SessionId("")
_STOP_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    spec: RouterSpec
    model: ServedModel
    ranks: Ranks
    rendering: Rendering
    secret: bytes
    metrics: RouterMetrics
    running: set[TurnId] = field(default_factory=set)
    """Answers in the making."""

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.model.check_name(request.model)
        check_sampling(request.sampling, field="sampling", vocab_size=self.model.vocab_size)
        forced = forced_token_ids(context)
        if forced and not self.spec.allow_forced_tokens:
            raise InvalidArgument("forced token ids are for tests", field="forced_token_ids")
        arrived = time.monotonic()
        deadline = arrived + self._time_s(context)
        prompt, mode = await self._prompt(request)
        sampling = resolve(request.sampling, common_pb2.SamplingParameters(), self.spec.defaults)
        turn_id = TurnId(f"gen_{uuid.uuid4().hex}")
        generation = Generation(
            claim=Claim(
                ranks=self.ranks,
                rules=self.spec.rules,
                session_id=_STATELESS,
                turn_id=turn_id,
                epoch=Epoch(1),
                cache_salt=tenant_salt(self.secret, caller().tenant),
                prompt=prompt,
                account=Account(started=time.monotonic()),
                deadline=deadline,
            ),
            sampling=fit_context(
                sampling, num_prompt_tokens=len(prompt), max_context_tokens=self.spec.max_context_tokens
            ),
            max_attempts=self.spec.max_attempts,
            eos_token_id=self.model.tokenizer.eos_token_id,
            forced_token_ids=forced,
        )
        self.running.add(turn_id)
        try:
            times = TokenTimes(metrics=self.metrics, account=generation.account, arrived=arrived)
            with self.metrics.streams.track_inprogress():
                async with aclosing(self._answer(generation, turn_id, mode, sampling, times)) as responses:
                    async for response in responses:
                        yield response
        except SeamountError as error:
            self.metrics.failed(error)
            raise
        finally:
            self.running.discard(turn_id)
            self.metrics.answered(generation.account, num_prompt=len(prompt), num_output=len(generation.token_ids))
            await generation.release(None)

    async def stop(self, grace_s: float) -> None:
        """Let the answers in the making end for ``grace_s``."""
        until = time.monotonic() + grace_s
        while self.running and time.monotonic() < until:  # noqa: ASYNC110 - they end in many places
            await asyncio.sleep(_STOP_POLL_S)

    def _time_s(self, context: Context) -> float:
        """The call's own deadline, at most a turn's."""
        remaining_s = context.time_remaining()
        return self.spec.turn_deadline_s if remaining_s is None else min(remaining_s, self.spec.turn_deadline_s)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        self.model.check_name(request.model)
        match request.WhichOneof("input"):
            case "messages":
                token_ids = await self._rendered(request.messages)
            case "text":
                text = request.text
                limits.check_length(text.encode(), field="text", high=limits.MAX_CONTENT_BYTES, unit="bytes")
                token_ids = await self.rendering.run(len(text), lambda: self.model.tokenizer.encode(text))
            case _:
                raise InvalidArgument("input is missing; send messages or text", field="input")
        return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        model = self.model
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.Model(
                    id=model.name,
                    max_context_tokens=model.max_context_tokens,
                    vocab_size=model.vocab_size,
                    fingerprint=model.fingerprint,
                )
            ]
        )

    async def _prompt(self, request: inference_pb2.GenerateRequest) -> tuple[list[int], OutputMode]:
        match request.WhichOneof("prompt"):
            case "messages":
                mode = OutputMode.of(thinking_mode_from_proto(request.messages.thinking_mode))
                return await self._rendered(request.messages, generates=True), mode
            case "token_ids":
                token_ids = list(request.token_ids.token_ids)
                limits.check_length(token_ids, field="token_ids", low=1, high=limits.MAX_CONTEXT_TOKENS, unit="tokens")
                highest = max(token_ids)
                limits.check_range(highest, field="token_ids", low=0, high=self.model.vocab_size - 1)
                return token_ids, OutputMode.RAW
            case _:
                raise InvalidArgument("prompt is missing; send messages or token_ids", field="prompt")

    async def _rendered(self, conversation: inference_pb2.Messages, *, generates: bool = False) -> list[int]:
        mode: ThinkingMode = thinking_mode_from_proto(conversation.thinking_mode)
        num_bytes = conversation.ByteSize()
        messages = await self.rendering.run(num_bytes, lambda: checked_messages(conversation.messages))
        plan = check_turn((), messages)
        if generates and not plan.generates:
            raise InvalidArgument(
                "the last message is the assistant's, so there is nothing to answer; end with a user's, a developer's "
                "or a tool's",
                field="messages",
            )
        return await self.rendering.prompt((), messages, mode, num_bytes=num_bytes)

    async def _answer(
        self,
        generation: Generation,
        turn_id: TurnId,
        mode: OutputMode,
        sampling: common_pb2.SamplingParameters,
        times: TokenTimes,
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        events = turn_events(turn_id, mode, sampling, self.model.tokenizer)
        num_prompt = len(generation.prompt)
        started = events.started(session_id="", model=self.model.name, num_prompt_tokens=num_prompt, seed=sampling.seed)
        yield inference_pb2.GenerateResponse(events=[started])
        reason = common_pb2.FINISH_REASON_LENGTH
        async with aclosing(generation.batches()) as batches:
            async for batch in batches:
                if isinstance(batch, worker_pb2.GenerateFinished):
                    reason = batch.reason
                    break
                times.tokens(len(batch.token_ids))
                yield inference_pb2.GenerateResponse(
                    events=events.tokens(batch.token_ids, batch.logprobs), token_ids=batch.token_ids
                )
                if events.output_is_over:
                    break
        told, output = events.output_ended(reason)
        usage = generation.account.usage(output, num_prompt=num_prompt)
        receipt = generation.account.receipt(num_prompt=num_prompt, num_output=output.num_tokens)
        yield inference_pb2.GenerateResponse(events=[*told, *events.finished(output.reason, usage, receipt)])
