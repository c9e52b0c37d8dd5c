from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.router.encoding import RunEncoder, render
from seamount.router.events import TurnEvents, call_id_prefix
from seamount.router.messages import Message, ThinkingMode
from seamount.router.parsing import OutputMode, ParsedOutput, TurnParser
from seamount.router.tokenizer import Tokenizer
from seamount.v1 import common_pb2, events_pb2
from seamount.wire.ids import TurnId

TURN = TurnId("t")


def run(
    tokenizer: Tokenizer, batches: Sequence[Sequence[int]], *, stop_strings: Sequence[str] = (), logprobs: bool = False
) -> tuple[list[events_pb2.TurnEvent], ParsedOutput]:
    parser = TurnParser(tokenizer, OutputMode.THINKING, call_id_prefix=call_id_prefix(TURN), stop_strings=stop_strings)
    events = TurnEvents(TURN, parser)
    made = [events.started(session_id="s", model="m", num_prompt_tokens=3, seed=7)]
    index = 0
    for batch in batches:
        entries = [common_pb2.TokenLogprobs(sampled=-float(index + i)) for i in range(len(batch))] if logprobs else ()
        made += events.tokens(batch, entries)
        index += len(batch)
    last, output = events.output_ended(common_pb2.FINISH_REASON_LENGTH)
    made += last
    usage = events_pb2.Usage(num_output_tokens=output.num_tokens)
    made += events.finished(output.reason, usage, events_pb2.Receipt(num_retries=1))
    return made, output


def split(ids: Sequence[int], rng: random.Random) -> list[Sequence[int]]:
    cuts = sorted(rng.sample(range(len(ids) + 1), min(len(ids), rng.randint(0, 6))))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@settings(max_examples=80, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1 << 30), stops=st.lists(st.sampled_from(["e", "<", "\n\n"]), max_size=2))
def test_events_do_not_depend_on_batching(
    data: st.DataObject, seed: int, stops: list[str], strategies: Any, tokenizer: Tokenizer
) -> None:
    answer: Message = data.draw(strategies.thoughtful_answers)
    pieces = render([answer], mode=ThinkingMode.THINKING, begins=False).pieces()
    ids = list(RunEncoder(tokenizer).encode(pieces))
    one_by_one, output = run(tokenizer, [[token_id] for token_id in ids], stop_strings=stops)
    assert run(tokenizer, split(ids, random.Random(seed)), stop_strings=stops) == (one_by_one, output)
    assert [event.sequence for event in one_by_one] == list(range(1, len(one_by_one) + 1))
    assert all(event.turn_id == TURN for event in one_by_one)
    kinds = [event.WhichOneof("event") for event in one_by_one]
    assert (kinds[0], kinds[-2], kinds[-1]) == ("started", "usage", "finished")
    assert "".join(event.content_delta.text for event in one_by_one) == output.message.content
    assert "".join(event.reasoning_delta.text for event in one_by_one) == output.message.reasoning_content
    started = [event.tool_call_started.id for event in one_by_one if event.HasField("tool_call_started")]
    assert started == [f"call_t_{i}" for i in range(len(started))]


def test_logprobs_come_once_each_and_only_of_kept_tokens(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("12<"), *tokenizer.encode("STOP99")]
    events, output = run(tokenizer, [ids[:2], ids[2:]], stop_strings=["STOP"], logprobs=True)
    sent = [entry.sampled for event in events for entry in event.logprobs]
    assert output.num_tokens == 3
    assert sent == [0.0, -1.0, -2.0]
    whole, _ = run(tokenizer, [ids], logprobs=True)
    assert [entry.sampled for event in whole for entry in event.logprobs] == [-float(i) for i in range(len(ids))]
    without, _ = run(tokenizer, [ids])
    assert not any(event.logprobs for event in without)


def test_tokens_after_the_end_change_nothing(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("12"), tokenizer.eos_token_id]
    assert run(tokenizer, [ids]) == run(tokenizer, [ids, tokenizer.encode("more")])


def test_a_turn_that_only_records() -> None:
    events = TurnEvents(TURN, None)
    assert not events.output_is_over
    made = [events.started(session_id="s", model="m", num_prompt_tokens=0, seed=0)]
    made += events.finished(common_pb2.FINISH_REASON_RECORDED, events_pb2.Usage())
    assert [event.WhichOneof("event") for event in made] == ["started", "usage", "finished"]
    assert not made[-1].finished.HasField("receipt")


def test_a_failure_is_the_next_event(tokenizer: Tokenizer) -> None:
    parser = TurnParser(tokenizer, OutputMode.CHAT, call_id_prefix="c")
    events = TurnEvents(TURN, parser)
    made = events.tokens(tokenizer.encode("12"))
    failed = events.failed(common_pb2.Status(code=14, message="away"))
    assert failed.sequence == len(made) + 1
    assert failed.failed.status.code == 14
