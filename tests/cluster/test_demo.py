"""The demo's own checks can fail, its functions do what they say, and its words are new to tiny-agent."""

import json
import re

import pytest

from examples.tiny_agent.shapes import Parameter, ParameterType, signature, split_of
from examples.tiny_agent.values import Split, is_of
from examples.tiny_agent.words import TRAINING
from seamount.cluster.demo import Exchange, check_answer, check_receipt, demo_settings
from seamount.cluster.demo_desk import FUNCTIONS, Desk
from seamount.cluster.settings import is_loopback
from seamount.router.client import ToolCall, Turn
from seamount.v1 import common_pb2, events_pb2

LOCAL, REMOTE = events_pb2.PREFILL_PATH_LOCAL, events_pb2.PREFILL_PATH_REMOTE


def receipt(**changes) -> events_pb2.Receipt:
    fields = {"num_prompt_tokens": 100, "num_cached_tokens": 60, "num_decode_computed_tokens": 40, "path": LOCAL}
    return events_pb2.Receipt(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"num_cached_tokens": 59}, False),
        ({"num_cached_tokens": 61}, False),
        ({"num_decode_computed_tokens": 41}, False),
        ({"num_decode_computed_tokens": 39}, False),
        ({"path": REMOTE, "num_decode_computed_tokens": 1, "num_prefill_computed_tokens": 39}, True),
        ({"path": REMOTE, "num_decode_computed_tokens": 2, "num_prefill_computed_tokens": 38}, False),
        ({"path": REMOTE, "num_decode_computed_tokens": 1, "num_prefill_computed_tokens": 40}, False),
    ],
)
def test_a_receipt_must_add_up(changes: dict, holds: bool) -> None:
    assert check_receipt("x", receipt(**changes), num_cached=60).holds is holds


def test_a_receipt_must_have_gone_where_it_should() -> None:
    assert check_receipt("x", receipt(), num_cached=60, remote=False).holds
    assert not check_receipt("x", receipt(), num_cached=60, remote=True).holds


def test_the_demo_stays_on_this_machine_and_out_of_the_way() -> None:
    settings = demo_settings()
    assert is_loopback(settings.router.host)
    assert is_loopback(settings.pools.host)
    assert settings.router.port == 0
    assert settings.redis_url is None
    assert settings.run_dir.name == ".demo"


def answered(content: str, *, call: str = "") -> Exchange:
    turn = Turn(
        session_id="",
        turn_id="",
        model="",
        seed=0,
        reasoning="",
        content=content,
        tool_calls=(ToolCall(id="", name=call, arguments_json="{}"),) if call else (),
        finish_reason=common_pb2.FINISH_REASON_STOP,
        usage=events_pb2.Usage(),
        receipt=events_pb2.Receipt(),
        logprobs=(),
        token_ids=(),
    )
    return Exchange(turns=[turn])


@pytest.mark.parametrize(
    ("answer", "holds"),
    [
        ("The fare is 99.7.", True),
        ("99.7, of M-3391", True),
        ("The fare is 99.", False),
        ("The fare is 199.7.", False),
        ("The fare is 99.72.", False),
        ("The fare is 99.7, of K-4127 too.", False),
        ("", False),
    ],
)
def test_an_answer_must_name_the_value_and_no_other(answer: str, holds: bool) -> None:
    assert check_answer("x", answered(answer), 99.7, but_not=["K-4127"]).holds is holds


def test_words_before_a_call_are_no_answer() -> None:
    assert not check_answer("x", answered("99.7", call="tally"), 99.7).holds


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("retrieve_package", {"package_handle": "TQR65", "revision": ["class"]}, {"error": "no package TQR65"}),
        ("inspect_flight", {"flight_handle": "K-8204", "revision": ["fare"]}, {"handle": "K-8204", "fare": 187.2}),
        ("inspect_flight", {"flight_handle": "K-8204", "revision": ["pilot"]}, {"error": "bad arguments"}),
        ("inspect_flight", {"flight_handle": "K-8204"}, {"error": "bad arguments"}),
        ("book_cabin", {"nights": 4, "cabin_handle": "HWP31"}, {"error": "at most 3"}),
        ("book_cabin", {"nights": "3", "cabin_handle": "HWP31"}, {"error": "bad arguments"}),
        ("book_cabin", {"nights": 3, "cabin_handle": "HWP31"}, {"voucher": "E-7145"}),
        ("reckon", {"p": 187.2, "symbol": "-", "q": 3}, {"result": 184.2}),
        ("reckon", {"p": 187.2, "symbol": "/", "q": 3}, {"error": "bad arguments"}),
        ("answer", {"call": "x"}, {"error": "no function answer"}),
    ],
)
def test_the_desk_does_what_its_schemas_say(name: str, arguments: dict, result: dict) -> None:
    desk = Desk()
    assert json.loads(desk.answer(ToolCall(id="", name=name, arguments_json=json.dumps(arguments)))) == result
    assert desk.cabins["HWP31"]["nights"] == (0 if "voucher" in result else 3)
    assert [call.name for call, _ in desk.calls] == [name]


def test_the_demo_speaks_of_nothing_that_was_trained() -> None:
    names = [[name, list(function.parameters)] for name, function in FUNCTIONS.items()]
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+", json.dumps(names))}
    desk = Desk()
    for table in (desk.packages, desk.flights, desk.cabins):
        for record in table.values():
            words |= set(record)
            numbers = [value for value in record.values() if type(value) in (int, float)]
            assert all(is_of(Split.EVALUATION, number) for number in numbers), record
            words |= {word.lower() for value in record.values() if isinstance(value, str) for word in value.split()}
    assert not words & {word.lower() for word in TRAINING.all()}
    for name, function in FUNCTIONS.items():
        shape = [parameter(key, schema, key not in function.optional) for key, schema in function.parameters.items()]
        assert split_of(signature(tuple(shape))) is Split.EVALUATION, name


def parameter(name: str, schema: dict, required: bool) -> Parameter:
    choices = tuple(schema.get("enum", schema.get("items", {}).get("enum", ())))
    kind = ParameterType.CHOICES if schema["type"] == "array" else ParameterType(schema["type"])
    kind = ParameterType.ENUM if "enum" in schema else kind
    made = Parameter(name=name, type=kind, choices=choices, about=schema.get("description", ""), required=required)
    assert made.schema() == schema
    return made
