"""The engine over a real tiny model: the same tokens however the work is cut, aborts, preemption, failures."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from seamount.wire.errors import (
    AlreadyExists,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from seamount.workers.events import EngineEvent, Failed, Finished, Progress
from seamount.workers.requests import EngineRequest, SamplingParams

MakeRank = Callable[..., Any]


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(131) for _ in range(length)]


def sampling(rng: random.Random, **more: Any) -> SamplingParams:
    choices: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.7}]
    return SamplingParams(**({"seed": rng.randrange(1 << 64), "max_output_tokens": 12} | rng.choice(choices) | more))


def test_requests_in_flight_together_give_the_tokens_of_one_at_a_time(make_rank: MakeRank, rng: random.Random) -> None:
    rank = make_rank(num_pages=200)
    work = [(prompt(rng, rng.choice([1, 2, 63, 64, 65, rng.randrange(1, 200)])), sampling(rng)) for _ in range(24)]
    alone = [rank.generate(ids, params) for ids, params in work]
    together = [rank.ask(ids, params) for ids, params in work]
    for client in together:
        assert client.finished().reason == "length"
    assert [client.token_ids for client in together] == alone
    assert all(client.threads == {"engine"} for client in together)
    assert len({tuple(ids) for ids in alone}) > 12, "the model says the same whatever it is asked"


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunk_size_changes_nothing(make_rank: MakeRank, rng: random.Random, chunk: int) -> None:
    work = [(prompt(rng, length), sampling(rng)) for length in (1, 50, 64, 129)]
    whole = make_rank(chunk=256, max_batch_tokens=256)
    expected = [whole.generate(ids, params) for ids, params in work]
    cut = make_rank(chunk=chunk)
    clients = [cut.ask(ids, params) for ids, params in work]
    for client, (ids, _) in zip(clients, work, strict=True):
        assert client.finished().num_computed == len(ids)
        assert client.progress == sorted(client.progress)
        assert len(client.progress) >= (len(ids) - 1) // chunk
    assert [client.token_ids for client in clients] == expected


def test_a_tiny_pool_preempts_and_changes_nothing(make_rank: MakeRank, rng: random.Random) -> None:
    work = [(prompt(rng, rng.randrange(20, 60)), sampling(rng, max_output_tokens=70)) for _ in range(4)]
    roomy = make_rank()
    expected = [roomy.generate(ids, params) for ids, params in work]
    tight = make_rank(num_pages=5)
    clients = [tight.ask(ids, params) for ids, params in work]
    ends = []
    for client in clients:  # the oldest ends first: only it is sure to have pages
        ends.append(client.finished())
        tight.reservations.release(client.reservation.id)
    assert [client.token_ids for client in clients] == expected
    assert ends[0].num_preemptions == 0
    assert sum(end.num_preemptions for end in ends) > 0
    assert any(end.num_computed > client.reservation.prompt_len for end, client in zip(ends, clients, strict=True))


def test_forced_tokens_come_first_then_sampling_goes_on(make_rank: MakeRank, rng: random.Random) -> None:
    rank = make_rank()
    ids, params = prompt(rng, 40), sampling(rng, first_output_index=0)
    free = rank.generate(ids, params)
    assert rank.generate(ids, params, forced_token_ids=tuple(free[:5])) == free
    forced = rank.generate(ids, params, forced_token_ids=(7, 7, 7))
    assert forced[:3] == [7, 7, 7]
    resumed = SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=params.seed,
        max_output_tokens=9,
        first_output_index=3,
    )
    assert rank.generate([*ids, 7, 7, 7], resumed) == forced[3:], "the draw depends on the output index alone"


def test_logprobs_of_a_forced_token_are_its_own(make_rank: MakeRank, rng: random.Random) -> None:
    client = make_rank().ask(
        prompt(rng, 9),
        SamplingParams(temperature=0.0, max_output_tokens=2, num_logprobs=3),
        forced_token_ids=(5,),
    )
    client.finished()
    forced, greedy = client.logprobs
    assert forced.sampled < 0
    assert len(forced.top) == 3
    assert greedy.top[0] == (client.token_ids[1], greedy.sampled)


def test_how_a_sequence_ends(make_rank: MakeRank, rng: random.Random) -> None:
    ids = prompt(rng, 20)
    greedy = {"temperature": 0.0, "max_output_tokens": 8}
    tokens = make_rank().generate(ids, SamplingParams(**greedy))
    end = tokens.index(tokens[5]) + 1

    stopped = make_rank().ask(ids, SamplingParams(**greedy, stop_token_ids=frozenset({tokens[5]})))
    assert stopped.finished().reason == "stop_sequence"
    assert stopped.token_ids == tokens[:end]
    assert stopped.reservation.token_ids == ids + tokens[:end]

    ended = make_rank(eos_token_id=tokens[5]).ask(ids, SamplingParams(**greedy))
    assert ended.finished().reason == "stop"
    assert ended.token_ids == tokens[:end]

    full = make_rank(max_context_tokens=23).ask(ids, SamplingParams(**greedy))
    assert full.finished().reason == "length"
    assert full.token_ids == tokens[:3]

    one_page = make_rank(num_pages=1).ask(ids[:1] * 60, SamplingParams(temperature=0.0, max_output_tokens=50))
    assert one_page.finished().reason == "length"
    assert len(one_page.token_ids) == 4


def test_prefill_only_stops_where_it_is_told_and_shows_each_layer(make_rank: MakeRank, rng: random.Random) -> None:
    rank, ids = make_rank(chunk=32), prompt(rng, 100)
    layers: list[tuple[int, int, int]] = []
    client = rank.ask(
        ids, None, prefill_until=99, share=True, on_layer=lambda layer, first, end: layers.append((layer, first, end))
    )
    end = client.finished()
    assert (end.reason, end.num_computed, client.token_ids) == ("prefilled", 99, [])
    assert client.progress == [0, 32, 64, 96, 99], "the first one says that it is in the batch"
    spans = [(0, 32), (32, 64), (64, 96), (96, 99)]
    assert layers == [(layer, *span) for span in spans for layer in range(2)]
    assert client.reservation.computed_len == 99
    rank.reservations.release(client.reservation.id)
    again = rank.ask(ids, SamplingParams(max_output_tokens=1), share=True)
    assert again.finished().num_computed == 100 - 64, "the full page is found again, the rest is computed"
    nothing = rank.ask([*ids[:64], 3], None, prefill_until=64, share=True)
    assert nothing.finished().num_computed == 0


def test_a_complete_prefill_leaves_one_prompt_token_to_compute(make_rank: MakeRank, rng: random.Random) -> None:
    rank, ids = make_rank(start=False), prompt(rng, 70)
    client = rank.ask(ids, SamplingParams(max_output_tokens=4))
    rank.reservations.uses.begin_receive(client.reservation.id, 0, 69)
    rank.reservations.uses.end_receive(client.reservation.id, 69)  # entries are NaN: only the count matters here
    rank.engine.start()
    assert client.failed().error.reason == "LOGITS_NOT_FINITE"
    assert rank.engine.state().num_computed_tokens == 1


def test_abort_takes_effect_within_a_step(make_rank: MakeRank, rng: random.Random) -> None:
    rank = make_rank(start=False)
    chosen: list[Any] = []

    def abort_at_the_third_token(event: Any) -> None:  # on the engine's thread: no step slips in between
        chosen[0](event)
        if len(chosen[0].token_ids) == 3:
            rank.engine.abort(chosen[0].reservation.id)

    chosen.append(rank.ask(prompt(rng, 100), SamplingParams(max_output_tokens=3000), sink=abort_at_the_third_token))
    other = rank.ask(prompt(rng, 100), SamplingParams(max_output_tokens=40))
    rank.engine.start()
    assert chosen[0].finished().reason == "cancelled"
    assert len(chosen[0].token_ids) == 3
    rank.engine.abort(chosen[0].reservation.id)
    rank.engine.abort("unknown")
    assert other.finished().reason == "length"


def test_a_request_aborts_before_its_first_step(make_rank: MakeRank, rng: random.Random) -> None:
    rank = make_rank(start=False)
    client = rank.ask(prompt(rng, 100), SamplingParams())
    rank.engine.abort(client.reservation.id)
    rank.engine.start()
    assert client.finished().num_computed == 0
    assert client.token_ids == []


def test_a_reservation_that_ends_fails_only_its_request(make_rank: MakeRank, rng: random.Random) -> None:
    rank = make_rank()
    doomed = rank.ask(prompt(rng, 50), SamplingParams(max_output_tokens=3000))
    other = rank.ask(prompt(rng, 50), SamplingParams(max_output_tokens=60))
    assert doomed.first_token.wait(10)
    rank.reservations.release(doomed.reservation.id)
    assert isinstance(doomed.failed().error, NotFound)
    assert other.finished().reason == "length"


def test_a_reservation_lives_as_long_as_its_request(make_rank: MakeRank, rng: random.Random) -> None:
    rank = make_rank()
    client = rank.ask(prompt(rng, 5), SamplingParams(max_output_tokens=4000))
    rank.reservations.renew(client.reservation.id, 1.0)
    deadline = time.monotonic() + 1.7
    while time.monotonic() < deadline and not client.done.is_set():
        rank.reservations.expire()
        time.sleep(0.05)
    rank.engine.abort(client.reservation.id)
    assert client.finished().reason == "cancelled"


@pytest.mark.parametrize(
    ("ids", "sampling", "more", "field"),
    [
        ([131], SamplingParams(), {}, "token_ids"),
        ([5], SamplingParams(), {"forced_token_ids": (131,)}, "forced_token_ids"),
        ([5], SamplingParams(), {"prefill_until": 1}, "prefill_until"),
        ([5], None, {"prefill_until": 2}, "prefill_until"),
        ([5], None, {"prefill_until": 0}, "prefill_until"),
        ([5] * 30, SamplingParams(), {}, "token_ids"),
    ],
)
def test_bad_requests_are_refused_at_once(
    make_rank: MakeRank, ids: list[int], sampling: SamplingParams | None, more: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        make_rank(max_context_tokens=30).ask(ids, sampling, **more)
    assert caught.value.field == field


def test_the_queue_is_bounded_and_a_reservation_has_one_request(make_rank: MakeRank, rng: random.Random) -> None:
    rank = make_rank(start=False, max_running=1, max_waiting=1)
    first, second = (rank.ask(prompt(rng, 10), SamplingParams(max_output_tokens=2)) for _ in range(2))
    with pytest.raises(ResourceExhausted) as caught:
        rank.ask(prompt(rng, 10), SamplingParams())
    assert caught.value.retry_after_s is not None
    assert rank.engine.state().num_waiting == 2
    assert rank.engine.state().queued_prefill_tokens == 20
    rank.engine.start()
    first.finished()
    second.finished()
    third = rank.ask(prompt(rng, 10), SamplingParams(max_output_tokens=3000))
    again = EngineRequest(id=third.reservation.id, reservation=third.reservation, sampling=None, sink=third)
    with pytest.raises(AlreadyExists):
        rank.engine.submit(again)
    rank.engine.abort(third.reservation.id)
    third.finished()


def test_a_sink_or_hook_that_raises_fails_only_its_request(make_rank: MakeRank, rng: random.Random) -> None:
    def broken(*_: object) -> None:
        raise ValueError("broken")

    rank = make_rank()
    hooked = rank.ask(prompt(rng, 10), SamplingParams(), on_layer=broken)
    rank.ask(prompt(rng, 10), SamplingParams(), sink=broken)
    fine = rank.ask(prompt(rng, 10), SamplingParams(max_output_tokens=5))
    assert isinstance(hooked.failed().error, Internal)
    assert len(fine.token_ids if fine.finished() else []) == 5
    assert rank.engine.healthy()


def test_a_model_that_raises_fails_the_batch_and_serves_the_next(
    make_rank: MakeRank, rng: random.Random, monkeypatch: pytest.MonkeyPatch, shared_model: Any
) -> None:
    rank = make_rank()
    with monkeypatch.context() as patch:
        patch.setattr(shared_model, "_lm_head", torch.zeros(3, 3))
        assert rank.ask(prompt(rng, 10), SamplingParams()).failed().error.reason == "STEP_FAILED"
    assert rank.ask(prompt(rng, 10), SamplingParams(max_output_tokens=2)).finished().reason == "length"
    assert rank.engine.healthy()


def test_stop_fails_what_is_outstanding_and_is_final(make_rank: MakeRank, rng: random.Random) -> None:
    rank = make_rank()
    rank.engine.start()
    running = rank.ask(prompt(rng, 50), SamplingParams(max_output_tokens=3000))
    assert running.first_token.wait(10)
    assert rank.engine.healthy()
    for _ in range(2):
        rank.engine.stop()
    assert isinstance(running.failed().error, Unavailable)
    assert not rank.engine.healthy()
    rank.engine.start()
    with pytest.raises(Unavailable):
        rank.ask(prompt(rng, 5), SamplingParams())
    assert not [thread for thread in threading.enumerate() if thread.name == "engine" and not thread.daemon]

    never_started = make_rank(start=False)
    waiting = never_started.ask(prompt(rng, 5), SamplingParams())
    assert not never_started.engine.healthy()
    never_started.engine.stop()
    assert isinstance(waiting.failed().error, Unavailable)


def test_health_is_the_answer_of_the_loop(
    make_rank: MakeRank, rng: random.Random, monkeypatch: pytest.MonkeyPatch, shared_model: Any
) -> None:
    rank = make_rank(health_timeout_s=0.4)
    time.sleep(0.5)
    assert rank.engine.healthy(), "an idle loop is asked first"
    time.sleep(0.05)
    assert rank.engine.healthy()
    release = threading.Event()
    forward = shared_model.forward

    def hang(*arguments: Any, **more: Any) -> Any:
        release.wait(10)
        return forward(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(shared_model, "forward", hang)
        client = rank.ask(prompt(rng, 10), SamplingParams(max_output_tokens=1))
        time.sleep(0.5)
        assert not rank.engine.healthy()
        release.set()
        client.finished()
    assert rank.engine.healthy()


def test_idle_engine_takes_no_steps(make_rank: MakeRank, rng: random.Random) -> None:
    rank = make_rank()
    rank.generate(prompt(rng, 5), SamplingParams(max_output_tokens=3))
    before, cpu = rank.engine.state().num_steps, time.process_time()
    time.sleep(0.3)
    assert rank.engine.state().num_steps == before
    assert time.process_time() - cpu < 0.1


def test_latency_of_a_tiny_model(make_rank: MakeRank, rng: random.Random) -> None:
    rank = make_rank(num_pages=200)
    for streams in (1, 16):
        clients = [rank.ask(prompt(rng, 10), SamplingParams(max_output_tokens=100, seed=i)) for i in range(streams)]
        ends = [client.finished() for client in clients]
        steps_ms = sorted(end.decode_s / 99 * 1e3 for end in ends)
        print(f"{streams} streams: {steps_ms[len(steps_ms) // 2]:.2f} ms between tokens (median)")
        assert steps_ms[0] < 250


class BatchSink:
    """Remembers whether its request was said to be in the batch."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_in_batch = False
        self.done = threading.Event()

    def __call__(self, event: EngineEvent) -> None:
        if isinstance(event, Progress):
            self.is_in_batch = event.in_batch
        elif isinstance(event, Finished | Failed):
            self.is_in_batch = False
            self.done.set()


def test_who_is_in_the_batch_is_told_before_it_is_computed(make_rank: MakeRank, rng: random.Random) -> None:
    rank = make_rank(chunk=16)
    sinks = [BatchSink(name) for name in ("one", "two", "suspect")]
    computed: list[tuple[set[str], set[str]]] = []
    forward = rank.engine._computation._runner.forward

    def watched(batch: Any, chunks: Any) -> Any:
        in_step = {chunk.sequence.request.sink.name for chunk in chunks}
        computed.append((in_step, {sink.name for sink in sinks if sink.is_in_batch}))
        return forward(batch, chunks)

    rank.engine._computation._runner.forward = watched
    for sink in sinks[:2]:
        rank.ask(prompt(rng, 8), sampling(rng, max_output_tokens=60), sink=sink)
    while len(computed) < 3:
        time.sleep(0.001)
    rank.ask(prompt(rng, 60), sampling(rng), sink=sinks[2], alone=True)
    for sink in sinks:
        assert sink.done.wait(30)
    assert all(in_step == told for in_step, told in computed)
    steps = [in_step for in_step, _ in computed]
    first = next(number for number, in_step in enumerate(steps) if "suspect" in in_step)
    assert steps[first : first + 5] == [{"suspect"}] * 5, "four chunks, and its second token"
    assert steps[first + 5] == {"one", "two", "suspect"}, "it joins the others then"


def test_background_work_ends_within_a_step_of_other_work_and_is_counted_apart(
    make_rank: MakeRank, rng: random.Random
) -> None:
    rank = make_rank(chunk=16, num_pages=64)
    ids = prompt(rng, 1000)
    ahead = rank.ask(ids, None, is_background=True)
    while rank.engine.state().num_background_tokens < 32:
        time.sleep(0.001)
    state = rank.engine.state()
    assert (state.num_running, state.num_waiting, state.queued_prefill_tokens) == (0, 0, 0)
    rank.generate(prompt(rng, 20), sampling(rng, max_output_tokens=3))
    ended = ahead.finished()
    assert ended.reason == "cancelled"
    assert 32 <= ended.num_computed < 1000
    state = rank.engine.state()
    assert (state.num_computed_tokens, state.num_background_tokens) == (20, ended.num_computed)
    assert state.answer_s > 0
    rank.reservations.release(ahead.reservation.id)

    again = rank.ask(ids[:200], None, is_background=True)
    assert again.finished().reason == "prefilled", "nothing else is to do"
    assert again.reservation.computed_len == 200
