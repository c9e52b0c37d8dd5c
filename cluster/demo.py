"""``seamount demo``: a conversation with tiny-agent over gRPC.

It thinks and calls tools, which are Python functions that run here. What it answers and does, and what the receipts of
its turns say, is checked.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from seamount.cluster.chat import print_turn, receipt_line
from seamount.cluster.demo_desk import TOOLS, Desk
from seamount.cluster.settings import Settings, validate
from seamount.cluster.terminal import printable
from seamount.router.client import Client, Message, Role, Sampling, ThinkingMode, Turn, system, tool_result, user
from seamount.v1 import admin_pb2, events_pb2, session_pb2, worker_pb2
from seamount.wire.hashes import PAGE_SIZE

STATE_TIMEOUT_S = 5.0
SAMPLING = Sampling(temperature=0.0, max_output_tokens=256)
MAX_TURNS = 8
"""For one question."""


def demo_settings(*, cuda: bool = False) -> Settings:
    """The default deployment, beside whatever else runs here: any free port, files in ``./.demo``, its own Redis.

    cuda: all ranks share one GPU, with fp8 caches and a bfloat16 model.
    """
    chosen: dict[str, object] = {
        "cluster_name": "demo",
        "run_dir": ".demo",
        "redis": {"data_dir": ".demo/redis"},
        "router": {"port": 0},
    }
    if cuda:
        chosen |= {"engine": {"device": "cuda"}, "cache": {"layout": "fp8", "dtype": "bfloat16"}}
    return validate(chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was to hold, whether it did, and the figures."""

    claim: str
    holds: bool
    figures: str


def hold_conversation(client: Client, console: Console) -> list[Check]:
    """Run the conversation, printing it; returns the checks in order. Raises the typed error of a call that failed."""
    checks = list(_conversation(client, console))
    for check in checks:
        mark = "[green]✓" if check.holds else "[red]✗"
        console.print(f"{mark}[/] {check.claim} [dim]({check.figures})", highlight=False)
    return checks


def _conversation(client: Client, console: Console) -> Iterator[Check]:
    desk = Desk()
    session = client.create_session(thinking_mode=ThinkingMode.THINKING)
    talk = _Talk(client, session.id, desk, console)
    opening = system("You are tiny-agent, a helpful assistant.", tools=TOOLS)

    talk.heading("A question that takes two calls, the second with what the first one gave")
    fare = talk.ask("What is the fare of the flight of package TQR64?", opening)
    flight = desk.packages["TQR64"]["flight"]
    first = fare.turns[0]
    yield check_receipt("its prompt goes to a prefill rank, all of it", first.receipt, num_cached=0, remote=True)
    yield check_answer("it found the flight and told its fare", fare, desk.flights[flight]["fare"])
    yield _again_check(client, talk)

    talk.heading("A question that means something only after the one before")
    tripled = talk.ask("What is that times 3?")
    yield check_answer("it knew which number", tripled, round(desk.flights[flight]["fare"] * 3, 2))

    talk.heading("Several calls at once")
    lowest = min(desk.flights, key=lambda key: float(desk.flights[key]["fare"]))
    others = [key for key in desk.flights if key != lowest]
    *keys, last = desk.flights
    compared = talk.ask(f"Which flight has the lowest fare: {', '.join(keys)} or {last}?")
    yield check_answer(
        "it looked all of them up and compared", compared, lowest, desk.flights[lowest]["fare"], but_not=others
    )

    talk.heading("A call that fails, and what to do then")
    wanted, there, voucher = 5, desk.cabins["HWP31"]["nights"], desk.vouchers[0]
    booked = talk.ask(f"Please book {wanted} nights of cabin HWP31; if there are fewer, all there are.")
    yield check_answer("it took what there was and told the voucher", booked, there, voucher)
    yield Check(
        claim="the cabin is booked out, nothing else has changed",
        holds=desk == _after_booking(desk, "HWP31"),
        figures=f"{there} nights, {len(desk.calls)} calls in all",
    )

    yield talk.waiting_check()
    yield talk.receipts_check()
    yield talk.history_check()
    client.delete_session(session.id)
    yield _pages_check(client)


def _after_booking(desk: Desk, cabin: str) -> Desk:
    expected = Desk(calls=desk.calls)
    expected.cabins[cabin]["nights"] = 0
    del expected.vouchers[0]
    return expected


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and the turns up to its answer, each but the last with calls. inputs: what each turn was given;
    waited: for each but the last, whether the session then waited for exactly those calls."""

    inputs: list[list[Message]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    waited: list[bool] = field(default_factory=list)

    @property
    def answer(self) -> str:
        return "" if self.turns[-1].tool_calls else self.turns[-1].content


class _Talk:
    """Asks, runs what the model calls, and shows it all."""

    def __init__(self, client: Client, session_id: str, desk: Desk, console: Console) -> None:
        self._client = client
        self._session_id = session_id
        self._desk = desk
        self._console = console
        self.exchanges: list[Exchange] = []

    def heading(self, text: str) -> None:
        self._console.print(f"\n[bold underline]{text}")

    def ask(self, question: str, *before: Message) -> Exchange:
        """The question and all that follows from it, up to an answer or ``MAX_TURNS``."""
        exchange = Exchange()
        self.exchanges.append(exchange)
        messages = [*before, user(question)]
        self._say("user", question)
        while True:
            turn = self._turn(exchange, messages)
            if not turn.tool_calls or len(exchange.turns) == MAX_TURNS:
                return exchange
            session = self._client.get_session(self._session_id)
            pending = [call.id for call in session.pending_tool_calls]
            waits = session.state == session_pb2.SESSION_STATE_WAITING_FOR_TOOLS
            exchange.waited.append(waits and pending == [call.id for call in turn.tool_calls])
            messages = [tool_result(call, self._desk.answer(call)) for call in turn.tool_calls]
            for message in messages:
                self._say("tool", message.content)

    def _turn(self, exchange: Exchange, messages: list[Message]) -> Turn:
        key = f"demo-{sum(len(one.turns) for one in self.exchanges)}"
        self._console.print("[bold]assistant>[/]", end=" ")
        with self._client.run_turn(self._session_id, messages, sampling=SAMPLING, idempotency_key=key) as stream:
            turn = print_turn(stream, self._console)
        self._console.print(receipt_line(turn.receipt), style="dim", markup=False, highlight=False, soft_wrap=True)
        exchange.inputs.append(messages)
        exchange.turns.append(turn)
        return turn

    def _say(self, who: str, text: str) -> None:
        self._console.print(f"[bold]{who}>[/]", end=" ")
        self._console.out(printable(text), highlight=False)

    def waiting_check(self) -> Check:
        waited = [one for exchange in self.exchanges for one in exchange.waited]
        return Check(
            claim="the session waited for each call's result", holds=all(waited), figures=f"{len(waited)} times"
        )

    def receipts_check(self) -> Check:
        """A result finds all before it cached. A new question finds the whole pages before the earlier reasoning, which
        its prompt leaves out."""
        checks = []
        for number, exchange in enumerate(self.exchanges):
            for before, after in zip(exchange.turns, exchange.turns[1:], strict=False):
                checks.append(check_receipt("", after.receipt, num_cached=_known(before)))
            if number:
                before_reasoning = self.exchanges[number - 1].turns[0].receipt.num_prompt_tokens - 1
                pages = before_reasoning // PAGE_SIZE * PAGE_SIZE
                checks.append(check_receipt("", exchange.turns[0].receipt, num_cached=pages))
        wrong = [check.figures for check in checks if not check.holds]
        receipts = [turn.receipt for exchange in self.exchanges for turn in exchange.turns]
        prompts, cached = (
            sum(getattr(receipt, name) for receipt in receipts) for name in ("num_prompt_tokens", "num_cached_tokens")
        )
        return Check(
            claim="every later turn computed only what was new",
            holds=not wrong,
            figures="; ".join(wrong) or f"{cached} of {prompts} prompt tokens were cached",
        )

    def history_check(self) -> Check:
        roles = [message.role for message in self._client.get_history(self._session_id).messages]
        expected: list[Role] = []
        for exchange in self.exchanges:
            for given in exchange.inputs:
                expected += [*(message.role for message in given), Role.ASSISTANT]
        return Check(
            claim="the history holds every message in order", holds=roles == expected, figures=f"{len(roles)} messages"
        )


def check_answer(claim: str, exchange: Exchange, *values: object, but_not: Sequence[str] = ()) -> Check:
    """Whether the answer names all these values and none of the others."""
    answer = exchange.answer
    named = all(_names(answer, str(value)) for value in values) and not any(_names(answer, one) for one in but_not)
    calls = sum(len(turn.tool_calls) for turn in exchange.turns)
    wanted = ", ".join(map(str, values))
    return Check(claim=claim, holds=named, figures=f"{wanted}, after {calls} call{'s' if calls != 1 else ''}")


def _names(text: str, value: str) -> bool:
    return re.search(rf"(?<![\w.-]){re.escape(value)}(?![\w-]|\.\d)", text) is not None


def _again_check(client: Client, talk: _Talk) -> Check:
    exchange = talk.exchanges[-1]
    before, key = exchange.turns[-1], f"demo-{len(exchange.turns) - 1}"
    sent = client.run_turn(before.session_id, exchange.inputs[-1], sampling=SAMPLING, idempotency_key=key).result()
    return Check(
        claim="the same turn sent again gets the first result",
        holds=(sent.content, sent.turn_id, sent.receipt) == (before.content, before.turn_id, before.receipt),
        figures=f"turn {before.turn_id}",
    )


def _known(before: Turn) -> int:
    """Tokens whose entries an earlier turn left behind: all but the last, which was sampled and never read."""
    return before.receipt.num_prompt_tokens + before.receipt.num_output_tokens - 1


def check_receipt(claim: str, receipt: events_pb2.Receipt, *, num_cached: int, remote: bool | None = None) -> Check:
    """Whether a turn found ``num_cached`` tokens and computed exactly the others, once.

    remote: True = on a prefill rank, all but the last token; None = wherever placement put it.
    """
    computed = receipt.num_decode_computed_tokens + receipt.num_prefill_computed_tokens
    was_remote = receipt.path == events_pb2.PREFILL_PATH_REMOTE
    where = "on a prefill rank, all but the last token" if was_remote else "on the decode rank"
    return Check(
        claim=claim,
        holds=receipt.num_cached_tokens == num_cached
        and computed == receipt.num_prompt_tokens - num_cached
        and (not was_remote or receipt.num_decode_computed_tokens == 1)
        and remote in (None, was_remote),
        figures=f"{receipt.num_prompt_tokens} prompt = {num_cached} cached + {computed} computed {where}"
        if receipt.num_cached_tokens == num_cached
        else f"{receipt.num_cached_tokens} cached instead of {num_cached}",
    )


def _pages_check(client: Client) -> Check:
    deadline = time.monotonic() + STATE_TIMEOUT_S
    while not all(map(_is_idle, ranks := client.list_ranks())) and time.monotonic() < deadline:
        time.sleep(0.1)  # a router hears of a rank's state at least once a second
    pools = [worker_pb2.Pool.Name(rank.state.pool).removeprefix("POOL_").lower() for rank in ranks]
    return Check(
        claim="all ranks are healthy and every page is back",
        holds=all(map(_is_idle, ranks)) and {"decode", "prefill"} <= set(pools),
        figures="ranks: " + ", ".join(f"{pools.count(pool)} {pool}" for pool in sorted(set(pools))),
    )


def _is_idle(rank: admin_pb2.Rank) -> bool:
    state = rank.state
    pages_are_back = state.num_free_pages + state.num_cached_pages == state.num_pages
    return rank.alive and state.healthy and state.num_reservations == 0 and pages_are_back
