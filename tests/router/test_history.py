from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.router.encoding import RunEncoder, Runs, render
from seamount.router.history import History, pending_after, sampled_message, session_fingerprint
from seamount.router.messages import (
    ASKING_ROLES,
    Message,
    Role,
    ThinkingMode,
    ToolCall,
    check_turn,
    message_to_proto,
    tool_calls_to_proto,
)
from seamount.router.parsing import OutputMode, ParsedOutput, TurnParser
from seamount.router.tokenizer import Control, Tokenizer
from seamount.v1 import common_pb2, record_pb2

CHAT, THINKING = ThinkingMode.CHAT, ThinkingMode.THINKING
FINGERPRINT = "here"
USER = Message(role=Role.USER, content="hello")
CALL_TEXT = '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'


def parse(tokenizer: Tokenizer, ids: Sequence[int], mode: ThinkingMode, **options: Any) -> ParsedOutput:
    parser = TurnParser(tokenizer, OutputMode.of(mode), call_id_prefix="call_", **options)
    for token_id in ids:
        parser.feed(token_id)
    return parser.finish(common_pb2.FINISH_REASON_LENGTH)[1]


def turn(
    tokenizer: Tokenizer,
    turn_id: str,
    messages: Sequence[Message],
    sampled: Sequence[int] | None,
    mode: ThinkingMode = THINKING,
    *,
    pending: Sequence[ToolCall] = (),
    fingerprint: str = FINGERPRINT,
    **options: Any,
) -> record_pb2.TurnRecord:
    """The record of a turn whose sampled ids were ``sampled``."""
    plan = check_turn(pending, messages)
    assert plan.generates == (sampled is not None)
    output = None if sampled is None else parse(tokenizer, sampled, mode, **options)
    record = record_pb2.TurnRecord(
        turn_id=turn_id,
        input=[message_to_proto(message) for message in messages],
        fingerprint=fingerprint,
        pending_tool_calls=tool_calls_to_proto(pending_after(plan, output)),
    )
    if output is not None:
        assert sampled is not None
        record.output.CopyFrom(sampled_message(sampled, output, tokenizer))
    return record


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """``text`` as the model might have sampled it, and the tokenizer would not: one id a byte."""
    ids = [tokenizer.encode_bytes(bytes([byte]) + b"\xff")[0] for byte in text.encode()]
    assert ids != tokenizer.encode(text)
    return ids


def contains(whole: Sequence[int], part: Sequence[int]) -> bool:
    return any(list(whole[i : i + len(part)]) == list(part) for i in range(len(whole) - len(part) + 1))


def template(tokenizer: Tokenizer, text: str) -> list[int]:
    runs = Runs()
    runs.template(text)
    return list(RunEncoder(tokenizer).encode(runs.pieces()))


@pytest.fixture
def history(tokenizer: Tokenizer) -> History:
    return History(tokenizer, FINGERPRINT)


def test_sampled_ids_reappear_unchanged(history: History, tokenizer: Tokenizer) -> None:
    end_think, eos = tokenizer.control_id(Control.END_THINK), tokenizer.eos_token_id
    sampled = [*letters(tokenizer, "the hello"), end_think, *letters(tokenizer, "hell on"), eos]
    record = turn(tokenizer, "t1", [USER], sampled)
    assert list(record.output.token_ids) == sampled
    assert not record.output.synthetic_token_ids
    prompt = history.prompt([record], [USER], THINKING).token_ids
    assert prompt == template(tokenizer, "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>") + sampled[
        sampled.index(end_think) + 1 :
    ] + template(tokenizer, "<｜User｜>hello<｜Assistant｜><think>")


def test_reasoning_ids_are_kept_for_tool_results(history: History, tokenizer: Tokenizer) -> None:
    end_think, eos = tokenizer.control_id(Control.END_THINK), tokenizer.eos_token_id
    sampled = [*letters(tokenizer, "the on"), end_think, *template(tokenizer, CALL_TEXT), eos]
    first = turn(tokenizer, "t1", [USER], sampled)
    assert [call.id for call in first.pending_tool_calls] == ["call_0"]
    result = Message(role=Role.TOOL, tool_call_id="call_0", content="hello")
    results = "\n\n<function_results>\n<result>hello</result>\n</function_results>\n\n"
    opening = "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜>"
    prompt = history.prompt([first], [result], THINKING)
    kept = template(tokenizer, opening + "<think>") + sampled + template(tokenizer, results + "<think>")
    assert prompt.token_ids == kept
    assert prompt.num_reencoded_turns == 0
    assert history.num_context_tokens([first], THINKING) == len(template(tokenizer, opening + "<think>")) + len(sampled)
    answer = [*letters(tokenizer, "in"), end_think, *letters(tokenizer, "re"), eos]
    second = turn(tokenizer, "t2", [result], answer, pending=[ToolCall(id="call_0", name="f", arguments_json="{}")])
    cut = sampled.index(end_think) + 1
    later = history.prompt([first, second], [USER], THINKING).token_ids
    assert later == (
        template(tokenizer, opening + "</think>")
        + sampled[cut:]
        + template(tokenizer, results + "</think>")
        + answer[answer.index(end_think) + 1 :]
        + template(tokenizer, "<｜User｜>hello<｜Assistant｜><think>")
    )
    assert history.num_context_tokens([first, second], THINKING) == len(later) - len(
        template(tokenizer, "<｜User｜>hello<｜Assistant｜><think>")
    )


def test_chat_mode_keeps_all_ids(history: History, tokenizer: Tokenizer) -> None:
    sampled = [*letters(tokenizer, "the"), tokenizer.control_id(Control.END_THINK), *letters(tokenizer, "on")]
    record = turn(tokenizer, "t1", [USER], [*sampled, tokenizer.eos_token_id], CHAT)
    assert contains(history.prompt([record], [USER], CHAT).token_ids, sampled)


@pytest.mark.parametrize(
    ("text", "synthetic", "after_cut"),
    [
        ("thought", "</think><｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        ("thought</think>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        ("thought</think>a", "<｜end▁of▁sentence｜>", "a<｜end▁of▁sentence｜>"),
        ("thought<｜end▁of▁sentence｜>", "", "<｜end▁of▁sentence｜>"),
        ("", "</think><｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    ],
)
def test_an_unfinished_message_is_closed(
    text: str, synthetic: str, after_cut: str, history: History, tokenizer: Tokenizer
) -> None:
    record = turn(tokenizer, "t1", [USER], template(tokenizer, text))
    assert list(record.output.token_ids) == template(tokenizer, text)
    assert list(record.output.synthetic_token_ids) == template(tokenizer, synthetic)
    prompt = tokenizer.decode(history.prompt([record], [USER], THINKING).token_ids)
    assert f"<｜Assistant｜></think>{after_cut}<｜User｜>" in prompt


def test_the_text_before_a_stop_string_stays_in_the_prompt(history: History, tokenizer: Tokenizer) -> None:
    (hello,) = tokenizer.encode("hello")
    record = turn(tokenizer, "t1", [USER], [*tokenizer.encode("12"), hello, hello], CHAT, stop_strings=["lo"])
    assert record.output.message.content == "12hel"
    assert list(record.output.token_ids) == tokenizer.encode("12")
    assert tokenizer.decode(record.output.synthetic_token_ids) == "hel<｜end▁of▁sentence｜>"
    assert "</think>12hel<｜end▁of▁sentence｜><｜User｜>" in tokenizer.decode(
        history.prompt([record], [USER], CHAT).token_ids
    )


def test_a_stop_string_inside_a_thought_is_cut_with_it(history: History, tokenizer: Tokenizer) -> None:
    (hello,) = tokenizer.encode("hello")
    record = turn(tokenizer, "t1", [USER], [*tokenizer.encode("12"), hello], stop_strings=["lo"])
    assert record.output.message.reasoning_content == "12hel"
    prompt = tokenizer.decode(history.prompt([record], [USER], THINKING).token_ids)
    assert "<｜Assistant｜></think><｜end▁of▁sentence｜><｜User｜>" in prompt


def test_another_fingerprint_means_encoding_the_text_anew(history: History, tokenizer: Tokenizer) -> None:
    end_think, eos = tokenizer.control_id(Control.END_THINK), tokenizer.eos_token_id
    sampled = [*letters(tokenizer, "the"), end_think, *letters(tokenizer, "hello"), eos]
    stale = turn(tokenizer, "t1", [USER], sampled, fingerprint="elsewhere")
    recorded = turn(tokenizer, "t2", [USER, Message(role=Role.ASSISTANT)], None, fingerprint="elsewhere")
    fresh = turn(tokenizer, "t3", [USER], sampled)
    prompt = history.prompt([stale, recorded, fresh], [USER], THINKING)
    assert prompt.num_reencoded_turns == 1
    question = "<｜User｜>hello<｜Assistant｜></think>"
    start = template(tokenizer, f"<｜begin▁of▁sentence｜>{question}hello<｜end▁of▁sentence｜>")
    assert prompt.token_ids[: len(start)] == start
    assert contains(prompt.token_ids, letters(tokenizer, "hello"))


def test_logprobs_follow_the_kept_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("12STOP")
    logprobs = [common_pb2.TokenLogprobs(sampled=-float(i)) for i in range(len(ids))]
    output = parse(tokenizer, ids, CHAT, stop_strings=["STOP"])
    stored = sampled_message(ids, output, tokenizer, logprobs)
    assert [entry.sampled for entry in stored.logprobs] == [0.0, -1.0]


@settings(max_examples=80, deadline=None)
@given(data=st.data(), mode=st.sampled_from(list(ThinkingMode)), seed=st.integers(0, 1 << 30))
def test_turns_render_like_the_conversation_they_make(
    data: st.DataObject, mode: ThinkingMode, seed: int, strategies: Any, tokenizer: Tokenizer
) -> None:
    """Split a conversation into turns at its assistant messages, each sampled or only recorded: the same prompt."""
    messages: Sequence[Message] = data.draw(strategies.hostile_conversations)
    encoder, history, rng = (
        RunEncoder(tokenizer),
        History(tokenizer, FINGERPRINT, max_cached_ids=200),
        random.Random(seed),
    )
    records: list[record_pb2.TurnRecord] = []
    seen: list[Message] = []
    new: list[Message] = []
    pending: Sequence[ToolCall] = ()
    for message in messages:
        if message.role is not Role.ASSISTANT:
            new.append(message)
            continue
        turn_id = f"t{len(records) % 3}"  # repeated turn ids must not matter
        thinks = mode is THINKING
        if any(m.role in ASKING_ROLES for m in [*seen, *new]) and rng.random() < 0.7:
            prompt = history.prompt(records, new, mode).token_ids
            whole = encoder.encode_messages([*seen, *new], mode)
            assert prompt == whole
            sampled = list(encoder.encode(render([message], mode=mode, begins=False).pieces()))
            record = turn(tokenizer, turn_id, new, sampled, mode, pending=pending)
            del record.output.message.tool_calls[:]
            record.output.message.tool_calls.extend(tool_calls_to_proto(message.tool_calls))
            del record.pending_tool_calls[:]
            record.pending_tool_calls.extend(tool_calls_to_proto(message.tool_calls))
            kept = message if thinks else replace(message, reasoning_content="")
            seen += [*new, kept]
        else:
            record = turn(tokenizer, turn_id, [*new, message], None, mode, pending=pending)
            seen += [*new, message]
        records.append(record)
        new, pending = [], message.tool_calls
    for _ in range(2):
        assert history.prompt(records, new, mode).token_ids == encoder.encode_messages([*seen, *new], mode)
    assert history._num_cached_ids == sum(len(entry.token_ids) for entry in history._turns.values()) <= 200


def test_a_history_of_100_turns_is_quick(tokenizer: Tokenizer) -> None:
    history = History(tokenizer, FINGERPRINT)
    end_think, eos = tokenizer.control_id(Control.END_THINK), tokenizer.eos_token_id
    sampled = [*letters(tokenizer, "thinking " * 20), end_think, *template(tokenizer, CALL_TEXT), eos]
    pending = [ToolCall(id="call_0", name="f", arguments_json="{}")]
    result = Message(role=Role.TOOL, tool_call_id="call_0", content="a result " * 150)
    records = [turn(tokenizer, "t0", [USER], sampled)]
    records += [turn(tokenizer, f"t{i}", [result], sampled, pending=pending) for i in range(1, 100)]
    history.prompt(records, [result], THINKING)
    copies = [record_pb2.TurnRecord.FromString(record.SerializeToString()) for record in records]
    for name, stored in (("the same records", records), ("records read anew", copies)):
        timings = []
        for i in range(20):
            fresh = replace(result, content=f"another result {i}")
            began = time.perf_counter()
            prompt = history.prompt(stored, [fresh], THINKING)
            timings.append((time.perf_counter() - began) * 1e3)
        print(f"{name}: {len(prompt.token_ids)} ids, {sorted(timings)[10]:.2f} ms at p50")
        assert min(timings) < 25


def test_what_is_remembered_serves_the_same_turn_only(history: History, tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_token_id
    for text in ("one", "two"):  # of two sessions
        record = turn(tokenizer, "t1", [USER], [*tokenizer.encode(text), eos], CHAT)
        assert text in tokenizer.decode(history.prompt([record], [USER], CHAT).token_ids)
    calls = [ToolCall(id=f"c{i}", name="f", arguments_json="{}") for i in range(2)]
    results = [Message(role=Role.TOOL, tool_call_id=f"c{i}", content=f"r{i}") for i in range(2)]
    for order in (calls, calls[::-1]):
        asked = turn(tokenizer, "t1", [USER, Message(role=Role.ASSISTANT, tool_calls=tuple(order))], None, CHAT)
        answered = turn(tokenizer, "t2", results, [*tokenizer.encode("ok"), eos], CHAT, pending=order)
        text = tokenizer.decode(history.prompt([asked, answered], [USER], CHAT).token_ids)
        assert (text.index("r0") < text.index("r1")) == (order is calls)


def test_session_fingerprints_differ_by_model(tokenizer: Tokenizer) -> None:
    assert session_fingerprint("a", tokenizer) != session_fingerprint("b", tokenizer)
    assert session_fingerprint("a", tokenizer) == session_fingerprint("a", tokenizer)
