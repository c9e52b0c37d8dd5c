from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.router.deltas import CallArguments, CallFinished, CallStarted, ContentText, ParsedDelta, ReasoningText
from seamount.router.encoding import RunEncoder, Runs, render
from seamount.router.messages import Message, Role, ThinkingMode, ToolCall
from seamount.router.parsing import OutputMode, ParsedOutput, TurnParser
from seamount.router.tokenizer import Control, Tokenizer
from seamount.v1 import common_pb2

LENGTH = common_pb2.FINISH_REASON_LENGTH
STOP = common_pb2.FINISH_REASON_STOP
STOP_SEQUENCE = common_pb2.FINISH_REASON_STOP_SEQUENCE
TOOL_CALLS = common_pb2.FINISH_REASON_TOOL_CALLS
BLOCK = "\n\n<｜DSML｜function_calls>\n"
INVOKE = '<｜DSML｜invoke name="f">\n'
END_INVOKE = "</｜DSML｜invoke>\n"
END_BLOCK = "</｜DSML｜function_calls>"


def parameter(value: str, *, key: str = "k", string: bool = True) -> str:
    return f'<｜DSML｜parameter name="{key}" string="{"true" if string else "false"}">{value}</｜DSML｜parameter>\n'


def ids_of(tokenizer: Tokenizer, template: str) -> list[int]:
    """Control literals in ``template`` become control ids."""
    runs = Runs()
    runs.template(template)
    return list(RunEncoder(tokenizer).encode(runs.pieces()))


def parse(
    tokenizer: Tokenizer,
    token_ids: Iterable[int],
    mode: OutputMode = OutputMode.CHAT,
    *,
    stop_strings: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
) -> tuple[list[ParsedDelta], ParsedOutput]:
    parser = TurnParser(
        tokenizer, mode, call_id_prefix="call_", stop_strings=stop_strings, stop_token_ids=stop_token_ids
    )
    deltas = [delta for token_id in token_ids for delta in parser.feed(token_id)]
    last, output = parser.finish(LENGTH)
    return deltas + last, output


def message_of(deltas: Sequence[ParsedDelta]) -> Message:
    """What a client puts together."""
    text: dict[type, str] = {ReasoningText: "", ContentText: ""}
    calls: dict[int, ToolCall] = {}
    finished = set()
    for delta in deltas:
        if isinstance(delta, ReasoningText | ContentText):
            assert delta.text
            text[type(delta)] += delta.text
        elif isinstance(delta, CallStarted):
            calls[delta.index] = ToolCall(id=delta.id, name=delta.name, arguments_json="")
        elif isinstance(delta, CallArguments):
            assert delta.arguments_json
            assert delta.index not in finished
            call = calls[delta.index]
            calls[delta.index] = replace(call, arguments_json=call.arguments_json + delta.arguments_json)
        else:
            assert isinstance(delta, CallFinished)
            finished.add(delta.index)
    return Message(
        role=Role.ASSISTANT,
        content=text[ContentText],
        reasoning_content=text[ReasoningText],
        tool_calls=tuple(calls[i] for i in sorted(finished)),
    )


def answer_ids(tokenizer: Tokenizer, answer: Message, mode: ThinkingMode) -> list[int]:
    return list(RunEncoder(tokenizer).encode(render([answer], mode=mode, begins=False).pieces()))


def drawn_answer(data: st.DataObject, strategies: Any, mode: ThinkingMode) -> Message:
    drawn: Message = data.draw(strategies.thoughtful_answers if mode is ThinkingMode.THINKING else strategies.answers)
    return drawn


@settings(max_examples=200, deadline=None)
@given(data=st.data(), mode=st.sampled_from(list(ThinkingMode)))
def test_parsing_undoes_rendering(
    data: st.DataObject, mode: ThinkingMode, strategies: Any, tokenizer: Tokenizer
) -> None:
    answer = drawn_answer(data, strategies, mode)
    ids = answer_ids(tokenizer, answer, mode)
    deltas, output = parse(tokenizer, ids, OutputMode.of(mode))
    assert output.message == answer
    assert message_of(deltas) == answer
    assert output.reason == (TOOL_CALLS if answer.tool_calls else STOP)
    assert output.num_tokens == len(ids)
    assert output.incomplete_calls == ()
    assert not output.thought_is_open
    end_think = tokenizer.control_id(Control.END_THINK)
    assert output.num_reasoning_tokens == (ids.index(end_think) if mode is ThinkingMode.THINKING else 0)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), mode=st.sampled_from(list(ThinkingMode)))
def test_any_tokenisation_gives_the_same_message(
    data: st.DataObject, mode: ThinkingMode, strategies: Any, tokenizer: Tokenizer
) -> None:
    answer = drawn_answer(data, strategies, mode)
    single_bytes: list[int] = []
    for token_id in answer_ids(tokenizer, answer, mode):
        if tokenizer.control(token_id) is None:
            # Invalid UTF-8 has no other tokenisation than its bytes: exactly what is needed here.
            single_bytes += (tokenizer.encode_bytes(bytes([b]) + b"\xff")[0] for b in tokenizer.token_bytes(token_id))
        else:
            single_bytes.append(token_id)
    assert parse(tokenizer, single_bytes, OutputMode.of(mode))[1].message == answer


@settings(max_examples=25, deadline=None)
@given(data=st.data(), mode=st.sampled_from(list(ThinkingMode)))
def test_truncation_at_any_token_loses_no_text(
    data: st.DataObject, mode: ThinkingMode, strategies: Any, tokenizer: Tokenizer
) -> None:
    answer = drawn_answer(data, strategies, mode)
    ids = answer_ids(tokenizer, answer, mode)
    whole = parse(tokenizer, ids, OutputMode.of(mode))[0]
    for length in range(len(ids)):
        deltas, output = parse(tokenizer, ids[:length], OutputMode.of(mode))
        message = output.message
        assert message_of(deltas) == message
        assert output.num_tokens == length
        assert output.reason == LENGTH
        assert answer.tool_calls[: len(message.tool_calls)] == message.tool_calls
        # All text is there: what was said before is a prefix, what was not understood is content, markers included.
        seen = tokenizer.decode(ids[:length])
        if not message.tool_calls:
            cut = "</think>" if mode is ThinkingMode.THINKING and not output.thought_is_open else ""
            assert message.reasoning_content + cut + message.content == seen
        else:
            last_end = seen.rindex("</｜DSML｜invoke>") + len("</｜DSML｜invoke>")
            rest = seen[last_end:].lstrip()
            if rest == END_BLOCK:
                rest = ""
            assert message.content == answer.content + rest
    assert message_of(whole) == answer


@settings(max_examples=150, deadline=None)
@given(data=st.data(), mode=st.sampled_from(list(OutputMode)))
def test_any_ids_parse_without_losing_text(data: st.DataObject, mode: OutputMode, tokenizer: Tokenizer) -> None:
    pieces = [BLOCK, INVOKE, parameter("v"), parameter("[1", string=False), END_INVOKE, END_BLOCK, "<｜DSML｜"]
    pieces += ["</｜DSML｜", "parameter>", "</think>", "<think>", "<｜User｜>", "\n\n<", "x", "\n", "é"]
    template = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=12)))
    ids = ids_of(tokenizer, template)
    for position in data.draw(st.lists(st.integers(0, len(ids)), max_size=3)):
        ids.insert(position, data.draw(st.integers(2, tokenizer.vocab_size + 5)))
    deltas, output = parse(tokenizer, ids, mode)
    assert message_of(deltas) == output.message
    for call in output.message.tool_calls:
        assert isinstance(json.loads(call.arguments_json), dict)
    if not output.message.tool_calls:
        message = output.message
        end = "</think>" if mode is OutputMode.THINKING and not output.thought_is_open else ""
        assert message.reasoning_content + end + message.content == tokenizer.decode(ids)


def test_a_call_streams_as_json(tokenizer: Tokenizer) -> None:
    ids = ids_of(
        tokenizer, f"Hi{BLOCK}{INVOKE}{parameter('a<b')}{parameter(' [1,2] ', key='n', string=False)}{END_INVOKE}"
    )
    ids += ids_of(tokenizer, f"{END_BLOCK}<｜end▁of▁sentence｜>")
    deltas, output = parse(tokenizer, ids)
    assert ContentText("<") not in deltas
    assert [d for d in deltas if isinstance(d, CallStarted)] == [CallStarted(0, "call_0", "f")]
    arguments = [d.arguments_json for d in deltas if isinstance(d, CallArguments)]
    assert len(arguments) > 3
    assert "".join(arguments) == '{"k": "a<b", "n": [1, 2]}'
    assert isinstance(deltas[-1], CallFinished)
    assert output.reason == TOOL_CALLS


@pytest.mark.parametrize("value", ["[1,", "NaN", '{"a": 1, "a": 2}', "[" * 32 + "]" * 32, '"\\ud800"', "", "1e999"])
def test_bad_json_is_delivered_as_a_string(value: str, tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, f"{BLOCK}{INVOKE}{parameter(value, string=False)}{END_INVOKE}{END_BLOCK}")
    _, output = parse(tokenizer, ids)
    assert json.loads(output.message.tool_calls[0].arguments_json) == {"k": value}


@pytest.mark.parametrize(
    ("template", "content"),
    [
        (BLOCK + "what", BLOCK + "what"),
        (BLOCK + END_BLOCK, BLOCK + END_BLOCK),
        (BLOCK + '<｜DSML｜invoke name="">\n' + END_INVOKE, BLOCK + '<｜DSML｜invoke name="">\n' + END_INVOKE),
        (BLOCK + INVOKE + "text", BLOCK + INVOKE + "text"),
        (BLOCK + INVOKE + parameter("1") + parameter("2"), BLOCK + INVOKE + parameter("1") + parameter("2")),
        (BLOCK + INVOKE + END_BLOCK, BLOCK + INVOKE + END_BLOCK),
        (BLOCK + INVOKE + END_INVOKE + "oops", "oops"),
        (BLOCK + INVOKE + END_INVOKE + INVOKE + "<｜DSML｜?", INVOKE + "<｜DSML｜?"),
        (BLOCK + INVOKE + END_INVOKE + END_BLOCK + "\n after", "\n after"),
        (f'{BLOCK}<｜DSML｜invoke name="{"n" * 200}">', f'{BLOCK}<｜DSML｜invoke name="{"n" * 200}">'),
        ("<｜DSML｜other>", "<｜DSML｜other>"),
        ("｜DSML｜function_calls>", "｜DSML｜function_calls>"),
        ("<｜User｜>a<think>b</think>", "<｜User｜>a<think>b</think>"),
    ],
)
def test_what_fails_to_be_a_call_is_content(template: str, content: str, tokenizer: Tokenizer) -> None:
    deltas, output = parse(tokenizer, ids_of(tokenizer, template))
    assert output.message.content == content
    assert message_of(deltas) == output.message
    assert len(output.message.tool_calls) == (END_INVOKE in template and '"f"' in template)


@pytest.mark.parametrize(
    "value",
    [
        "x</｜DSML｜para</｜DSML｜",
        "</｜DSML｜para｜DSML｜",
        "</｜DSML｜｜DSML｜",
        "<｜DSML｜parameter",
        "</｜DSML｜invoke>",
        "</｜DSML｜parameter",
        "<think></",
    ],
)
def test_control_tokens_inside_a_value_are_its_text(value: str, tokenizer: Tokenizer) -> None:
    for string in (True, False):
        ids = ids_of(tokenizer, f"{BLOCK}{INVOKE}{parameter(value, string=string)}{END_INVOKE}{END_BLOCK}")
        deltas, output = parse(tokenizer, ids)
        assert [json.loads(call.arguments_json) for call in output.message.tool_calls] == [{"k": value}]
        assert message_of(deltas) == output.message


def test_json_as_deep_as_it_may_be_is_json(tokenizer: Tokenizer) -> None:
    value = "[" * 31 + "]" * 31
    ids = ids_of(tokenizer, f"{BLOCK}{INVOKE}{parameter(value, string=False)}{END_INVOKE}{END_BLOCK}")
    assert parse(tokenizer, ids)[1].message.tool_calls[0].arguments_json == f'{{"k": {value}}}'


def test_a_parameter_given_twice_is_no_call(tokenizer: Tokenizer) -> None:
    template = BLOCK + INVOKE + parameter("1") + parameter("2") + END_INVOKE + END_BLOCK
    _, output = parse(tokenizer, ids_of(tokenizer, template))
    assert output.message == Message(role=Role.ASSISTANT, content=template)


def test_incomplete_calls_are_reported(tokenizer: Tokenizer) -> None:
    template = BLOCK + INVOKE + END_INVOKE + INVOKE + parameter("v") + '<｜DSML｜parameter name="x" string="true">ab'
    _, output = parse(tokenizer, ids_of(tokenizer, template))
    assert output.message.tool_calls == (ToolCall(id="call_0", name="f", arguments_json="{}"),)
    assert output.incomplete_calls == (ToolCall(id="call_1", name="f", arguments_json='{"k": "v", "x": "ab'),)


def test_a_call_inside_the_reasoning_is_reasoning(tokenizer: Tokenizer) -> None:
    template = f"a{BLOCK}{INVOKE}{END_INVOKE}{END_BLOCK}"
    _, output = parse(tokenizer, ids_of(tokenizer, template), OutputMode.THINKING)
    assert output.message.reasoning_content == template
    assert output.thought_is_open


@pytest.mark.parametrize("newlines", ["", "\n", "\n\n", "\n\n\n"])
def test_up_to_two_newlines_belong_to_a_block(newlines: str, tokenizer: Tokenizer) -> None:
    template = f"x{newlines}{BLOCK.lstrip()}{INVOKE}{END_INVOKE}{END_BLOCK}"
    _, output = parse(tokenizer, ids_of(tokenizer, template))
    assert output.message.content == "x" + newlines[2:]
    assert len(output.message.tool_calls) == 1


def test_raw_output_is_content_only(tokenizer: Tokenizer) -> None:
    template = f"</think><think>{BLOCK}{INVOKE}{END_INVOKE}{END_BLOCK}"
    _, output = parse(tokenizer, ids_of(tokenizer, template + "<｜end▁of▁sentence｜>ignored"), OutputMode.RAW)
    assert output.message == Message(role=Role.ASSISTANT, content=template)
    assert output.reason == STOP
    assert output.num_tokens == len(ids_of(tokenizer, template)) + 1


def test_invalid_utf8_becomes_replacement_characters(tokenizer: Tokenizer) -> None:
    for data in (b"\xff", b"\xe2\x82", b"a\xe2\x82b", b"\xf0\x9f\x98\xf0\x9f\x98\x80", b"\xc3\x28\x80"):
        _, output = parse(tokenizer, [tokenizer.encode_bytes(bytes([b]) + b"\xff")[0] for b in data])
        assert output.message.content == data.decode("utf-8", "replace")
    ids = [*tokenizer.encode_bytes(b"\xe2\x82"), tokenizer.control_id(Control.END_THINK), *tokenizer.encode("x")]
    _, output = parse(tokenizer, ids, OutputMode.THINKING)
    assert (output.message.reasoning_content, output.message.content) == ("\ufffd", "x")


# --- stop strings


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab\n<é🙂", max_size=30),
    stops=st.lists(st.text("ab\n<é🙂", min_size=1, max_size=4), min_size=1, max_size=3),
    mode=st.sampled_from(list(OutputMode)),
    seed=st.integers(0, 1 << 30),
)
def test_stop_strings_agree_with_a_search_of_the_whole_text(
    text: str, stops: list[str], mode: OutputMode, seed: int, tokenizer: Tokenizer
) -> None:
    ids = random_tokenisation(tokenizer, text, random.Random(seed))
    deltas, output = parse(tokenizer, ids, mode, stop_strings=stops)
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    shown = output.message.reasoning_content if mode is OutputMode.THINKING else output.message.content
    assert message_of(deltas) == output.message
    if not ends:
        assert (shown, output.reason, output.num_tokens) == (text, LENGTH, len(ids))
        return
    end, length = min(ends)
    before = text[: end + length]
    assert (shown, output.reason) == (before, STOP_SEQUENCE)
    kept = b"".join(map(tokenizer.token_bytes, ids[: output.num_tokens]))
    assert kept + output.cut_bytes == before.encode()
    assert len(kept + tokenizer.token_bytes(ids[output.num_tokens])) > len(before.encode())


def random_tokenisation(tokenizer: Tokenizer, text: str, rng: random.Random) -> list[int]:
    """Ids of ``text`` that need not be the tokenizer's own choice."""
    ids: list[int] = []
    data = text.encode()
    while data:
        size = rng.randint(1, 3)
        ids += tokenizer.encode_bytes(data[:size])
        data = data[size:]
    return ids


def test_stop_strings_do_not_reach_across_channels_or_into_arguments(tokenizer: Tokenizer) -> None:
    ids = ids_of(
        tokenizer, f"ST</think>OP{BLOCK}{INVOKE}{parameter('STOP')}{END_INVOKE}{END_BLOCK}<｜end▁of▁sentence｜>"
    )
    _, output = parse(tokenizer, ids, OutputMode.THINKING, stop_strings=["STOP"])
    assert output.reason == TOOL_CALLS
    assert output.message.reasoning_content == "ST"
    assert output.message.content == "OP"


def test_text_that_may_begin_a_stop_string_comes_before_a_call_and_not_after(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, f"1ST{BLOCK}{INVOKE}{END_INVOKE}{END_BLOCK}OP")
    deltas, output = parse(tokenizer, ids, stop_strings=["STOP"])
    assert output.reason == LENGTH
    first_call = next(i for i, delta in enumerate(deltas) if isinstance(delta, CallStarted))
    assert message_of(deltas[:first_call]).content == "1ST"
    assert message_of(deltas).content == "1STOP"


def test_a_token_that_begins_inside_a_character_is_cut_at_a_byte(tokenizer_folder: Path, tmp_path: Path) -> None:
    definition = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    definition["model"]["vocab"]["©bS"] = 900  # the second byte of é, then text
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    odd = Tokenizer.load(tmp_path)
    (first,) = odd.encode_bytes(b"\xc3")
    _, output = parse(odd, [first, 900, *odd.encode("TOP")], stop_strings=["STOP"])
    assert (output.message.content, output.num_tokens) == ("éb", 1)
    assert output.cut_bytes == b"\xa9b"


def test_a_stop_string_in_withheld_text_is_found_at_the_end(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a\n\n"), tokenizer.eos_token_id]
    _, output = parse(tokenizer, ids, stop_strings=["\n\n"])
    assert (output.message.content, output.reason, output.num_tokens) == ("a", STOP_SEQUENCE, 1)


def test_a_stop_token_ends_the_message_and_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    deltas, output = parse(tokenizer, [a, b, c], stop_token_ids=[b])
    assert (output.message.content, output.reason, output.num_tokens) == ("a", STOP_SEQUENCE, 1)
    assert deltas == [ContentText("a")]


# --- time


@pytest.mark.parametrize("stops", [(), ("aaaaaaaaab", "never", "\n\n!")])
@pytest.mark.parametrize(
    "template",
    [
        "a" * 100_000,
        "\n" * 50_000 + "<" * 50_000,
        BLOCK + INVOKE + parameter("</" * 100_000),
        BLOCK + INVOKE + parameter("[" * 100_000, string=False),
        BLOCK + INVOKE + '<｜DSML｜parameter name="' + "k" * 100_000,
        BLOCK + " " * 100_000,
        (BLOCK + INVOKE) * 4_000,
        BLOCK + INVOKE + '<｜DSML｜parameter name="k" string="true">' + "</｜DSML｜para" * 10_000,
    ],
    ids=["content", "held", "value", "json", "header", "gap", "blocks", "false ends"],
)
def test_time_is_linear(template: str, stops: tuple[str, ...], tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, template)
    began = time.thread_time()
    parse(tokenizer, ids, stop_strings=stops)
    per_token_us = (time.thread_time() - began) / len(ids) * 1e6
    print(f"{per_token_us:.2f} µs a token")
    assert per_token_us < 30
