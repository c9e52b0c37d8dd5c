"""What the router's tests share: a byte-level tokenizer, hostile text, generated conversations, the golden cases."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import strategies as st

from seamount.router.byte_tokenizer import write_byte_tokenizer
from seamount.router.messages import Message, Role, Tool, ToolCall
from seamount.router.tokenizer import Control, Tokenizer

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
