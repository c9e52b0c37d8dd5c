"""Sampling parameters: bounds on both sides, precedence, the context's end."""

from __future__ import annotations

import math

import pytest

from seamount.router.parameters import check_sampling, fit_context, resolve
from seamount.router.spec import SamplingDefaults
from seamount.v1.common_pb2 import SamplingParameters
from seamount.wire import limits
from seamount.wire.errors import InvalidArgument


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", [0.0, limits.MAX_TEMPERATURE], [-0.01, limits.MAX_TEMPERATURE + 0.01, math.nan, math.inf]),
        ("top_p", [1e-9, 1.0], [0.0, -1.0, 1.0001, math.nan]),
        ("top_k", [0, limits.MAX_TOP_K], [-1, limits.MAX_TOP_K + 1]),
        ("max_output_tokens", [1, limits.MAX_OUTPUT_TOKENS], [0, -1, limits.MAX_OUTPUT_TOKENS + 1]),
        ("num_logprobs", [0, limits.MAX_LOGPROBS], [-1, limits.MAX_LOGPROBS + 1]),
    ],
)
def test_scalar_bounds(name: str, good: list[float], bad: list[float]) -> None:
    for value in good:
        check_sampling(SamplingParameters(**{name: value}), field="sampling", vocab_size=10)
    for value in bad:
        with pytest.raises(InvalidArgument, match=f"sampling.{name}") as caught:
            check_sampling(SamplingParameters(**{name: value}), field="sampling", vocab_size=10)
        assert caught.value.field == f"sampling.{name}"


def test_stop_bounds() -> None:
    def check(**values: object) -> None:
        check_sampling(SamplingParameters(**values), field="sampling", vocab_size=10)  # type: ignore[arg-type]

    check(stop_strings=["x" * limits.MAX_STOP_STRING_BYTES] * limits.MAX_STOP_STRINGS, stop_token_ids=[0, 9])
    for values, field in [
        ({"stop_strings": ["x"] * (limits.MAX_STOP_STRINGS + 1)}, "sampling.stop_strings"),
        ({"stop_strings": ["ok", "x" * (limits.MAX_STOP_STRING_BYTES + 1)]}, "sampling.stop_strings[1]"),
        ({"stop_strings": [""]}, "sampling.stop_strings[0]"),
        ({"stop_token_ids": [10]}, "sampling.stop_token_ids[0]"),
        ({"stop_token_ids": [1] * (limits.MAX_STOP_TOKEN_IDS + 1)}, "sampling.stop_token_ids"),
    ]:
        with pytest.raises(InvalidArgument) as caught:
            check(**values)
        assert caught.value.field == field


def test_precedence_turn_over_session_over_deployment() -> None:
    resolved = resolve(
        SamplingParameters(temperature=0.0, stop_strings=["a"]),
        SamplingParameters(temperature=1.5, top_p=0.5, stop_strings=["b", "c"], seed=7),
        SamplingDefaults(top_k=3, max_output_tokens=11),
    )
    assert (resolved.temperature, resolved.top_p, resolved.top_k) == (0.0, 0.5, 3)
    assert (resolved.max_output_tokens, resolved.seed, list(resolved.stop_strings)) == (11, 7, ["a"])
    assert not resolved.HasField("num_logprobs")


def test_a_seed_is_drawn_where_nobody_names_one() -> None:
    empty = SamplingParameters()
    seeds = {resolve(empty, empty, SamplingDefaults()).seed for _ in range(8)}
    assert len(seeds) == 8


def test_the_context_bounds_the_output() -> None:
    resolved = resolve(SamplingParameters(), SamplingParameters(), SamplingDefaults(max_output_tokens=100))
    assert fit_context(resolved, num_prompt_tokens=10, max_context_tokens=1000).max_output_tokens == 100
    assert fit_context(resolved, num_prompt_tokens=990, max_context_tokens=1000).max_output_tokens == 10
    assert fit_context(resolved, num_prompt_tokens=999, max_context_tokens=1000).max_output_tokens == 1
    with pytest.raises(InvalidArgument, match="1000 tokens") as caught:
        fit_context(resolved, num_prompt_tokens=1000, max_context_tokens=1000)
    assert caught.value.metadata == {"num_prompt_tokens": "1000", "max_context_tokens": "1000"}
