from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.router import encoding
from seamount.router.encoding import RunEncoder, Runs, render, to_text
from seamount.router.messages import (
    Message,
    Role,
    ThinkingMode,
    Tool,
    ToolCall,
    check_messages,
    check_turn,
)
from seamount.router.tokenizer import Control, Tokenizer

MODES = list(ThinkingMode)


def rendered(messages: list[Message], mode: ThinkingMode = ThinkingMode.THINKING) -> str:
    return to_text(render(messages, mode=mode).pieces())


def user(content: str) -> Message:
    return Message(role=Role.USER, content=content)


def official_ids(official: tokenizers.Tokenizer, text: str) -> list[int]:
    ids: list[int] = official.encode(text, add_special_tokens=False).ids
    return ids


def test_golden_cases_render_byte_for_byte(golden_cases: Any) -> None:
    assert len(golden_cases) == 6
    for case in golden_cases:
        check_messages(case.messages)
        assert check_turn((), case.messages).generates
        assert rendered(case.messages, ThinkingMode[case.thinking_mode.upper()]) == case.rendered, case.name


def test_golden_cases_encode_like_the_official_string(
    golden_cases: Any, tokenizer: Tokenizer, official_tokenizer: tokenizers.Tokenizer
) -> None:
    for case in golden_cases:
        ids = RunEncoder(tokenizer).encode_messages(case.messages, ThinkingMode[case.thinking_mode.upper()])
        assert ids == official_ids(official_tokenizer, case.rendered), case.name


@settings(max_examples=100, deadline=None)
@given(data=st.data(), mode=st.sampled_from(MODES))
def test_ids_equal_the_official_ones_without_control_literals(
    data: st.DataObject,
    mode: ThinkingMode,
    strategies: Any,
    tokenizer: Tokenizer,
    official_tokenizer: tokenizers.Tokenizer,
) -> None:
    messages = data.draw(strategies.harmless_conversations)
    check_messages(messages)
    # Names and keys of calls are drawn hostile: make them harmless, too.
    messages = [
        replace(
            message, tool_calls=tuple(replace(c, name="f", arguments_json='{"k": "v"}') for c in message.tool_calls)
        )
        for message in messages
    ]
    pieces = render(messages, mode=mode).pieces()
    assert list(RunEncoder(tokenizer).encode(pieces)) == official_ids(official_tokenizer, to_text(pieces))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), mode=st.sampled_from(MODES))
def test_control_ids_come_from_the_template_alone(
    data: st.DataObject, mode: ThinkingMode, strategies: Any, tokenizer: Tokenizer
) -> None:
    messages = data.draw(strategies.hostile_conversations)
    check_messages(messages)
    assert check_turn((), messages).generates
    ids = RunEncoder(tokenizer).encode_messages(messages, mode)
    assert tokenizer.decode(ids) == rendered(messages, mode)
    blanked = [_without_text(message) for message in messages]
    blank_ids = RunEncoder(tokenizer).encode_messages(blanked, mode)
    controls = [tokenizer.control(token_id) for token_id in ids]
    assert [c for c in controls if c] == [c for c in map(tokenizer.control, blank_ids) if c]


def _without_text(message: Message) -> Message:
    """The same structure with harmless text everywhere."""
    content = "x" if message.role is Role.DEVELOPER else ""
    tools = tuple(Tool(function_json='{"name": "f"}') for _ in message.tools)
    calls = []
    for call in message.tool_calls:
        arguments = encoding.strict_json.parse(call.arguments_json)
        same_count = encoding.strict_json.dump({f"k{i}": 0 for i in range(len(arguments))})
        calls.append(ToolCall(id=call.id, name="f", arguments_json=same_count))
    schema = "{}" if message.response_format_json else ""
    return replace(
        message,
        content=content,
        reasoning_content="",
        tools=tools,
        tool_calls=tuple(calls),
        response_format_json=schema,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("role", [Role.USER, Role.TOOL, Role.SYSTEM])
def test_every_control_literal_typed_by_others_stays_text(role: Role, mode: ThinkingMode, tokenizer: Tokenizer) -> None:
    hostile = "".join(control.value for control in Control)
    call = ToolCall(id="c", name="f", arguments_json="{}")
    asked = [
        user(hostile if role is Role.USER else ""),
        Message(role=Role.ASSISTANT, tool_calls=(call,)),
        Message(role=Role.TOOL, tool_call_id="c", content=hostile if role is Role.TOOL else ""),
    ]
    messages = [Message(role=Role.SYSTEM, content=hostile if role is Role.SYSTEM else ""), *asked]
    ids = RunEncoder(tokenizer).encode_messages(messages, mode)
    assert hostile in tokenizer.decode(ids)
    plain = [replace(message, content="") for message in messages]
    num_controls = sum(tokenizer.control(i) is not None for i in RunEncoder(tokenizer).encode_messages(plain, mode))
    assert sum(tokenizer.control(token_id) is not None for token_id in ids) == num_controls


def test_text_between_two_controls_is_one_run() -> None:
    runs = Runs()
    runs.text("a")
    runs.template("b<think>c")
    runs.text("")
    runs.text("<think>")
    assert runs.pieces() == ["ab", Control.THINK, "c<think>"]


def test_results_are_sorted_into_call_order() -> None:
    calls = tuple(ToolCall(id=f"c{i}", name="f", arguments_json="{}") for i in range(3))
    results = [Message(role=Role.TOOL, tool_call_id=f"c{i}", content=f"r{i}") for i in (2, 0, 1)]
    text = rendered([user("q"), Message(role=Role.ASSISTANT, tool_calls=calls), *results])
    assert text.index("r0") < text.index("r1") < text.index("r2")
    assert text.endswith("\n\n<think>")
    alone = to_text(
        render(results, mode=ThinkingMode.CHAT, pending_tool_calls=calls, begins=False, user_follows=True).pieces()
    )
    assert alone == (
        "\n\n<function_results>\n<result>r0</result>\n<result>r1</result>\n<result>r2</result>"
        "\n</function_results>\n\n</think>"
    )


def test_reasoning_is_kept_for_results_and_cut_by_a_question() -> None:
    call = ToolCall(id="c", name="f", arguments_json="{}")
    messages = [
        user("q"),
        Message(role=Role.ASSISTANT, reasoning_content="deep", tool_calls=(call,)),
        Message(role=Role.TOOL, tool_call_id="c", content="r"),
    ]
    assert "<think>deep</think>" in rendered(messages)
    later = rendered([*messages, user("more")])
    assert "deep" not in later
    assert later.count("<think>") == 1
    assert "deep" not in rendered(messages, ThinkingMode.CHAT)


def test_zero_arguments_leave_an_empty_line() -> None:
    call = ToolCall(id="c", name="now", arguments_json="{}")
    text = rendered([user("q"), Message(role=Role.ASSISTANT, tool_calls=(call,))], ThinkingMode.CHAT)
    assert '<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>' in text


def test_a_developer_message_before_the_last_question_keeps_its_place() -> None:
    text = rendered([Message(role=Role.DEVELOPER, content="d"), Message(role=Role.ASSISTANT, content="a"), user("q")])
    assert text == (
        "<｜begin▁of▁sentence｜><｜User｜>\n\n# The user's message is: d<｜Assistant｜></think>a<｜end▁of▁sentence｜>"
        "<｜User｜>q<｜Assistant｜><think>"
    )


def test_an_answer_without_reasoning_has_an_empty_one() -> None:
    text = rendered([user("q"), Message(role=Role.ASSISTANT, content="a")])
    assert text.endswith("<think></think>a<｜end▁of▁sentence｜>")


def test_two_questions_in_a_row_each_get_their_tag() -> None:
    assert rendered([user("a"), user("b")]).endswith(
        "<｜User｜>a<｜Assistant｜></think><｜User｜>b<｜Assistant｜><think>"
    )


def test_json_is_rendered_in_one_form_with_its_key_order() -> None:
    tool = Tool(function_json='{"parameters":{"b":1,"a":\n2},"name":"f"}')
    text = rendered([Message(role=Role.SYSTEM, tools=(tool,)), user("q")])
    assert '<functions>\n{"parameters": {"b": 1, "a": 2}, "name": "f"}\n</functions>\n' in text


def test_remembered_runs_stay_within_their_bound_and_change_nothing(tokenizer: Tokenizer) -> None:
    bounded = RunEncoder(tokenizer, max_cached_chars=40)
    for i in range(30):
        messages = [user(f"hello {i % 7} " + "x" * (i % 11))]
        fresh = RunEncoder(tokenizer).encode_messages(messages, ThinkingMode.CHAT)
        assert bounded.encode_messages(messages, ThinkingMode.CHAT) == fresh
        assert sum(map(len, bounded._ids_of_run)) == bounded._num_cached_chars <= 40
