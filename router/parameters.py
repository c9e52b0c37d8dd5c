"""Sampling parameters: checked once, then resolved so that nothing is left open.

Precedence: the turn's own, the session's defaults, the deployment's. A turn stores the resolved form at its beginning,
so that whoever continues it draws the same tokens.
"""

from __future__ import annotations

import secrets

from seamount.router.spec import SamplingDefaults
from seamount.v1 import common_pb2, worker_pb2
from seamount.wire import limits
from seamount.wire.errors import InvalidArgument

_SCALARS = ("temperature", "top_p", "top_k", "seed", "max_output_tokens", "num_logprobs")


def check_sampling(sampling: common_pb2.SamplingParameters, *, field: str, vocab_size: int) -> None:
    """Raise ``InvalidArgument`` naming the first parameter out of its range (NaN and infinities always are)."""
    if sampling.HasField("temperature"):
        limits.check_range(sampling.temperature, field=f"{field}.temperature", low=0, high=limits.MAX_TEMPERATURE)
    if sampling.HasField("top_p"):
        limits.check_range(sampling.top_p, field=f"{field}.top_p", low=0, low_open=True, high=1)
    if sampling.HasField("top_k"):
        limits.check_range(sampling.top_k, field=f"{field}.top_k", low=0, high=limits.MAX_TOP_K)
    if sampling.HasField("max_output_tokens"):
        limits.check_range(
            sampling.max_output_tokens, field=f"{field}.max_output_tokens", low=1, high=limits.MAX_OUTPUT_TOKENS
        )
    if sampling.HasField("num_logprobs"):
        limits.check_range(sampling.num_logprobs, field=f"{field}.num_logprobs", low=0, high=limits.MAX_LOGPROBS)
    limits.check_length(sampling.stop_strings, field=f"{field}.stop_strings", high=limits.MAX_STOP_STRINGS)
    for index, text in enumerate(sampling.stop_strings):
        limits.check_length(
            text.encode(),
            field=f"{field}.stop_strings[{index}]",
            low=1,
            high=limits.MAX_STOP_STRING_BYTES,
            unit="bytes",
        )
    limits.check_length(sampling.stop_token_ids, field=f"{field}.stop_token_ids", high=limits.MAX_STOP_TOKEN_IDS)
    for index, token_id in enumerate(sampling.stop_token_ids):
        limits.check_range(token_id, field=f"{field}.stop_token_ids[{index}]", low=0, high=vocab_size - 1)


def resolve(
    turn: common_pb2.SamplingParameters, session: common_pb2.SamplingParameters, deployment: SamplingDefaults
) -> common_pb2.SamplingParameters:
    """Every scalar set (``num_logprobs`` only where asked for); a seed is drawn where nobody names one."""
    resolved = common_pb2.SamplingParameters(
        temperature=deployment.temperature,
        top_p=deployment.top_p,
        top_k=deployment.top_k,
        max_output_tokens=deployment.max_output_tokens,
    )
    for layer in (session, turn):
        for name in _SCALARS:
            if layer.HasField(name):
                setattr(resolved, name, getattr(layer, name))
        for name in ("stop_strings", "stop_token_ids"):
            if values := getattr(layer, name):
                resolved.ClearField(name)
                getattr(resolved, name).extend(values)
    if not resolved.HasField("seed"):
        resolved.seed = secrets.randbits(63)
    return resolved


def fit_context(
    resolved: common_pb2.SamplingParameters, *, num_prompt_tokens: int, max_context_tokens: int
) -> worker_pb2.ResolvedSampling:
    """What the rank is told, with the output bounded by what is left of the context.

    Raises ``InvalidArgument`` with both counts where the prompt leaves no room for one token.
    """
    room = max_context_tokens - num_prompt_tokens
    if room < 1:
        raise InvalidArgument(
            f"the context has {num_prompt_tokens} tokens with these messages; at most {max_context_tokens - 1} leave "
            "room for an answer: shorten the messages, give the session a context policy, or start a new session",
            field="messages",
            reason="CONTEXT_LENGTH_EXCEEDED",
            metadata={"num_prompt_tokens": str(num_prompt_tokens), "max_context_tokens": str(max_context_tokens)},
        )
    return worker_pb2.ResolvedSampling(
        temperature=resolved.temperature,
        top_p=resolved.top_p,
        top_k=resolved.top_k,
        seed=resolved.seed,
        max_output_tokens=min(resolved.max_output_tokens, room),
        stop_token_ids=resolved.stop_token_ids,
        num_logprobs=resolved.num_logprobs if resolved.HasField("num_logprobs") else -1,
    )
